"""Rows are rebuilt from part files wherever they lie in them."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipvg_ray.pipeline import tickets


@st.composite
def _tables(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Row groups of part files, some of them empty, and numbers of rows to take."""
    files = draw(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=4))
    total = sum(map(sum, files))
    return files, draw(st.lists(st.integers(0, total - 1), max_size=8)) if total else []


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_tables(), st.booleans())
def test_rows_are_taken_from_wherever_they_lie(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[list[list[int]], list[int]], keep: bool
) -> None:
    files, rows = drawn
    folder, first, places = tmp_path_factory.mktemp("parts"), 0, {}
    for number, groups in enumerate(files):
        place = folder / f"{number}.parquet"
        with pq.ParquetWriter(place, pa.schema([("n", pa.int64()), ("other", pa.string())])) as writer:
            places[first] = place
            for size in groups:
                numbers = pa.array(range(first, first + size), pa.int64())
                writer.write_table(pa.table({"n": numbers, "other": pa.nulls(size, pa.string())}))
                first += size
    with mock.patch.object(tickets, "_KEPT_BYTES", 1 << 20 if keep else 0):
        source = tickets._Source(places, ["n"])
        for some in (rows, rows[::-1], rows[:1], []):
            taken = source.take(np.array(some, np.int64))
            assert taken.column_names == ["n"]
            assert taken["n"].to_pylist() == some
