"""Compaction: whatever is interleaved with writes, crashes and reads, each key is there once."""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from engine_checks import check_complete, raw_keys
from engine_driver import First, request
from engine_inprocess import Crash, drive
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ipvg_ray import tables
from ipvg_ray.pipeline.compact import compact, groups
from ipvg_ray.pipeline.store import Store, new_session
from ipvg_ray.pipeline.survey import read_index


def row(key: str) -> dict[str, Any]:
    return {"identity_id": key, "total": len(key), "seed": 1, "seconds": 0.5}


@example(["write", "compact", "write", "crash while merging", "write"], 82)  # merged parts that are merged again
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from(["write", "crash while writing", "compact", "crash while merging", "read"]), max_size=14),
    st.integers(0, 999),
)
def test_any_interleaving_gives_each_key_once(operations: list[str], seed: int) -> None:
    luck = random.Random(seed)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        run_dir = Path(folder)
        written: list[str] = []

        def check() -> None:
            found = tables.read_table(run_dir, First.table())
            assert sorted(found["identity_id"].to_pylist()) == sorted(written)
            assert found["total"].to_pylist() == [len(key) for key in found["identity_id"].to_pylist()]
            assert set(read_index(run_dir, "first", "identity_id", "print").keys.to_pylist()) == set(written)

        store = Store(run_dir, new_session())
        store.begin()
        store.write_run({"stages": {"first": {}}})
        unlink = Path.unlink

        def reading(path: Path, missing_ok: bool = False) -> None:
            if path.suffix == ".parquet":
                check()  # between publishing a merged part and the removal of each it stands for
            unlink(path, missing_ok)

        def dying(path: Path, missing_ok: bool = False) -> None:
            if path.suffix == ".parquet" and luck.random() < 0.4:
                raise Crash
            unlink(path, missing_ok)

        for operation in operations:
            if operation == "write":
                keys = [f"id{len(written) + i}" for i in range(luck.randint(1, 3))]
                store = Store(run_dir, new_session())
                store.begin()
                table = pa.Table.from_pylist([row(key) for key in keys], schema=tables.stored_schema(First.table()))
                store.publish_table("first", keys[0], table, "print")
                written += keys
            elif operation == "crash while writing":
                store = Store(run_dir, new_session())
                store.begin()
                store.temporary().write_bytes(b"PAR1" + luck.randbytes(20))  # half a part, under no name of its own
            elif operation == "compact":
                patch.setattr(Path, "unlink", reading)
                compact(run_dir)
                patch.setattr(Path, "unlink", unlink)
                assert len(raw_keys(run_dir, "first", "identity_id")) == len(written)
                assert len(tables.parts(run_dir, "first")) <= 1
            elif operation == "crash while merging":
                patch.setattr(Path, "unlink", dying)
                try:
                    compact(run_dir)
                except Crash:
                    pass
                finally:
                    patch.setattr(Path, "unlink", unlink)
            check()
        store = Store(run_dir, new_session())
        store.begin()  # a start clears what a killed compaction left
        assert sorted(raw_keys(run_dir, "first", "identity_id")) == sorted(written)


def test_a_compacted_run_goes_on(tmp_path: Path) -> None:
    asked = request(tmp_path / "run", bad={"third:id00001/prompt1": "raise"})
    drive(asked)
    for part in tables.parts(asked.run_dir, "third")[:2]:
        part.unlink()
    before, after = compact(asked.run_dir)["second"]
    assert before > 1
    assert after == 1
    drive(asked)
    check_complete(asked.run_dir, {"third": {"id00001/prompt1"}})
    fingerprints = {pq.read_schema(p).metadata[b"ipvg_ray.fingerprint"] for p in tables.parts(asked.run_dir, "second")}
    assert len(fingerprints) == 1


def test_only_small_parts_are_merged_and_none_alone() -> None:
    sizes = [("a", 10), ("b", 90), ("c", 20), ("d", 30), ("e", 45), ("f", 60), ("g", 5)]
    found = list(groups([(Path(name), size) for name, size in sizes], 100))
    assert [[p.name for p in group] for group in found] == [["a", "c", "d"], ["e", "g"]]
