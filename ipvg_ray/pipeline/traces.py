"""OpenTelemetry traces of a row's way: a trace for each identity and each sample, a span for each try at a stage.

Off unless `traces` is set in the configuration. Ids of traces are made from the run's id and the row's key, so a run
that is resumed goes on with the same traces; the span of the try that finished a row at a stage has an id made the same
way, so that the next stage's spans can name it as their parent whichever process, or start of the run, they come from.
A sample's first span links to the span that finished its identity.

Spans go where OTEL_EXPORTER_OTLP_ENDPOINT (or the variable for traces alone) says, else into `<run>/traces/`, one OTLP
request in JSON a line, as the OpenTelemetry collector's `otlpjsonfile` receiver reads it. The variables of the
OpenTelemetry specification hold: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pyarrow as pa
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from ipvg_ray import __version__
from ipvg_ray.errors import UserError
from ipvg_ray.pipeline.ledger import Who
from ipvg_ray.pipeline.plan import ATTEMPT, QUEUED, Step
from ipvg_ray.pipeline.store import Store
from ipvg_ray.pipeline.trace_files import ByBatch, FileExporter

_LINGER_S = 2.0
_DELAY_MS = 500
"""Between two sendings, unless OTEL_BSP_SCHEDULE_DELAY says otherwise: workers may end soon after their last row."""
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_EXPORTERS = {
    "http/protobuf": ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "ipvg-ray[traces]"),
    "grpc": ("opentelemetry.exporter.otlp.proto.grpc.trace_exporter", "opentelemetry-exporter-otlp-proto-grpc"),
}
"""By protocol, the module that sends spans, and what to install for it."""


class TracesError(UserError):
    """Traces that are wanted and cannot be sent."""


@dataclass(frozen=True)
class Traces:
    """What a stage's workers need to trace their rows.

    Attributes:
        run: the run's id, from which those of its traces are made.
        before: the stage in front whose spans are the parents of this one's; None at the first of its grain.
        identity: the stage that finishes a sample's identity; only at the first stage of samples.
        environment: the driver's variables of OpenTelemetry, which workers on other nodes do not inherit. They may hold
            secrets, so they travel in memory only.
    """

    run: str
    before: str | None = None
    identity: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


def traces_of(steps: Sequence[Step], run: str) -> dict[str, Traces]:
    """How each step's rows are traced, by this process's environment.

    Raises:
        TracesError: where spans are to be sent, and what sends them is not installed or not known.
    """
    environment = {name: value for name, value in os.environ.items() if name.startswith("OTEL_")}
    if endpoint(environment):
        _exporter_module(environment)
    found = {}
    for front, step in zip([None, *steps], steps, strict=False):
        same = front is not None and front.stage.grain == step.stage.grain
        name = front.name if front is not None else None
        found[step.name] = Traces(run, name if same else None, None if same else name, environment)
    return found


def endpoint(environment: Mapping[str, str]) -> str | None:
    """Where spans are to be sent; None for the run's own folder."""
    return next((environment[name] for name in _ENDPOINTS if environment.get(name)), None)


def trace_id(run: str, key: str) -> int:
    """The id of a row's trace: 128 bits, never 0."""
    return _hashed(16, run, key)


def finished_id(run: str, key: str, stage: str) -> int:
    """The id of the span that finished a row at a stage: 64 bits, never 0."""
    return _hashed(8, run, key, stage)


def _hashed(size: int, *parts: str) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=size).digest(), "big") or 1


def linger() -> None:
    """Wait until workers have sent their last spans, where they send them: with Ray they end at once."""
    if endpoint(os.environ):
        time.sleep(_LINGER_S)


