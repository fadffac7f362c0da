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
    with parquet(tickets.path) as opened:
        for chunk in range(start // CHUNK, -(-stop // CHUNK)):
            first = chunk * CHUNK
            low, high = max(start, first), min(stop, first + CHUNK)
            chosen = opened.read_row_group(chunk).slice(low - first, high - low)
            indexes = _indexes(_sidecar(tickets.path, chunk))
            for offset in range(0, chosen.num_rows, block):
                if stopping():
                    return
                yield _rebuild(tickets, chosen.slice(offset, block), indexes)


def _indexes(sidecar: RunPath) -> dict[str, Index]:
    nothing = pa.array([], pa.string())
    return {
        name: Index([run_path(f) for f in place["files"]], np.asarray(place["starts"], np.int64), nothing)
        for name, place in json.loads(sidecar.read_text()).items()
    }


def _rebuild(tickets: TicketFile, chosen: pa.Table, indexes: dict[str, Index]) -> pa.Table:
    wanted: dict[str, list[str]] = {"identities": ["identity_id"]}
    by_sample = SAMPLES not in tickets.arriving.names
    if by_sample:
        wanted["samples"] = ["sample_id", "prompt_id"]
    for table, column in tickets.columns:
        wanted.setdefault(table, []).append(column)
    values: dict[str, pa.ChunkedArray | pa.Array] = {ATTEMPT: chosen[ATTEMPT]}
    values[QUEUED] = pa.array([time.time()] * chosen.num_rows, pa.float64())
    for table, columns in wanted.items():
        read = gather(indexes[table], chosen[table].to_numpy(), columns)
        values |= {column: read[column] for column in columns}
    if not by_sample:
        values[SAMPLES] = _sample_lists(indexes["samples"], chosen["samples"].to_numpy(), chosen[COUNT].to_numpy())
    return pa.table([values[field.name] for field in tickets.arriving], names=tickets.arriving.names).cast(
        tickets.arriving
    )


def _sample_lists(index: Index, first: np.ndarray, count: np.ndarray) -> pa.Array:
    """Each identity's samples as a list of structs; they stand together in the samples table."""
    fields = samples_type().value_type
    rows = np.concatenate([np.arange(f, f + c) for f, c in zip(first, count, strict=True)])
    read = gather(index, rows, [field.name for field in fields]).combine_chunks()
    structs = pa.StructArray.from_arrays([read[f.name].combine_chunks() for f in fields], fields=list(fields))
    offsets = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), structs)


def gather(index: Index, rows: np.ndarray, columns: list[str]) -> pa.Table:
    """The given rows of a table, in the given order, reading only the files and row groups that hold them."""
    file_of = np.searchsorted(index.starts, rows, side="right") - 1
    order = np.argsort(file_of, kind="stable")
    pieces = []
    for number in np.unique(file_of):
        inside = rows[order][file_of[order] == number] - index.starts[number]
        pieces.append(_take(index.files[number], inside, columns))
    back = np.empty(len(rows), np.int64)
    back[order] = np.arange(len(rows))
    return pa.concat_tables(pieces).take(pa.array(back))


def _take(file: RunPath, rows: np.ndarray, columns: list[str]) -> pa.Table:
    with parquet(file) as opened:
        sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        group_of = np.searchsorted(starts, rows, side="right") - 1
        groups = np.unique(group_of)
        shift = {g: s - starts[g] for g, s in zip(groups, np.cumsum([0, *(sizes[g] for g in groups)]), strict=False)}
        table = opened.read_row_groups([int(g) for g in groups], columns=columns)
        places = rows + np.array([shift[g] for g in group_of], np.int64)
        return table.select(columns).take(pa.array(places))
