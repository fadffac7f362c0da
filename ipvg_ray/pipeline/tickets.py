"""Tickets: which rows enter at a stage, and where each of their columns lies in the part files.

A session writes its tickets to Parquet; readers on the cluster take a range of them and rebuild the rows, reading only
the columns that the stage and its successors need. So the driver never holds a picture, and a resumed run reads each
finished row from its checkpoint instead of computing it again.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ipvg_ray.pipeline.plan import ATTEMPT, QUEUED, SAMPLES, Step, carried, samples_type
from ipvg_ray.pipeline.survey import Index, Survey
from ipvg_ray.storage import RunPath, parquet, run_path

COUNT = "_count"
"""Tickets of identities: how many samples stand from the row in column `samples` on."""
CHUNK = 1024
"""Tickets per row group of the file; each chunk has a list of its own of the part files that it refers to."""
_KEPT_BYTES = 64 << 20
"""What was read last of a table is kept if it is no more than this, as the next rows are often among it."""


@dataclass(frozen=True)
class TicketFile:
    """The tickets of one stage.

    Attributes:
        path: Parquet file; beside it, `<name>-<chunk>.json`, the part files that a chunk's row numbers refer to.
        rows: number of tickets.
        arriving: schema of the rows to rebuild.
        columns: (table, column) of what is to be read.
    """

    path: RunPath
    rows: int
    arriving: pa.Schema
    columns: tuple[tuple[str, str], ...]


def write_tickets(folder: RunPath, steps: Sequence[Step], index: int, found: Survey) -> TicketFile:
    """Write the tickets of the rows that enter at `steps[index]` into a folder that the readers can see."""
    step = steps[index]
    rows = found.entry[step.name]
    stages = [s.stage for s in steps]
    columns = tuple(c for c in carried(stages, index) if step.stage.grain == "sample" or c[0] != "samples")
    grains = {s.name: s.stage.grain for s in steps} | {"identities": "identity", "samples": "sample"}
    identity = rows if step.stage.grain == "identity" else found.owner[rows]
    tickets: dict[str, np.ndarray] = {"identities": identity, ATTEMPT: found.states[step.name].attempts[rows] + 1}
    if step.stage.grain == "identity":
        tickets |= {"samples": found.first[rows], COUNT: found.first[rows + 1] - found.first[rows]}
    else:
        tickets["samples"] = rows
    for name in {source for source, _ in columns} - {"identities", "samples"}:
        tickets[name] = found.states[name].at[identity if grains[name] == "identity" else rows]
    path = folder / f"{step.name}.parquet"
    buffer = io.BytesIO()
    pq.write_table(pa.table(tickets), buffer, row_group_size=CHUNK)
    path.write_bytes(buffer.getvalue())
    indexes = {"identities": found.identities, "samples": found.samples, **found.indexes}
    for chunk, start in enumerate(range(0, len(rows), CHUNK)):
        part = {name: numbers[start : start + CHUNK] for name, numbers in tickets.items()}
        used = {name: _places(indexes[name], part, name) for name in part if name in indexes}
        _sidecar(path, chunk).write_text(json.dumps(used))
    return TicketFile(path, len(rows), step.arriving, columns)


def _sidecar(path: RunPath, chunk: int) -> RunPath:
    return path.with_name(f"{path.stem}-{chunk}.json")


def _places(index: Index, part: dict[str, np.ndarray], name: str) -> dict[str, list[Any]]:
    """The part files of a table that a chunk of tickets refers to, and the number of each one's first row."""
    first = part[name]
    last = first + np.maximum(part[COUNT], 1) - 1 if name == "samples" and COUNT in part else first
    low, high = (np.searchsorted(index.starts, rows, side="right") - 1 for rows in (first, last))
    files = np.unique(np.concatenate([np.arange(a, b + 1) for a, b in zip(low, high, strict=True)]))
    return {"files": [str(index.files[f]) for f in files], "starts": index.starts[files].tolist()}


