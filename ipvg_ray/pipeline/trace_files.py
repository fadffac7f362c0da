"""Spans in files: one OTLP request in JSON a line, below `<run>/traces/`.

https://opentelemetry.io/docs/specs/otel/protocol/file-exporter/ and, of the JSON,
https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding: ids as hexadecimal, 64-bit numbers as texts.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind

from ipvg_ray.pipeline.store import Store
from ipvg_ray.secrets import redact
from ipvg_ray.storage import StorageError

FOLDER = "traces"
_log = logging.getLogger(__name__)


class ByBatch(SpanProcessor):
    """Keeps spans until it is told to write them: a batch's go together, before its worker can be ended.

    Args:
        exporter: what writes them.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self.exporter = exporter
        self.lock = threading.Lock()
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        """Keep a span, where its row's traces are sampled."""
        if span.context is not None and span.context.trace_flags.sampled:
            with self.lock:
                self.spans.append(span)

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Write what is kept."""
        with self.lock:
            spans, self.spans = self.spans, []
        return not spans or self.exporter.export(spans) is SpanExportResult.SUCCESS


class FileExporter(SpanExporter):
    """Appends to a file of this process where the run lies on disk; in S3 each batch's spans are an object.

    Args:
        store: the run.
        stage: part of the file's name.
    """

    def __init__(self, store: Store, stage: str) -> None:
        self.store = store
        self.folder = store.run_dir / FOLDER
        self.name = f"{store.session}-{stage}-{os.uname().nodename}-{os.getpid()}"

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Write spans of one process; where that cannot be done they are lost, and the rows go on."""
        line = redact(json.dumps(request(spans), ensure_ascii=False, separators=(",", ":"))) + "\n"
        try:
            self._write(line.encode("utf-8", "replace"))
        except (OSError, StorageError) as error:
            _log.warning("cannot write traces to %s: %s", self.folder, error)
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def _write(self, line: bytes) -> None:
        if isinstance(self.folder, Path):
            self.folder.mkdir(exist_ok=True)
            with (self.folder / f"{self.name}.jsonl").open("ab") as file:
                file.write(line)
        else:
            self.store.publish_bytes(self.folder / f"{self.name}-{uuid.uuid4().hex[:8]}.jsonl", line)


def request(spans: Sequence[ReadableSpan]) -> dict[str, Any]:
    """An ExportTraceServiceRequest as JSON values, of spans that share resource and scope."""
    resource, scope = spans[0].resource, spans[0].instrumentation_scope
    named = {"name": scope.name, "version": scope.version} if scope else {}
    return {
        "resourceSpans": [
            {
                "resource": {"attributes": _attributes(resource.attributes)},
                "scopeSpans": [{"scope": named, "spans": [_span(span) for span in spans]}],
            }
        ]
    }


def _span(span: ReadableSpan) -> dict[str, Any]:
    assert span.context is not None  # a span that has ended has one
    value: dict[str, Any] = {
        **_ids(span.context),
        "name": span.name,
        "kind": SpanKind.INTERNAL.value + 1,  # OTLP counts from 1, the API from 0
        "startTimeUnixNano": str(span.start_time),
        "endTimeUnixNano": str(span.end_time),
        "attributes": _attributes(span.attributes),
        "links": [_ids(link.context) for link in span.links],
        "status": {"code": span.status.status_code.value, "message": span.status.description or ""},
    }
    if span.parent is not None:
        value["parentSpanId"] = f"{span.parent.span_id:016x}"
    return value


def _ids(context: Any) -> dict[str, str]:
    return {"traceId": f"{context.trace_id:032x}", "spanId": f"{context.span_id:016x}"}


def _attributes(values: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in (values or {}).items()]


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return {"arrayValue": {"values": [_value(one) for one in value]}}
    return {"stringValue": str(value)}
