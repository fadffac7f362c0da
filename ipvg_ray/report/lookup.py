"""Rows of a run's tables by key, without reading what is not shown.

A table of a million rows carries a million pictures. Its keys (and a few narrow columns) are read whole, as Arrow
columns; wide columns only from the row groups that hold a wanted row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ipvg_ray import tables
from ipvg_ray.storage import RunPath, parquet

_BATCH = 64  # rows decoded at a time: a row group of pictures never stands in memory whole
_BUFFER = 1 << 20  # without a buffer Arrow reads a whole column chunk at once
_THREADS = 8  # part files are small, so opening them dominates


@dataclass(frozen=True)
class Lookup:
    """One table of a run.

    Attributes:
        files: its part files.
        starts: number of the first row of each file, and at the end of all rows; int64, (files + 1,).
        narrow: the columns read whole, all rows in the order of the files; a column the files lack is left out.
    """

    files: tuple[RunPath, ...]
    starts: np.ndarray
    narrow: pa.Table

    @classmethod
    def open(cls, run_dir: RunPath, table: str, columns: Sequence[str]) -> Lookup:
        """Read `columns` of all rows of a table; a table that has not been begun has no rows."""
        files, pieces = tables.read_parts(run_dir, table, lambda file: _read_narrow(file, columns), _THREADS)
        starts = np.cumsum([0, *(len(piece) for piece in pieces)], dtype=np.int64)
        narrow = pa.concat_tables(pieces, promote_options="default") if pieces else pa.table({})
        return cls(tuple(files), starts, narrow)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def column(self, name: str) -> pa.ChunkedArray:
        """A narrow column; all null where the files lack it."""
        if name in self.narrow.column_names:
            return self.narrow[name]
        return pa.chunked_array([pa.nulls(len(self), pa.string())])

    def rows(self, key: str, wanted: Sequence[str], columns: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The first row of each wanted key that the table holds, by key.

        Args:
            key: a narrow column.
            columns: what to read of each row; columns that a file lacks are left out of its rows.
        """
        if not len(self) or not wanted:
            return {}
        keys = list(wanted)
        hits = pc.index_in(self.column(key), value_set=pa.array(keys, pa.string()))
        places = np.flatnonzero(hits.is_valid().to_numpy(zero_copy_only=False))
        ranks = hits.drop_null().to_numpy(zero_copy_only=False)
        found, first = np.unique(ranks, return_index=True)
        rows = self.take(places[first], columns)
        return {keys[rank]: row for rank, row in zip(found, rows, strict=True)}

    def take(self, places: np.ndarray | Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """The rows of these numbers, in the order asked for, as dictionaries of `columns`."""
        places = np.asarray(places, dtype=np.int64)
        result: dict[int, dict[str, Any]] = {}
        owner = np.searchsorted(self.starts, places, side="right") - 1
        for number in np.unique(owner):
            start = int(self.starts[number])
            local = np.unique(places[owner == number] - start)
            for place, row in zip(local, _read_rows(self.files[number], local, columns), strict=True):
                result[start + int(place)] = row
        return [result[int(place)] for place in places]


def _present(file: pq.ParquetFile, columns: Sequence[str]) -> list[str]:
    return [column for column in columns if column in file.schema_arrow.names]


def _read_narrow(path: RunPath, columns: Sequence[str]) -> pa.Table:
    with parquet(path) as file:
        table = file.read(columns=_present(file, columns), use_threads=False)
        return table.replace_schema_metadata(None)


def _read_rows(path: RunPath, places: np.ndarray, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of one file; `places` ascend and do not repeat."""
    rows: list[dict[str, Any]] = []
    with parquet(path, buffer_size=_BUFFER) as file:
        present = _present(file, columns)
        start = 0
        for group in range(file.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            inside = places[(places >= start) & (places < stop)] - start
            if len(inside):
                rows += _read_group(file, group, inside, present)
            start = stop
    return rows


def _read_group(file: pq.ParquetFile, group: int, places: np.ndarray, columns: list[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    start = 0
    for batch in file.iter_batches(batch_size=_BATCH, row_groups=[group], columns=columns, use_threads=False):
        inside = places[(places >= start) & (places < start + len(batch))] - start
        rows += batch.take(pa.array(inside)).to_pylist()
        start += len(batch)
        if len(rows) == len(places):
            break
    return rows
