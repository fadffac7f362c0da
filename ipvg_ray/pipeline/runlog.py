"""What happens in a start of a run, for machines: one JSON object a line, beside what people see.

Every line has `t` (ISO 8601, UTC) and `event`: `start`, `progress` (every 15 s, rows by stage), `note` (what was said
to the user, such as lost nodes) and `end`. The file is `_engine/<session>/log.jsonl`; of a run in S3 it is written on
the driver's machine and put there at the end.
"""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ipvg_ray.pipeline.deaths import trace_folder
from ipvg_ray.pipeline.progress import LOG_EVERY, Progress
from ipvg_ray.secrets import redact
from ipvg_ray.storage import RunPath


class RunLog:
    """The log of one start.

    Args:
        session_dir: of the session that the start begins with.
    """

    def __init__(self, session_dir: RunPath) -> None:
        self.place = session_dir / "log.jsonl"
        self.file = trace_folder(session_dir).with_name("log.jsonl")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.due = time.monotonic() + LOG_EVERY

    def note(self, event: str, **values: Any) -> None:
        """Write one line."""
        line = {"t": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **values}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(redact(json.dumps(line, ensure_ascii=False, default=str)) + "\n")

    def tick(self, seen: Progress) -> None:
        """Call often; writes a line when one is due."""
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + LOG_EVERY
            self.note("progress", stages=progress_of(seen))

    def close(self) -> None:
        """Put the file where the run lies, if that is not where it was written."""
        if not isinstance(self.place, Path) and self.file.is_file():
            self.place.write_bytes(self.file.read_bytes())


def progress_of(seen: Progress) -> dict[str, dict[str, Any]]:
    """Rows of each stage: total, finished, running, waiting, failed, and rows a second over the last minute; and the
    longest that a node was up before its first row of the stage began."""
    now = time.monotonic()
    return {
        name: {
            "total": stage.counts.total,
            "done": stage.finished,
            "running": stage.running,
            "waiting": stage.waiting,
            "failed": stage.all_failed,
            "rows_per_second": round(stage.rate(now), 4),
            "first_row_seconds": round(stage.first_row, 1),
        }
        for name, stage in seen.stages.items()
    }
