"""Write a table as Parquet part files of bounded size."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_PART_ROWS = 200_000
_PART_BYTES = 512 << 20


class Parts:
    """`part-00000.parquet`, `part-00001.parquet`, … below a folder; use as a context.

    Args:
        folder: made at once.
        schema: of the files, as `ipvg_ray.tables.stored_schema` gives it.
        group_rows, group_bytes: a row group is closed at whichever comes first; readers read whole row groups.

    Attributes:
        rows: how many rows were added.
    """

    def __init__(self, folder: Path, schema: pa.Schema, *, group_rows: int, group_bytes: int) -> None:
        folder.mkdir(parents=True)
        self.rows = 0
        self._folder, self._schema = folder, schema
        self._group_rows, self._group_bytes = group_rows, group_bytes
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0
        self._held: list[pa.Table] = []
        self._held_rows = self._held_bytes = 0
        self._writer: pq.ParquetWriter | None = None
        self._parts = self._part_rows = self._part_bytes = 0

    def __enter__(self) -> Parts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._settle()
        self._write_group()
        self._close()

    def add_row(self, row: dict[str, Any]) -> None:
        """Append one row; only its pictures' bytes count for the size of the row group."""
        self._pending.append(row)
        pictures = [row.get("image"), *(row.get("more_images") or ())]
        self._pending_bytes += sum(len((one or {}).get("bytes") or b"") for one in pictures)
        if len(self._pending) >= self._group_rows or self._pending_bytes >= self._group_bytes:
            self._settle()

    def add_table(self, table: pa.Table) -> None:
        """Append rows."""
        for start in range(0, len(table), self._group_rows):
            piece = table.slice(start, self._group_rows)
            self.rows += len(piece)
            self._held.append(piece)
            self._held_rows += len(piece)
            self._held_bytes += piece.nbytes
            if self._held_rows >= self._group_rows or self._held_bytes >= self._group_bytes:
                self._write_group()

    def _settle(self) -> None:
        if self._pending:
            self.add_table(pa.Table.from_pylist(self._pending, schema=self._schema))
            self._pending, self._pending_bytes = [], 0

    def _write_group(self) -> None:
        if not self._held:
            return
        if self._writer is None:
            place = self._folder / f"part-{self._parts:05d}.parquet"
            self._writer = pq.ParquetWriter(place, self._schema, compression="zstd", use_dictionary=False)
            self._parts += 1
        table = pa.concat_tables(self._held)
        self._writer.write_table(table, row_group_size=len(table))
        self._part_rows, self._part_bytes = self._part_rows + len(table), self._part_bytes + self._held_bytes
        self._held, self._held_rows, self._held_bytes = [], 0, 0
        if self._part_rows >= _PART_ROWS or self._part_bytes >= _PART_BYTES:
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._part_rows, self._part_bytes = None, 0, 0
