"""What is refused while an identity set is read, kept by name and place; written as rows of the failures table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ipvg_ray import tables
from ipvg_ray.errors import UserError

SHOWN = 20
"""Problems kept in memory for printing; all of them are in the failures table."""
_BUFFER = 4096


class DatasetError(UserError):
    """An identity set that cannot be used at all; the message says what was looked for."""


@dataclass(frozen=True)
class Problem:
    """One thing that was refused.

    Attributes:
        kind: a short fixed word, such as `broken_image`.
        message: what is wrong, and what mends it.
        where: file and line or row of the input.
        identity_id: whose; empty where the row did not say.
        sample_id: `identity_id/prompt_id`, or None where the whole identity, or a row without a sample, is meant.
    """

    kind: str
    message: str
    where: str | None = None
    identity_id: str = ""
    sample_id: str | None = None

    def __str__(self) -> str:
        who = self.sample_id or self.identity_id
        return ": ".join(part for part in (self.where, who, self.kind, self.message) if part)


def storable(text: str) -> str:
    """`text` as UTF-8 can hold it: bytes that were not UTF-8 become `\\udcXX`."""
    return text.encode("utf-8", "backslashreplace").decode()


def shown_id(text: str) -> str:
    """A refused id as a terminal can bear it: control characters escaped, at most 100 characters."""
    safe = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return safe if len(safe) <= 100 else safe[:99] + "…"


class Problems:
    """Collects problems: counts them, keeps the first few, and writes all of them to part files.

    Use as a context; the files are whole when it ends. Not for several threads.

    Args:
        folder: where `part-dataset-00000.parquet` goes; made when the first problem comes.
    """

    def __init__(self, folder: Path) -> None:
        self.kinds: Counter[str] = Counter()
        self.first: list[Problem] = []
        self._folder = folder
        self._rows: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Problems:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()

    @property
    def total(self) -> int:
        return self.kinds.total()

    def add(self, problem: Problem) -> None:
        """Keep a problem."""
        self.kinds[problem.kind] += 1
        if len(self.first) < SHOWN:
            self.first.append(problem)
        self._rows.append(
            {
                "stage": "dataset",
                "identity_id": storable(problem.identity_id),
                "sample_id": None if problem.sample_id is None else storable(problem.sample_id),
                "kind": problem.kind,
                "message": storable(problem.message),
                "traceback": None,
                "where": None if problem.where is None else storable(problem.where),
                "attempt": 1,
                "failed_at": datetime.now(UTC),
            }
        )
        if len(self._rows) >= _BUFFER:
            self._flush()

    def listing(self) -> str:
        """The first problems, one a line, and how many more there are."""
        lines = [f"  {problem}" for problem in self.first]
        if self.total > len(lines):
            lines.append(f"  … and {self.total - len(lines)} more")
        return "\n".join(lines)

    def _flush(self) -> None:
        if not self._rows:
            return
        schema = tables.stored_schema("failures")
        if self._writer is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._folder / "part-dataset-00000.parquet", schema, compression="zstd")
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=schema))
        self._rows.clear()
