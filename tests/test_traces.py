"""Traces: one of each row over all its stages, tries and starts; sent or written as the environment says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from engine_driver import freeze_fake, request
from engine_inprocess import drive, this_process
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from s3_server import s3_server

from ipvg_ray import config
from ipvg_ray.pipeline import run as engine
from ipvg_ray.pipeline.ledger import Event, TryLedger
from ipvg_ray.pipeline.plan import make_steps
from ipvg_ray.pipeline.store import batch_digest
from ipvg_ray.pipeline.tickets import read_rows, write_tickets
from ipvg_ray.pipeline.traces import Tracer, TracesError, finished_id, trace_id, traces_of
from ipvg_ray.pipeline.worker import Worker, WorkerStartError
from ipvg_ray.storage import S3Path

Span = dict[str, Any]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_SAMPLER"):
        monkeypatch.delenv(name, raising=False)


def spans_in(run_dir: Path) -> dict[str, list[Span]]:
    """The spans of a run's files by row, in the order in which they began, attributes as plain values."""
    rows: dict[str, list[Span]] = defaultdict(list)
    for file in (run_dir / "traces").glob("*.jsonl"):
        for line in file.read_text().splitlines():
            (resource,) = json.loads(line)["resourceSpans"]
            assert {"key": "service.name", "value": {"stringValue": "ipvg-ray"}} in resource["resource"]["attributes"]
            for span in resource["scopeSpans"][0]["spans"]:
                plain = {a["key"]: next(iter(a["value"].values())) for a in span["attributes"]}
                rows[plain["ipvg.row"]].append(span | {"attributes": plain})
    return {row: sorted(spans, key=lambda s: int(s["startTimeUnixNano"])) for row, spans in rows.items()}


def test_a_row_has_one_trace_over_stages_and_starts(tmp_path: Path) -> None:
    asked = request(tmp_path / "run", bad={"second:id00001/prompt0": "row-error"}, traces=True)
    drive(engine.Request(asked.run_dir, asked.config, asked.seed, asked.stages[:2], traces=True))
    run = json.loads((tmp_path / "run/run.json").read_text())["id"]
    first = spans_in(tmp_path / "run")
    drive(asked)
    rows = spans_in(tmp_path / "run")
    assert len(rows) == 15, "five identities, ten samples"
    assert {row: spans[: len(first[row])] for row, spans in rows.items()} == first
    names = {row: [span["name"] for span in spans] for row, spans in rows.items()}
    assert names["id00000"] == ["first"]
    assert names["id00000/prompt0"] == ["second", "third"], "of two starts"
    assert names["id00001/prompt0"] == ["second"], "set aside there"
    for row, spans in rows.items():
        assert {span["traceId"] for span in spans} == {f"{trace_id(run, row):032x}"}
    second, third = rows["id00000/prompt0"]
    assert third["parentSpanId"] == second["spanId"] == f"{finished_id(run, 'id00000/prompt0', 'second'):016x}"
    assert "parentSpanId" not in second
    identity = rows["id00000"][0]
    assert second["links"] == [{"traceId": identity["traceId"], "spanId": identity["spanId"]}]
    assert third["links"] == []
    said = second["attributes"]
    assert (said["ipvg.stage"], said["ipvg.attempt"], said["ipvg.outcome"]) == ("second", "1", "finished")
    assert said["ipvg.queue_seconds"] >= 0
    assert said["ipvg.work_seconds"] > 0
    failed = rows["id00001/prompt0"][0]
    assert failed["attributes"]["error.type"] == "planted"
    assert failed["status"] == {"code": StatusCode.ERROR.value, "message": "as asked"}


def test_runs_without_traces_write_none(tmp_path: Path) -> None:
    drive(request(tmp_path / "run"))
    assert not (tmp_path / "run/traces").exists()
    assert not config.Config().traces


