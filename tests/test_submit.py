"""Runs as jobs: what is packed, what is refused, and the miniature pipeline from S3 to S3 on a cluster."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ipvg_ray import cli, cli_submit
from ipvg_ray.cli_submit import pack
from ipvg_ray.pipeline.progress import Progress
from ipvg_ray.pipeline.runlog import RunLog, progress_of
from ipvg_ray.pipeline.survey import Counts

ROOT = Path(__file__).parent.parent
RUN = ["s3://bucket/ids", "--out", "s3://bucket/runs/one", "--profile", "gpu"]


def test_a_job_carries_this_code_and_its_configuration_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("stop_grace_s: 7\n")
    folder = tmp_path / "packed"
    folder.mkdir()
    job = pack([*RUN, "-c", str(file), "-s", "seed=3"], folder)
    options = ["--out", "s3://bucket/runs/one", "--profile", "gpu", "-c", "config.yaml", "-s", "seed=3"]
    assert job.command == ["python", "-m", "ipvg_ray", "run", "s3://bucket/ids", *options]
    assert (job.run_dir, job.grace_s) == ("s3://bucket/runs/one", 7)
    (tmp_path / "other").mkdir()
    assert pack(RUN[:3], tmp_path / "other").command[-2:] == ["--profile", "gpu"], "the head itself has no GPU"
    assert {p.name for p in folder.iterdir()} == {"ipvg_ray", "config.yaml"}
    assert not list(folder.rglob("*.pyc"))
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 5_000_000
    program = "import ipvg_ray, ipvg_ray.schema as s; s.table('video'); print(ipvg_ray.__file__, s.schema_dir())"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, env=clean, capture_output=True, text=True)
    assert done.stdout.split() == [str(folder / "ipvg_ray/__init__.py"), str(folder / "ipvg_ray/schemas")], done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["s3://b/ids", "--out", "run"], 1, "--out run: name a place that all nodes see"),
        (["ids", "--out", "s3://b/run"], 1, "name the identity set as the cluster sees it"),
        (["s3://b/ids", "--out", "s3://b/run", "--bogus"], 2, "No such option"),
        (["s3://b/ids", "--out", "s3://b/run", "--set", "video.stps=1"], 2, "did you mean 'steps'"),
        (RUN, 1, "no cluster answers at http://127.0.0.1:9"),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_sent(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["submit", "--address", "http://127.0.0.1:9", "--", *arguments]) == code
    assert message in capsys.readouterr().err


def test_a_job_is_told_where_traces_go_but_no_keys() -> None:
    told = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_TRACES_SAMPLER_ARG": "0.01"}
    keys = {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer x", "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "a=b"}
    keys |= {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://me:secret@collector", "AWS_SECRET_ACCESS_KEY": "x"}
    assert cli_submit._telemetry(told | keys) == told


def test_the_log_for_machines_tells_rows_by_stage(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "_engine/s1")
    seen = Progress({"a": Counts(10, 4, 1, 0, 5)}, {"a": "sample"}, 1.0)
    log.tick(seen)
    log.due = 0
    log.tick(seen)
    log.note("note", message="é")
    lines = [json.loads(line) for line in (tmp_path / "_engine/s1/log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["progress", "note"]
    wanted = {"total": 10, "done": 4, "running": 0, "waiting": 5, "failed": 1, "rows_per_second": 0.0}
    wanted["first_row_seconds"] = 0.0
    assert lines[0]["stages"] == progress_of(seen) == {"a": wanted}
    assert lines[1]["message"] == "é"


class Cluster:
    """A job's log over connections that end early: each shows so much of it, and breaks or ends as it should."""

    LOG = "one\ntwo\nthree\n"

    def __init__(self, connections: list[tuple[int, Exception | None]], states: list[Any]) -> None:
        self.connections = connections
        self.states = states

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        shown, error = self.connections.pop(0)
        for start in range(0, shown, 6):
            yield self.LOG[start : min(start + 6, shown)]
        if error is not None:
            raise error

    def get_job_logs(self, name: str) -> str:
        return self.LOG

    def get_job_info(self, name: str) -> Any:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        return SimpleNamespace(status=state)


def test_a_job_is_followed_to_its_end_over_broken_connections(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from aiohttp import ServerDisconnectedError
    from ray.job_submission import JobStatus

    monkeypatch.setattr(cli_submit, "_AGAIN", 0.0)
    broken = RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
    connections = [(4, broken), (0, ServerDisconnectedError()), (8, None), (9, broken)]
    states = [JobStatus.PENDING, ConnectionError("refused"), JobStatus.RUNNING, JobStatus.SUCCEEDED]
    cluster = Cluster(connections, states)
    asyncio.run(cli_submit._follow(cluster, "job", "http://head:8265"))
    assert capsys.readouterr().out == Cluster.LOG, "all of it, and nothing twice"
    assert not cluster.connections


def test_a_cluster_that_is_gone_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_submit, "_AGAIN", 0.01)
    monkeypatch.setattr(cli_submit, "_SILENCE", 0.05)
    gone = Cluster([(0, ConnectionError("refused"))] * 1000, [ConnectionError("refused")])
    with pytest.raises(cli_submit.SubmitError, match=r"the job may go on; look with: ray job status .* job \(refused"):
        asyncio.run(cli_submit._follow(gone, "job", "http://head:8265"))


@pytest.mark.slow
def test_the_miniature_pipeline_as_a_job_from_s3_to_s3(tmp_path: Path, mini_models: Path) -> None:
    from ipvg_ray.dataset.demo import make_demo

    identities = make_demo(tmp_path / "identities")
    file = tmp_path / "pools.yaml"
    pools = dict.fromkeys(("faces", "matting", "prompts", "text_states", "first_frame", "evaluate"), "one-gpu")
    pools["video"] = "eight-gpu"
    lines = [f"{name}: {{pool: {{label_selector: {{ipvg-ray/pool: {p}}}}}}}" for name, p in pools.items()]
    file.write_text("\n".join([*lines, "dataset: {limit: 3}", ""]))
    program = Path(__file__).with_name("submitted_pipeline.py")
    done = subprocess.run(
        [sys.executable, str(program), str(mini_models), str(identities), str(file)],
        capture_output=True,
        text=True,
        timeout=1100,
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
    )
    assert done.stdout.strip(), done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["first"] == 130, told["said"]
    assert "go on with: ipvg-ray submit --address" in told["said"]
    assert "Go on with: ipvg-ray run --out s3://runs/mini/run" in told["said"], "the job's own log was followed"
    assert told["second"] == 3, told["then"]
    assert "done, but some rows failed; try them again with: ipvg-ray submit" in told["then"], (
        "there is a cat among them"
    )
    assert told["outcomes"] == ["interrupted", "complete"]
    assert told["kept"] >= 3, "parts of the first job stand as they were"
    samples = dict.fromkeys(("prompts", "text_states", "first_frame", "video", "evaluate"), 4)
    assert told["rows"] == {"faces": 2, "matting": 2, **samples}
    assert told["most"] == 1, "nothing was done twice"
    assert told["videos"] == 4
    assert told["report"]
    assert told["logs"].count("start") == told["logs"].count("end") == 2
