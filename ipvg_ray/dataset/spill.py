"""The rows of an identity set on local disk, so that memory holds only their keys.

Disk needed: the prompts once, and pictures that came as bytes once per batch of rows that repeats them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ipvg_ray.dataset.rows import RAW

_ROWS = 16384
_BYTES = 64 << 20


class Spill:
    """Rows of schema `RAW` in an Arrow file that is mapped into memory, not read.

    Attributes:
        batches: the file's record batches, without copies.
        starts: int64 (batches + 1,), number of the first row of each batch, then of all rows.
    """

    def __init__(self, file: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        self.batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self.starts = np.cumsum([0, *(len(b) for b in self.batches)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @classmethod
    def write(cls, file: Path, batches: Iterable[pa.RecordBatch]) -> Spill:
        """Write batches to `file`, joined to a sensible size."""
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, RAW) as writer:
            for batch in _joined(batches):
                writer.write_batch(_once(batch))
        return cls(file)

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of all rows, still in the file."""
        return pa.chunked_array([batch.column(name) for batch in self.batches], RAW.field(name).type)

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """The given rows in the given order; int64 (n,) to n rows."""
        batch_of = np.searchsorted(self.starts, rows, side="right") - 1
        order = np.argsort(batch_of, kind="stable")
        pieces = [self.batches[0].select(columns).slice(0, 0)] if self.batches else []
        for number in np.unique(batch_of):
            inside = rows[order][batch_of[order] == number] - self.starts[number]
            pieces.append(self.batches[number].select(columns).take(pa.array(inside)))
        table = pa.Table.from_batches(pieces, pa.schema([RAW.field(name) for name in columns])).combine_chunks()
        back = np.empty(len(rows), np.int64)
        back[order] = np.arange(len(rows))
        return table if np.array_equal(back, np.arange(len(rows))) else table.take(pa.array(back))

    def picture(self, row: int, number: int = 0) -> bytes:
        """The bytes that a row carries of one of its pictures; 0 is the identity's first."""
        batch = int(np.searchsorted(self.starts, row, side="right")) - 1
        columns, place = self.batches[batch], row - int(self.starts[batch])
        cell = columns.column("more_bytes")[place][number - 1] if number else columns.column("image_bytes")[place]
        value: bytes = cell.as_py()
        return value


def _joined(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    held: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        held.append(batch)
        rows, size = rows + len(batch), size + batch.nbytes
        if rows >= _ROWS or size >= _BYTES:
            yield pa.concat_batches(held)
            held, rows, size = [], 0, 0
    if rows:
        yield pa.concat_batches(held)


def _once(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with pictures' bytes only in the first row of each identity that has that picture."""
    carried = [name for name in ("image_bytes", "more_bytes") if batch.column(name).null_count < len(batch)]
    if not carried:
        return batch
    keys = pc.binary_join_element_wise(batch.column("identity_id"), batch.column("image"), "\0")
    codes = pc.fill_null(keys, "").dictionary_encode().indices.to_numpy()
    first = np.zeros(len(batch), bool)
    first[np.unique(codes, return_index=True)[1]] = True
    for name in carried:
        kept = pc.if_else(pa.array(first), batch.column(name), pa.scalar(None, RAW.field(name).type))
        batch = batch.set_column(batch.schema.get_field_index(name), RAW.field(name), kept)
    return batch
