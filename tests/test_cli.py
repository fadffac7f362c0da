"""The command's own behaviour: usage errors, messages, exit codes. Whole runs are in test_pipeline.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipvg_ray import cli


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("run", "plan", "report", "failures", "export", "demo", "models", "dataset", "evaluate", "compare"):
        assert command in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "--out", "{tmp}/none"], 2, "is not a run to resume: name an identity set"),
        (["run", "x", "--out", "{tmp}/r", "--profile", "gpuu"], 2, "did you mean 'gpu'"),
        (["run", "x", "--out", "{tmp}/r", "--set", "video.stps=1"], 2, "did you mean 'steps'"),
        (["run", "x", "--out", "{tmp}/r", "--until", "vid"], 1, "there is no stage 'vid'"),
        (["run", "x", "--bogus"], 2, "No such option"),
        (["report", "{tmp}"], 1, "is not a run directory"),
        (["failures", "{tmp}"], 1, "is not a run directory"),
        (["compare", "{tmp}", "{tmp}"], 1, "is not a run directory"),
        (["compare", "{tmp}", "{tmp}", "--fail-if", "arc_sim=1"], 1, "such as arc_sim<-0.01"),
        (["evaluate", "--videos", "{tmp}", "--refs", "{tmp}", "--out", "{tmp}/r"], 1, "no .mp4 files and no folders"),
        (["evaluate", "--videos", "{tmp}", "--refs", "x", "--layout", "2027"], 1, "there are challenge, tpige, 2026"),
        (["experiment", "table3", "x", "--out", "{tmp}/r"], 1, "there are table1, table2, tpige"),
        (["run", "x", "--out", "{tmp}/r", "--set", "models.root={tmp}"], 1, "ipvg-ray models make-mini"),
    ],
)
def test_wrong_usage_is_explained(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "r" / "run.json").exists()
