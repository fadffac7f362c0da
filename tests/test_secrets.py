"""No secret gets into a run, nothing in a model's file is run, and no name leads out of the run directory."""

from __future__ import annotations

import ast
import contextlib
import os
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from engine_checks import check_complete
from engine_driver import First, freeze_fake, request
from engine_inprocess import drive

from ipvg_ray import cli, config, secrets, tables
from ipvg_ray.pipeline import run as engine
from ipvg_ray.pipeline.stage import Row, RowError
from ipvg_ray.pipeline.store import Store, new_session

ROOT = Path(__file__).parent.parent
PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret/wJalrXUtnFEMI",
    "AWS_SESSION_TOKEN": "planted-session-token-IQoJb3JpZ2lu",
    "OPENAI_API_KEY": "planted-endpoint-key-4711",
    "HF_TOKEN": "planted-hub-token-0815",
    "MY_DB_PASSWORD": "planted-password-hunter2",
    "OTEL_EXPORTER_OTLP_HEADERS": "authorization=planted-collector-key",
}


@pytest.mark.parametrize(
    "setting",
    [
        "prompts.endpoint.url=http://me:planted-password@host/v1",
        "prompts.endpoint.url=http://host/v1?api_key=planted-key",
        "prompts.endpoint.extra_body={api_key: planted-key}",
        "prompts.vllm.extra={hf_token: planted-key}",
        "dataset.path=s3://AKIAABCDEFGHIJKLMNOP:planted@bucket/ids",
        "prompts.model=hf_plantedplantedplantedplanted",
    ],
)
def test_a_configuration_with_a_secret_is_refused_without_showing_it(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", str(tmp_path), "--out", str(tmp_path / "run"), "--set", setting]) == 2
    error = capsys.readouterr().err
    assert "looks like a secret" in error
    assert setting.partition("=")[0] in error
    assert "planted" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("profile", config.profiles())
def test_what_only_names_a_place_of_secrets_is_none(profile: str) -> None:
    settings = config.load(profile, overrides=["prompts.endpoint.url=https://host:8443/v1?version=2"])
    assert not list(secrets.found_in(settings.model_dump(mode="json")))


def test_secrets_are_cut_out_of_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "planted-planted")
    monkeypatch.setenv("SOME_PASSWORD", "short")
    assert secrets.redact("401 for planted-planted, a short one") == "401 for [SOME_API_KEY], a short one"
    assert secrets.redact("AKIAABCDEFGHIJKLMNOP") == "[key]"


class Leaky(First):
    """A stage whose library tells its credentials when it fails, as some do."""

    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        import os

        for row in rows:
            if row["identity_id"] == "id00001":
                raise ValueError(f"401 with headers {dict(os.environ)}")
        return [
            RowError("refused", f"Bearer {os.environ['OPENAI_API_KEY']}")
            if r["identity_id"] == "id00002"
            else self.one(r)
            for r in rows
        ]


def leaks(folder: Path) -> list[str]:
    """Files below a folder that hold a planted secret, or the tables that do."""
    found = []
    for file in folder.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            if file.suffix == ".parquet":  # pages are compressed
                data += str(tables.read_part(file).to_pylist()).encode()
            found += [f"{file.name}: {name}" for name, value in PLANTED.items() if value.encode() in data]
    return found


def test_a_run_that_fails_amid_secrets_holds_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    asked = request(tmp_path / "run", traces=True)
    asked.stages[0] = Leaky(asked.stages[0].config)  # type: ignore[index]
    drive(asked)
    failures = tables.read_table(tmp_path / "run", "failures").to_pylist()
    assert {f["identity_id"] for f in failures} == {"id00001", "id00002"}
    assert "[OPENAI_API_KEY]" in failures[0]["message"]
    assert list((tmp_path / "run/traces").glob("*.jsonl"))
    assert leaks(tmp_path / "run") == []
    (tmp_path / "run/planted").write_text(PLANTED["HF_TOKEN"])
    assert leaks(tmp_path / "run") == ["planted: HF_TOKEN"], "the scan itself finds what is there"


@pytest.mark.slow
def test_a_run_on_ray_its_logs_and_its_report_hold_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ipvg_ray.report.page import write_report

    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    bad = {"first:id00001": "raise", "second:id00000/prompt1": "exit", "third:id00002/prompt0": "segfault"}
    result = engine.run(request(tmp_path / "run", batch=2, bad=bad, traces=True), freeze_fake(4, 2))
    assert result.failed == 3
    write_report(tmp_path / "run")
    assert (tmp_path / "run/report.html").is_file()
    assert list((tmp_path / "run/_engine").rglob("log.jsonl"))
    assert leaks(tmp_path / "run") == []


# -- models and names --------------------------------------------------------------------------------------------


def test_no_loader_runs_what_a_model_file_holds() -> None:
    """Pickles are read with weights_only, code of model repositories never."""
    for file in (ROOT / "ipvg_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            name = f"{getattr(node.func.value, 'id', '')}.{node.func.attr}"
            given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            if name == "torch.load":
                own = file.name == "weights.py" and "pickle_module" in given  # tested by itself, below
                assert own or given.get("weights_only") is True, f"{file.name}:{node.lineno}"
            assert name not in ("pickle.load", "pickle.loads", "dill.load", "joblib.load"), f"{file.name}:{node.lineno}"
            assert given.get("trust_remote_code") is not True, f"{file.name}:{node.lineno}"
            assert given.get("allow_pickle") is not True, f"{file.name}:{node.lineno}"


class Hostile:
    """What an attacker puts into a checkpoint: unpickling it calls a function of their choice."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("bare", [True, False])
def test_a_metrics_checkpoint_runs_nothing(tmp_path: Path, new: bool, bare: bool) -> None:
    """Not in torch's formats, new or old, where it is read as tensors only, and not as a bare pickle."""
    torch = pytest.importorskip("torch")
    from ipvg_ray.metrics.nets import weights

    file, trap = tmp_path / "model.pth", tmp_path / "trap"
    content = {"state_dict": {"w": torch.ones(2)}, "settings": Hostile(trap)}
    if bare:
        file.write_bytes(pickle.dumps(content["settings"]))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=new)
    with contextlib.suppress(Exception):
        weights._loaded(file)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", "a/../../b", "a\\..\\b", "\0", "~root", "s3://x/y"])
def test_no_name_leads_out_of_the_run(name: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "run", new_session())
    store.begin()
    uri = store.publish("videos", name, name, ".mp4", b"film")
    place = (tmp_path / "run" / uri).resolve()
    assert place.is_relative_to((tmp_path / "run/videos").resolve())
    assert place.read_bytes() == b"film"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_run_of_hostile_names_stays_inside(tmp_path: Path) -> None:
    asked = request(tmp_path / "deep/run")  # its identity set holds `../id 00003é`
    drive(asked)
    check_complete(tmp_path / "deep/run")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["run"]


def test_archives_with_links_or_ways_out_are_not_unpacked(tmp_path: Path) -> None:
    from ipvg_ray.models.download import UnsafeArchiveError, unzip

    for name in ("../out", "/out", "a/../../out"):
        archive = tmp_path / "a.zip"
        with zipfile.ZipFile(archive, "w") as bundle:
            bundle.writestr(name, "x")
        with pytest.raises(UnsafeArchiveError):
            unzip(archive, tmp_path / "into")
    assert not (tmp_path / "out").exists()