class Tracer:
    """Makes the spans of one worker. Several threads may use it at once.

    Args:
        traces: see `traces_of`.
        step: the stage, for its name and key.
        store: the run, into whose folder spans go where no endpoint is named.
        who: this process.
        gpus: ids of the cards that Ray gave it.
        exporter: where spans go; by the environment unless a test brings its own.

    Raises:
        TracesError: as `traces_of`.
    """

    def __init__(
        self,
        traces: Traces,
        step: Step,
        store: Store,
        who: Who,
        gpus: Sequence[str] = (),
        exporter: SpanExporter | None = None,
    ) -> None:
        self.traces, self.step, self.who = traces, step, who
        for name, value in traces.environment.items():
            os.environ.setdefault(name, value)
        self.ids = _Ids()
        self.provider = _provider(store, step.name, self.ids, exporter)
        self.tracer = self.provider.get_tracer("ipvg_ray", __version__)
        self.common = {"ipvg.stage": step.name, "ipvg.gpus": list(gpus)}

    def ended(
        self, batch: pa.Table, failures: Sequence[Mapping[str, Any]], begun: float, waited: bool, apart: bool = False
    ) -> None:
        """A try has ended: one span a row of the batch.

        Args:
            batch: as it arrived.
            failures: its rows of the failures table.
            begun: when, seconds since 1970.
            waited: whether the rows came off the stage's queue just now; else they had been tried before.
            apart: whether the batch raised as a whole, so that its rows are tried alone next.
        """
        now, failed = time.time(), {failure[self.step.key]: failure for failure in failures}
        work = round((now - begun) / max(1, batch.num_rows), 6)
        for row in self._rows(batch):
            failure = failed.get(row[self.step.key])
            outcome = "retried_alone" if apart else "failed" if failure else "finished"
            told = {"ipvg.outcome": outcome, "ipvg.batch_rows": batch.num_rows, "ipvg.work_seconds": work}
            if waited and row[QUEUED]:
                told["ipvg.queue_seconds"] = round(max(0.0, begun - row[QUEUED]), 6)
            if failure:
                told["error.type"] = failure["kind"]
            self._span(row, self.who, (begun, now), told, failure["message"] if failure else "")
        self._written()

    def died(self, batch: pa.Table, who: Who) -> None:
        """An earlier try has ended with its process, which could not tell: its spans end when that was found out."""
        now, kind = time.time(), "worker_died"
        told = {"ipvg.outcome": kind, "error.type": kind, "ipvg.batch_rows": batch.num_rows}
        for row in self._rows(batch):
            self._span(row, who, (who.began or now, now), told, "")
        self._written()

    def _rows(self, batch: pa.Table) -> list[dict[str, Any]]:
        wanted = ("identity_id", "sample_id", ATTEMPT, QUEUED)
        rows: list[dict[str, Any]] = batch.select([n for n in wanted if n in batch.column_names]).to_pylist()
        return rows

    def _span(
        self, row: Mapping[str, Any], who: Who, times: tuple[float, float], told: Mapping[str, Any], words: str
    ) -> None:
        """One row's span: the process that tried it, begin and end, what came of it, and a failure's message."""
        key, run, name = row[self.step.key], self.traces.run, self.step.name
        attributes = {**self.common, "ipvg.row": key, "ipvg.identity": row["identity_id"], "ipvg.attempt": row[ATTEMPT]}
        attributes |= {"ipvg.worker": who.worker, "ipvg.process": who.process, "ipvg.node": who.node}
        attributes |= {"host.name": who.host, **told}
        links = [Link(self._place(row["identity_id"], self.traces.identity))] if self.traces.identity else []
        self.ids.give(trace_id(run, key), finished_id(run, key, name) if told["ipvg.outcome"] == "finished" else None)
        made = self.tracer.start_span(
            name, self._parent(key), attributes=attributes, links=links, start_time=_ns(times[0])
        )
        if "error.type" in told:
            made.set_status(Status(StatusCode.ERROR, words))
        made.end(_ns(times[1]))

    def _parent(self, key: str) -> Context:
        if self.traces.before is None:
            return Context()
        return set_span_in_context(NonRecordingSpan(self._place(key, self.traces.before)), Context())

    def _place(self, key: str, stage: str) -> SpanContext:
        """The span that finished a row at a stage, sampled or not as the environment says of a row with that key."""
        trace = trace_id(self.traces.run, key)
        sampled = self.provider.sampler.should_sample(None, trace, stage).decision.is_sampled()
        flags = TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)
        return SpanContext(trace, finished_id(self.traces.run, key, stage), is_remote=True, trace_flags=flags)

    def _written(self) -> None:
        """What goes to files goes there with its batch; what is sent must not hold up the rows."""
        if endpoint(os.environ) is None:
            self.provider.force_flush()


class _Ids(RandomIdGenerator):
    """Gives the next span of a thread the ids that were made for it; the SDK draws those that were not."""

    def __init__(self) -> None:
        self.next = threading.local()

    def give(self, trace: int, span: int | None) -> None:
        """Say which ids the next span of this thread gets; None for one that is drawn."""
        self.next.trace, self.next.span = trace, span

    def generate_trace_id(self) -> int:
        return int(self.next.trace)

    def generate_span_id(self) -> int:
        return int(self.next.span or super().generate_span_id())


def _provider(store: Store, stage: str, ids: _Ids, exporter: SpanExporter | None) -> TracerProvider:
    named = {"ipvg.run": str(store.run_dir), "ipvg.session": store.session, "service.version": __version__}
    if "OTEL_SERVICE_NAME" not in os.environ and "service.name=" not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        named["service.name"] = "ipvg-ray"
    provider = TracerProvider(resource=Resource.create(named), id_generator=ids)
    if exporter is None and endpoint(os.environ):
        delay = None if "OTEL_BSP_SCHEDULE_DELAY" in os.environ else _DELAY_MS
        sender = _exporter_module(os.environ).OTLPSpanExporter()
        provider.add_span_processor(BatchSpanProcessor(sender, schedule_delay_millis=delay))
    else:
        provider.add_span_processor(ByBatch(exporter or FileExporter(store, stage)))
    return provider


def _exporter_module(environment: Mapping[str, str]) -> Any:
    """What sends spans by the protocol that the environment names. Raises TracesError."""
    protocol = next((environment[name] for name in _PROTOCOLS if environment.get(name)), "http/protobuf")
    if protocol not in _EXPORTERS:
        raise TracesError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}; it may be {' or '.join(_EXPORTERS)}")
    module, package = _EXPORTERS[protocol]
    try:
        return import_module(module)
    except ImportError as error:
        raise TracesError(
            f"traces are to be sent to the endpoint that OTEL_EXPORTER_OTLP_ENDPOINT names, and {error.name} is not "
            f"installed; install {package} on the driver's machine and all nodes, or unset the variable and find the "
            "traces in the run's folder traces/"
        ) from error


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