def test_tries_that_raise_or_die_have_spans_of_their_own(tmp_path: Path) -> None:
    asked = request(tmp_path / "run", bad={"first:id00001": "raise"}, traces=True)
    with engine.opened(asked, freeze_fake(3, 1)) as this:
        tickets = write_tickets(this.store.tickets_dir, this.steps, 0, this.found)
        (batch,) = read_rows(tickets, 0, 3, 3)
        ledger, dead, me = TryLedger(), this_process(), this_process()
        worker = Worker(engine.specs(this, asked)["first"], "cpu", ledger, me, gpus=["3"])
        kept = InMemorySpanExporter()
        worker.tracer = Tracer(engine.specs(this, asked)["first"].traces, this.steps[0], this.store, me, ["3"], kept)
        worker(batch)
        tries = [(s.attributes["ipvg.row"], s.attributes["ipvg.outcome"]) for s in kept.get_finished_spans()]
        together = [(f"id0000{i}", "retried_alone") for i in range(3)]
        assert tries == [*together, ("id00000", "finished"), ("id00001", "failed"), ("id00002", "finished")]
        assert all(s.attributes["ipvg.gpus"] == ("3",) for s in kept.get_finished_spans())
        assert ["ipvg.queue_seconds" in s.attributes for s in kept.get_finished_spans()] == [True] * 3 + [False] * 3
        kept.clear()
        digest = batch_digest(["id00000"])
        ledger.begin(Event("first", digest, began=1, at=1000.0), dead)
        this.store.part("first", digest).unlink()
        worker(batch.slice(0, 1))
    gone, done = kept.get_finished_spans()
    assert (gone.attributes["ipvg.outcome"], gone.attributes["ipvg.process"]) == ("worker_died", dead.process)
    assert gone.start_time == 1000 * 10**9
    assert gone.status.status_code is StatusCode.ERROR
    assert (done.attributes["ipvg.outcome"], done.attributes["ipvg.process"]) == ("finished", me.process)
    assert done.context.trace_id == gone.context.trace_id
    assert done.context.span_id != gone.context.span_id


def test_a_sampled_row_is_sampled_at_all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    drive(request(tmp_path / "run", traces=True), identities=20, prompts=2)
    samples = {row: spans for row, spans in spans_in(tmp_path / "run").items() if "/prompt" in row}
    assert 5 <= len(samples) <= 35
    assert all([s["name"] for s in spans] == ["second", "third"] for spans in samples.values())