def read_rows(
    tickets: TicketFile, start: int, stop: int, block: int, stopping: Callable[[], bool] = lambda: False
) -> Iterator[pa.Table]:
    """Rebuild the rows of tickets `start` to `stop`, in tables of at most `block` rows of schema `tickets.arriving`.

    Ends early once `stopping` says so.
    """
    chunks = range(start // CHUNK, -(-stop // CHUNK))
    with parquet(tickets.path) as opened:
        chosen = opened.read_row_groups(list(chunks)).slice(start - chunks.start * CHUNK, stop - start)
    sources = _sources(tickets, chunks)
    for offset in range(0, chosen.num_rows, block):
        if stopping():
            return
        yield _rebuild(tickets, chosen.slice(offset, block), sources)


def _sources(tickets: TicketFile, chunks: range) -> dict[str, _Source]:
    """What the tickets of some chunks refer to, by table."""
    wanted: dict[str, list[str]] = {"identities": ["identity_id"]}
    wanted["samples"] = ["sample_id", "prompt_id"]
    if SAMPLES in tickets.arriving.names:
        wanted["samples"] = [field.name for field in samples_type().value_type]
    for table, column in tickets.columns:
        wanted.setdefault(table, []).append(column)
    files: dict[str, dict[int, RunPath]] = {table: {} for table in wanted}
    for chunk in chunks:
        for table, place in json.loads(_sidecar(tickets.path, chunk).read_text()).items():
            files[table] |= {first: run_path(file) for first, file in zip(place["starts"], place["files"], strict=True)}
    return {table: _Source(dict(sorted(places.items())), wanted[table]) for table, places in files.items()}


def _rebuild(tickets: TicketFile, chosen: pa.Table, sources: dict[str, _Source]) -> pa.Table:
    values: dict[str, pa.ChunkedArray | pa.Array] = {ATTEMPT: chosen[ATTEMPT]}
    values[QUEUED] = pa.repeat(time.time(), chosen.num_rows)
    in_lists = SAMPLES in tickets.arriving.names
    for table, source in sources.items():
        rows = chosen[table].to_numpy()
        if table == "samples" and in_lists:
            values[SAMPLES] = _sample_lists(source, rows, chosen[COUNT].to_numpy())
        else:
            read = source.take(rows)
            values |= {column: read[column] for column in source.columns}
    return pa.table([values[field.name] for field in tickets.arriving], names=tickets.arriving.names).cast(
        tickets.arriving
    )


def _sample_lists(source: _Source, first: np.ndarray, count: np.ndarray) -> pa.Array:
    """Each identity's samples as a list of structs; they stand together in the samples table."""
    fields = samples_type().value_type
    rows = np.concatenate([np.arange(f, f + c) for f, c in zip(first, count, strict=True)])
    read = source.take(rows).combine_chunks()
    structs = pa.StructArray.from_arrays([read[f.name].combine_chunks() for f in fields], fields=list(fields))
    offsets = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), structs)


class _Source:
    """Takes rows of a table from its part files, reading only the row groups that hold them.

    Args:
        files: part files by the number of their first row, in order.
        columns: to be read.
    """

    def __init__(self, files: dict[int, RunPath], columns: list[str]) -> None:
        self.files = list(files.values())
        self.starts = np.array(list(files), np.int64)
        self.columns = columns
        self.kept: _Groups | None = None

    def take(self, rows: np.ndarray) -> pa.Table:
        """The rows of these numbers, in this order."""
        file_of = np.searchsorted(self.starts, rows, side="right") - 1
        numbers = np.unique(file_of)
        if len(numbers) < 2:  # identities without a sample ask for no row
            return self._take(int(numbers[0]) if len(numbers) else 0, rows)
        order = np.argsort(file_of, kind="stable")
        pieces = [self._take(number, rows[order][file_of[order] == number]) for number in numbers]
        back = np.empty(len(rows), np.int64)
        back[order] = np.arange(len(rows))
        return pa.concat_tables(pieces).take(pa.array(back))

    def _take(self, number: int, rows: np.ndarray) -> pa.Table:
        rows = rows - self.starts[number]
        kept, self.kept = self.kept, None  # let go before the next is read, so that there is only one at a time
        if kept is None or kept.number != number or not kept.holds(rows):
            kept = None
            kept = _Groups.read(number, self.files[number], rows, self.columns)
        if kept.table.nbytes <= _KEPT_BYTES:
            self.kept = kept
        return kept.take(rows)


@dataclass(frozen=True)
class _Groups:
    """Some row groups of a part file.

    Attributes:
        number: the file's, among those of its table.
        starts: int64 (row groups of the file + 1,): the number of each one's first row.
        groups: which they are, in order.
        table: their rows.
    """

    number: int
    starts: np.ndarray
    groups: np.ndarray
    table: pa.Table

    @staticmethod
    def read(number: int, file: RunPath, rows: np.ndarray, columns: list[str]) -> _Groups:
        """Those that hold some rows of a file."""
        with parquet(file) as opened:
            sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
            starts = np.concatenate([[0], np.cumsum(sizes)])
            groups = np.unique(np.searchsorted(starts, rows, side="right") - 1)
            table = opened.read_row_groups(groups.tolist(), columns=columns).select(columns)
        return _Groups(number, starts, groups, table)

    def holds(self, rows: np.ndarray) -> bool:
        return bool(np.isin(np.searchsorted(self.starts, rows, side="right") - 1, self.groups).all())

    def take(self, rows: np.ndarray) -> pa.Table:
        """Rows that they hold, by their numbers in the file."""
        first = np.concatenate([[0], np.cumsum(np.diff(self.starts)[self.groups])])  # of each group in the table
        group_of = np.searchsorted(self.starts, rows, side="right") - 1
        places = rows - self.starts[group_of] + first[np.searchsorted(self.groups, group_of)]
        return self.table.take(pa.array(places))
