"""Read the tables of a run directory: Parquet part files below `<run>/<table>/`. No Ray, no models.

Names that begin with a dot or an underscore are the engine's own; pandas, pyarrow and `datasets` skip them too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ipvg_ray import schema
from ipvg_ray.errors import UserError
from ipvg_ray.storage import RunPath, parquet, run_path

T = TypeVar("T")
_PATIENCE = 5
INPUT_TABLES = ("identities", "samples")


class NotARunError(UserError, FileNotFoundError):
    """A folder that is not a run directory."""


def _table(table: str | schema.Table) -> schema.Table:
    return schema.table(table) if isinstance(table, str) else table


def key_columns(table: str | schema.Table) -> tuple[str, ...]:
    """Key columns of a table, and before them the identity's where the rows belong to one."""
    key = _table(table).key
    return ("identity_id", "sample_id") if key == ("sample_id",) else key


def stored_schema(table: str | schema.Table) -> pa.Schema:
    """Schema of a table's part files: keys, the schema's columns, and for stages what the engine adds to each row.

    The engine adds `seed` (the row's own random seed) and `seconds` (of the batch it ran in, divided by its rows).
    """
    table = _table(table)
    fields = [pa.field(key, pa.string()) for key in key_columns(table) if key not in table.columns]
    fields += list(table.columns.values())
    if table.grain != "failure" and table.name not in INPUT_TABLES:
        fields += [pa.field("seed", pa.int64()), pa.field("seconds", pa.float32())]
    return pa.schema(fields)


def parts(run_dir: str | RunPath, name: str) -> list[RunPath]:
    """Part files of a table, sorted by name; empty where the table has not been begun."""
    found = (run_path(run_dir) / name).glob("*.parquet")
    return sorted((p for p in found if not p.name.startswith((".", "_"))), key=lambda p: p.name)


def read_part(file: RunPath, columns: Sequence[str] | None = None) -> pa.Table:
    """One part file, whole or some columns of it. Raises FileNotFoundError."""
    with parquet(file) as opened:
        return opened.read(None if columns is None else list(columns))


def read_table(run_dir: str | RunPath, table: str | schema.Table, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole table, each key once, in the order of the part files.

    Args:
        columns: read only these; the key columns are always read.

    Returns:
        An empty table of the right schema where there are no parts.
    """
    table = _table(table)
    full = stored_schema(table)
    keys = list(key_columns(table))
    wanted = list(full.names) if columns is None else [*keys, *(c for c in columns if c not in keys)]
    target = pa.schema([full.field(column) for column in wanted])
    pieces = read_parts(run_dir, table.name, lambda file: read_part(file, wanted))[1]
    if not pieces:
        return target.empty_table()
    rows = pa.concat_tables([piece.select(wanted).cast(target) for piece in pieces])
    if table.grain == "failure":
        return rows if len(pieces) == 1 else _each_failure_once(rows)
    return first_of_each(rows, table.key[0])


def read_parts(
    run_dir: str | RunPath, name: str, read: Callable[[RunPath], T], threads: int = 1
) -> tuple[list[RunPath], list[T]]:
    """Apply `read` to every part file of a table; begins again where a compaction takes one away meanwhile.

    Returns:
        The files, and what was read of each.
    """
    for _ in range(_PATIENCE):
        files = parts(run_dir, name)
        try:
            with ThreadPoolExecutor(threads) as pool:
                return files, list(pool.map(read, files))
        except FileNotFoundError:
            continue
    raise FileNotFoundError(f"the part files of {run_dir}/{name} keep changing; is something else removing them?")


def _each_failure_once(rows: pa.Table) -> pa.Table:
    """A failure stands in two parts while a compaction is under way; it has no key of its own."""
    names = ("stage", "identity_id", "sample_id", "kind", "where", "attempt", "failed_at")
    own = [name for name in names if name in rows.column_names]
    numbered = rows.select(own).append_column("_row", pa.array(np.arange(rows.num_rows)))
    first = numbered.group_by(own, use_threads=False).aggregate([("_row", "min")])["_row_min"]
    return rows if len(first) == rows.num_rows else rows.take(pa.array(np.sort(first.to_numpy())))


def first_of_each(table: pa.Table, key: str) -> pa.Table:
    """The first row of each value of `key`, order kept."""
    codes = pc.dictionary_encode(table[key].combine_chunks()).indices.to_numpy(zero_copy_only=False)
    _, first = np.unique(codes, return_index=True)
    return table if len(first) == len(codes) else table.take(pa.array(np.sort(first)))


def read_run(run_dir: str | RunPath) -> dict[str, Any]:
    """`run.json`: configuration, fingerprints and sessions of a run.

    Raises:
        NotARunError: where the folder is not a run directory; the message says so.
    """
    try:
        run: dict[str, Any] = json.loads((run_path(run_dir) / "run.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise NotARunError(f"{run_dir} is not a run directory: it holds no run.json") from None
    return run