class Collector(BaseHTTPRequestHandler):
    """Keeps what is posted."""

    got: list[tuple[str, dict[str, str], bytes]]

    def do_POST(self) -> None:
        self.got.append((self.path, dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def collector() -> Any:
    kind = type("Mine", (Collector,), {"got": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever)
        yield f"http://127.0.0.1:{server.server_port}", kind.got
        server.shutdown()


def test_spans_are_sent_where_an_endpoint_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collector: Any
) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    address, got = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20planted-in-headers")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    steps = make_steps(request(tmp_path / "run").stages)
    traces = traces_of(steps, "run")
    assert "planted" not in repr(traces), "what workers are made from may be printed"
    asked = request(tmp_path / "run", traces=True)
    with engine.opened(asked, freeze_fake(2, 1)) as this:
        tickets = write_tickets(this.store.tickets_dir, this.steps, 0, this.found)
        worker = Worker(engine.specs(this, asked)["first"], "cpu", TryLedger(), this_process())
        worker(next(iter(read_rows(tickets, 0, 2, 2))))
        assert worker.tracer is not None
        worker.tracer.provider.shutdown()
    path, headers, body = got[0]
    assert (path, headers["authorization"]) == ("/v1/traces", "Bearer planted-in-headers")
    sent = ExportTraceServiceRequest.FromString(body).resource_spans[0]
    assert [span.name for span in sent.scope_spans[0].spans] == ["first", "first"]
    assert b"planted-in-headers" not in body
    assert not (tmp_path / "run/traces").exists()


def test_what_cannot_be_sent_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(tmp_path / "run", traces=True)
    steps = make_steps(asked.stages)
    with engine.opened(asked, freeze_fake(1, 1)) as this:
        spec = engine.specs(this, asked)["first"]
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
        with pytest.raises(TracesError, match=r"install ipvg-ray\[traces\]"):
            traces_of(steps, "run")
        with pytest.raises(WorkerStartError, match=r"install ipvg-ray\[traces\]"):
            Worker(spec, "cpu", TryLedger(), this_process())
        monkeypatch.delitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter")
        monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
        with pytest.raises(WorkerStartError, match=r"first cannot trace its rows: .*batch_size.*OTEL_"):
            Worker(spec, "cpu", TryLedger(), this_process())
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(TracesError, match="may be http/protobuf or grpc"):
        traces_of(steps, "run")


def test_secrets_do_not_reach_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_SECRET", "planted-secret-value")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "password=planted-secret-value")
    drive(request(tmp_path / "run", traces=True), identities=1, prompts=1)
    files = list((tmp_path / "run/traces").glob("*.jsonl"))
    assert files
    assert not any("planted" in file.read_text() for file in files)


def test_a_run_in_s3_keeps_them_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(monkeypatch):
        run_dir = S3Path("runs", "traced")
        drive(request(run_dir, traces=True), identities=2, prompts=1)
        lines = [line for file in (run_dir / "traces").glob("*.jsonl") for line in file.read_text().splitlines()]
    spans = [span for line in lines for span in json.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"]]
    assert sorted(span["name"] for span in spans) == ["first"] * 2 + ["second"] * 2 + ["third"] * 2


@pytest.mark.slow
def test_a_real_run_traces_each_row_and_its_retry(tmp_path: Path) -> None:
    program = [sys.executable, str(Path(__file__).parent / "engine_driver.py"), str(tmp_path / "run")]
    options = [
        "--identities",
        "4",
        "--prompts",
        "2",
        "--batch",
        "2",
        "--traces",
        "--bad",
        "second:id00002/prompt1=exit",
    ]
    done = subprocess.run([*program, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = spans_in(tmp_path / "run")
    ways = {row: [(s["name"], s["attributes"]["ipvg.outcome"]) for s in spans] for row, spans in rows.items()}
    assert ways["id00000/prompt0"] == [("second", "finished"), ("third", "finished")]
    guilty = rows["id00002/prompt1"]
    outcomes = [s["attributes"]["ipvg.outcome"] for s in guilty]
    assert outcomes[:-1] == ["worker_died"] * (len(outcomes) - 1)
    assert len(outcomes) == 5, "once beside another row, three times alone, then set aside"
    assert guilty[-1]["attributes"]["error.type"] == "worker_died"
    assert len({s["attributes"]["ipvg.process"] for s in guilty}) == 5
    assert len({s["traceId"] for s in guilty}) == 1
    assert all(s["attributes"]["ipvg.node"] for spans in rows.values() for s in spans)
    begun = [int(s["startTimeUnixNano"]) for s in guilty]
    assert begun == sorted(begun)
    assert begun[0] > 1.7e18, "seconds since 1970, also of tries that could not tell"


@pytest.mark.slow
def test_a_real_run_sends_every_span(tmp_path: Path, collector: Any) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    address, got = collector
    program = [sys.executable, str(Path(__file__).parent / "engine_driver.py"), str(tmp_path / "run")]
    options = ["--identities", "4", "--prompts", "2", "--traces"]
    told = {"OTEL_EXPORTER_OTLP_ENDPOINT": address, "OTEL_EXPORTER_OTLP_COMPRESSION": "none"}
    done = subprocess.run([*program, *options], capture_output=True, text=True, timeout=300, env=os.environ | told)
    assert done.returncode == 0, done.stderr
    resources = [r for _, _, body in got for r in ExportTraceServiceRequest.FromString(body).resource_spans]
    names = [span.name for resource in resources for scope in resource.scope_spans for span in scope.spans]
    assert Counter(names) == {"first": 4, "second": 8, "third": 8}, "those of the last rows too"
