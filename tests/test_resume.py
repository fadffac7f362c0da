"""Checkpoints and resume without Ray: the same plan, tickets and workers, in one process that crashes at will."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from engine_checks import check_complete, check_nothing_redone, raw_keys
from engine_driver import STAGES, First, Second, Third, freeze_fake, request
from engine_inprocess import Crash, drive, make_worker, this_process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipvg_ray import tables
from ipvg_ray.pipeline import run as engine
from ipvg_ray.pipeline.lease import RunLockedError, lock
from ipvg_ray.pipeline.ledger import Event, TryLedger
from ipvg_ray.pipeline.plan import QUEUED, PlanError, make_steps
from ipvg_ray.pipeline.stage import RowError, WorkerBrokenError
from ipvg_ray.pipeline.status import status
from ipvg_ray.pipeline.store import Store, batch_digest, new_session, row_seeds
from ipvg_ray.pipeline.survey import InconsistentRunError
from ipvg_ray.pipeline.tickets import read_rows, write_tickets
from ipvg_ray.storage import StorageError


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32))
def test_any_crashes_and_orders_give_each_row_once(seed: int) -> None:
    luck = random.Random(seed)
    bad = {"second:id00001/prompt1": "raise", "first:id00002": "row-error"}
    with TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        for _ in range(luck.randint(0, 4)):
            try:
                drive(request(run_dir, bad=bad), luck)
                break
            except Crash:
                continue
        drive(request(run_dir, bad=bad))
        check_complete(run_dir, {"second": {"id00001/prompt1"}, "first": {"id00002"}})
        check_nothing_redone(run_dir)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), flaky=st.booleans())
def test_a_batch_delivered_again_and_again_is_written_once(seed: int, flaky: bool) -> None:
    """A worker dies before or after any call to the store, or its answer gets lost; Ray delivers the batch again."""
    luck = random.Random(seed)

    def dying(call: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            if luck.random() < 0.12:
                raise Crash
            result = call(*arguments)
            if luck.random() < 0.12:
                raise Crash
            return result

        return wrapped

    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        asked = request(Path(folder) / "run", bad={"first:id00001": "row-error"}, max_deaths=50)
        with engine.opened(asked, freeze_fake(3, 1)) as this:
            files = write_tickets(this.store.tickets_dir, this.steps, 0, this.found)
            batch = next(iter(read_rows(files, 0, 3, 3)))
            patch.setattr(Store, "publish_table", dying(Store.publish_table))
            ledger = TryLedger(lambda node: luck.random() < 0.3)  # of the tries that died some were lost with a node
            ledger.begin, ledger.end = dying(ledger.begin), dying(ledger.end)  # type: ignore[method-assign]
            worker = make_worker(this, asked, "first", ledger)
            for _ in range(100):
                if luck.random() < 0.7:  # else Ray delivers it to the same process again
                    worker = make_worker(this, asked, "first", ledger)
                if flaky:
                    process = worker.stage.process

                    def out_of_memory(rows: Any, process: Any = process) -> Any:
                        if len(rows) > 1 and luck.random() < 0.5:
                            raise MemoryError
                        return process(rows)

                    patch.setattr(worker.stage, "process", out_of_memory)
                try:
                    worker(batch)
                except Crash:
                    continue
                if luck.random() < 0.7:
                    break
            assert sorted(raw_keys(asked.run_dir, "first", "identity_id")) == ["id00000", "id00002"]
            assert tables.read_table(asked.run_dir, "failures")["identity_id"].to_pylist() == ["id00001"]


def test_a_session_that_was_fenced_off_cannot_publish(tmp_path: Path) -> None:
    old = Store(tmp_path, new_session())
    old.begin()
    place = old.publish_table("first", "a", pa.table({"x": [1]}))
    Store(tmp_path, new_session()).begin()
    with pytest.raises(FileNotFoundError):
        old.publish_table("first", "b", pa.table({"x": [2]}))
    with pytest.raises(FileNotFoundError):
        old.publish("videos", "id", "p", ".mp4", b"late")
    assert tables.parts(tmp_path, "first") == [place]
    assert not (tmp_path / "videos").exists()


def test_the_same_batch_again_is_read_back(tmp_path: Path) -> None:
    asked = request(tmp_path / "run")
    this = drive(asked)
    this.store.begin()
    files = write_tickets(this.store.tickets_dir, this.steps, 0, this.found)
    batch = next(iter(read_rows(files, 0, 2, 2)))
    ledger = TryLedger()
    worker = make_worker(this, asked, "first", ledger)
    first = worker(batch)
    ledger.begin(Event("first", batch_digest(batch["identity_id"].to_pylist())), this_process())  # its worker died then

    def explode(rows: Any) -> Any:
        raise AssertionError("computed again")

    worker.stage.process = explode  # type: ignore[method-assign]
    again = worker(batch)
    assert again.drop_columns([QUEUED]).equals(first.drop_columns([QUEUED]))
    assert again[QUEUED][0].as_py() > first[QUEUED][0].as_py(), "it leaves now"
    assert ledger.tries == {}


def test_a_worker_that_died_is_counted_and_the_row_set_aside(tmp_path: Path) -> None:
    asked = request(tmp_path / "run")
    with engine.opened(asked, freeze_fake(2, 1)) as this:
        files = write_tickets(this.store.tickets_dir, this.steps, 0, this.found)
        batch = next(iter(read_rows(files, 0, 2, 2)))
        poison, fine = batch["identity_id"].to_pylist()
        ledger = TryLedger()
        for _ in range(3):  # what three workers leave that died on this row
            ledger.begin(Event("first", batch_digest([poison])), this_process())
        ledger.begin(Event("first", batch_digest([poison, fine])), this_process())
        worker = make_worker(this, asked, "first", ledger)
        assert set(worker(batch)["identity_id"].to_pylist()) == {fine}
        (failure,) = tables.read_table(asked.run_dir, "failures").to_pylist()
        assert failure["kind"] == "worker_died"
        assert "the 1 rows it came with are run without it" in failure["message"]
        assert "it left no trace, as after SIGKILL" in failure["message"]


def test_a_death_between_failures_and_rows_writes_nothing_twice(tmp_path: Path) -> None:
    asked = request(tmp_path / "run", bad={"first:id00001": "row-error"})
    with engine.opened(asked, freeze_fake(3, 1)) as this:
        files = write_tickets(this.store.tickets_dir, this.steps, 0, this.found)
        batch = next(iter(read_rows(files, 0, 3, 3)))
        ledger = TryLedger()
        worker = make_worker(this, asked, "first", ledger)
        publish = Store.publish_table

        def dies(store: Store, name: str, *rest: Any) -> Path:
            if name == "first":
                raise Crash
            return publish(store, name, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "publish_table", dies)
            with pytest.raises(Crash):
                worker(batch)
        assert make_worker(this, asked, "first", ledger)(batch).num_rows == 2
        assert tables.read_table(asked.run_dir, "failures")["identity_id"].to_pylist() == ["id00001"]
        assert sorted(raw_keys(asked.run_dir, "first", "identity_id")) == ["id00000", "id00002"]
        assert ledger.tries == {}


def test_bad_results_fail_their_row_only(tmp_path: Path) -> None:
    asked = request(tmp_path / "run")
    with engine.opened(asked, freeze_fake(3, 1)) as this:
        files = write_tickets(this.store.tickets_dir, this.steps, 0, this.found)
        worker = make_worker(this, asked, "first")
        worker.stage.process = lambda rows: [{"total": None} if r["image_width"] == 1 else {"total": 5} for r in rows]  # type: ignore[method-assign]
        left = worker(next(iter(read_rows(files, 0, 3, 3))))
        assert left.num_rows == 2
        failure = tables.read_table(asked.run_dir, "failures").to_pylist()[0]
        assert (failure["identity_id"], failure["sample_id"]) == ("id00001", None)
        assert "left out total" in failure["message"]


def test_two_processes_cannot_share_a_run(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(RunLockedError, match="in use by process"):
        lock(tmp_path)


def test_a_part_of_another_configuration_is_named(tmp_path: Path) -> None:
    drive(request(tmp_path / "run"))
    part = tables.parts(tmp_path / "run", "second")[0]
    table = pq.read_table(part, partitioning=None)
    pq.write_table(table.replace_schema_metadata({b"ipvg_ray.fingerprint": b"other"}), part)
    with pytest.raises(InconsistentRunError, match="another configuration"):
        drive(request(tmp_path / "run"))


def test_a_removed_table_is_named(tmp_path: Path) -> None:
    drive(request(tmp_path / "run"))
    for part in tables.parts(tmp_path / "run", "first"):
        part.unlink()
    with pytest.raises(InconsistentRunError, match="--redo-from first"):
        drive(request(tmp_path / "run"))


def test_a_torn_part_is_set_aside_and_its_rows_made_again(tmp_path: Path) -> None:
    drive(request(tmp_path / "run"))
    torn = tables.parts(tmp_path / "run", "third")[0]
    torn.write_bytes(torn.read_bytes()[:-20])
    drive(request(tmp_path / "run"))
    check_complete(tmp_path / "run")
    assert (tmp_path / "run" / "_engine" / "torn" / "third" / torn.name).is_file()


def test_a_torn_part_that_later_stages_were_made_from_is_named(tmp_path: Path) -> None:
    drive(request(tmp_path / "run"))
    tables.parts(tmp_path / "run", "second")[0].write_bytes(b"PAR1")
    with pytest.raises(InconsistentRunError, match=r"whose second is missing; use --redo-from second"):
        drive(request(tmp_path / "run"))


@pytest.mark.parametrize("table", ["identities", "samples"])
def test_a_torn_part_of_the_identity_set_is_refused_and_kept(tmp_path: Path, table: str) -> None:
    drive(request(tmp_path / "run"))
    torn = tables.parts(tmp_path / "run", table)[0]
    torn.write_bytes(b"PAR1 torn")
    with pytest.raises(InconsistentRunError, match="start a new run directory"):
        drive(request(tmp_path / "run"))
    assert torn.exists()


def test_a_part_that_only_repeats_others_is_removed_at_the_start(tmp_path: Path) -> None:
    this = drive(request(tmp_path / "run"))
    part = tables.parts(tmp_path / "run", "third")[0]
    late = part.with_name(part.name.replace(this.store.session, new_session()))
    late.write_bytes(part.read_bytes())
    drive(request(tmp_path / "run"))
    assert not late.exists()
    check_complete(tmp_path / "run")


def test_rows_and_counts_of_the_survey(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    this = drive(request(run_dir, bad={"first:id00001": "raise"}), identities=4, prompts=3)
    with engine.opened(request(run_dir), freeze_fake(0, 0)) as after:
        counts = after.found.counts
    assert (counts["first"].total, counts["first"].done, counts["first"].failed) == (4, 3, 1)
    assert (counts["second"].done, counts["second"].lost, counts["second"].waiting) == (9, 3, 0)
    assert [len(rows) for rows in after.found.entry.values()] == [0, 0, 0]
    assert np.array_equal(after.found.first, [0, 3, 6, 9, 12])
    assert len(raw_keys(run_dir, "third", "sample_id")) == 9
    assert this.found.counts["first"].waiting == 4


def test_status_reads_a_run_without_touching_it(tmp_path: Path) -> None:
    asked = request(tmp_path / "run", bad={"first:id00001": "raise"})
    drive(asked, identities=4, prompts=3)
    files = {p: p.stat().st_mtime_ns for p in asked.run_dir.rglob("*")}
    found = status(asked.run_dir, asked.stages)
    assert {p: p.stat().st_mtime_ns for p in asked.run_dir.rglob("*")} == files
    assert found.running is None
    assert (found.stages["third"].counts.done, found.stages["third"].counts.lost) == (9, 3)
    with lock(asked.run_dir):
        assert str(os.getpid()) in str(status(asked.run_dir, asked.stages).running)
    run = tables.read_run(asked.run_dir)
    stages = {"third": {"first_row_seconds": 12.5}}
    run["sessions"] = [{"lost": {"batches": 2, "notices": 1}, "stages": stages}, {"lost": {"batches": 3}}]
    (asked.run_dir / "run.json").write_text(json.dumps(run))
    found = status(asked.run_dir, asked.stages)
    assert found.lost == {"batches": 5, "notices": 1}
    assert [stage.first_row_seconds for stage in found.stages.values()] == [0.0, 0.0, 12.5]


def test_seeds_differ_by_run_row_and_stage() -> None:
    seeds = {seed for run in (1, 2) for stage in ("x", "y") for seed in row_seeds(run, ["a", "b"], stage)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_plans_that_cannot_run_say_everything() -> None:
    first, second, third = request(Path("unused")).stages
    with pytest.raises(PlanError, match=r"third needs 'text', which comes only from second"):
        make_steps([first, third, second])
    with pytest.raises(PlanError, match=r"first works per identity but stands behind"):
        make_steps([second, first])
    with pytest.raises(PlanError, match="two stages are named first"):
        make_steps([first, first])
    with pytest.raises(PlanError, match="there is no stage"):
        make_steps([])

    class Misspelt(Second):
        needs = ("promt", "total")

    with pytest.raises(PlanError, match=r"'promt', which nothing adds; did you mean 'prompt'"):
        make_steps([first, Misspelt(first.config)])


def test_columns_travel_only_as_far_as_they_are_needed() -> None:
    steps = make_steps(request(Path("unused")).stages)
    of_identity, of_sample = ["identity_id", "_samples"], ["identity_id", "sample_id", "prompt_id"]
    counted = ["_attempt", "_queued"]
    assert steps[0].arriving.names == [*of_identity, *counted, "image_width", "image_height"]
    assert steps[1].arriving.names == [*of_sample, *counted, "prompt", "total", "image_height"]
    assert steps[2].arriving.names == [*of_sample, *counted, "text", "image_height"]
    assert steps[2].leaving.names == [*of_sample, *counted]
    assert [type(step.stage) for step in steps] == list(STAGES) == [First, Second, Third]


def test_neighbours_of_a_row_that_kills_are_not_blamed_for_being_in_work_beside_it(tmp_path: Path) -> None:
    """With several batches in work at a time a death is laid at the door of all; only one that was alone counts."""
    asked = request(tmp_path / "run", concurrency=2)
    with engine.opened(asked, freeze_fake(2, 1)) as this:
        files = write_tickets(this.store.tickets_dir, this.steps, 0, this.found)
        one, two = read_rows(files, 0, 2, 1)
        ledger = TryLedger()
        for batch in (one, two):
            for _ in range(5):  # what five workers leave that died with both in work
                event = Event("first", batch_digest(batch["identity_id"].to_pylist()), alone=False)
                ledger.begin(event, this_process())
        for _ in range(3):
            ledger.begin(Event("first", batch_digest(two["identity_id"].to_pylist())), this_process())
        worker = make_worker(this, asked, "first", ledger)
        assert worker(one).num_rows == 1
        assert worker(two).num_rows == 0
        assert [f["kind"] for f in tables.read_table(asked.run_dir, "failures").to_pylist()] == ["worker_died"]


def test_storage_that_fails_is_no_rows_failure(tmp_path: Path) -> None:
    asked = request(tmp_path / "run")
    with engine.opened(asked, freeze_fake(2, 1)) as this:
        drive_one = make_worker(this, asked, "first")
        batch = next(iter(read_rows(write_tickets(this.store.tickets_dir, this.steps, 0, this.found), 0, 2, 2)))

        def full(rows: Any) -> Any:
            raise StorageError("cannot write: no space left on device")

        drive_one.stage.process = full  # type: ignore[method-assign]
        with pytest.raises(StorageError):
            drive_one(batch)
    assert not tables.parts(tmp_path / "run", "failures")


def test_a_torn_failures_part_is_set_aside(tmp_path: Path) -> None:
    asked = request(tmp_path / "run", bad={"third:id00001/prompt1": "raise"})
    drive(asked)
    tables.parts(asked.run_dir, "failures")[0].write_bytes(b"PAR1 torn")
    drive(request(asked.run_dir))
    check_complete(asked.run_dir)


def test_rows_that_a_late_part_repeats_are_taken_out_of_it(tmp_path: Path) -> None:
    this = drive(request(tmp_path / "run"))
    first, second, *_ = tables.parts(tmp_path / "run", "third")
    late = first.with_name(first.name.replace(this.store.session, new_session()))
    both = pa.concat_tables([pq.read_table(first, partitioning=None), pq.read_table(second, partitioning=None)])
    pq.write_table(both, late)
    second.unlink()
    drive(request(tmp_path / "run"))
    check_complete(tmp_path / "run")
    assert 0 < pq.read_metadata(late).num_rows < both.num_rows


def test_a_worker_that_is_broken_ends_and_fails_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(tmp_path / "run")
    with engine.opened(asked, freeze_fake(2, 1)) as this:
        worker = make_worker(this, asked, "first")
        batch = next(iter(read_rows(write_tickets(this.store.tickets_dir, this.steps, 0, this.found), 0, 2, 2)))

        def broken(rows: Any) -> Any:
            raise WorkerBrokenError("the engine has died")

        def leave(status: int) -> None:
            raise Crash(status)

        worker.stage.process = broken  # type: ignore[method-assign]
        monkeypatch.setattr("os._exit", leave)
        with pytest.raises(Crash):
            worker(batch)
    assert not tables.parts(tmp_path / "run", "failures")
    assert not tables.parts(tmp_path / "run", "first")


def test_a_batch_of_nothing_but_refused_rows_keeps_their_kinds(tmp_path: Path) -> None:
    asked = request(tmp_path / "run")
    with engine.opened(asked, freeze_fake(2, 1)) as this:
        worker = make_worker(this, asked, "first")
        batch = next(iter(read_rows(write_tickets(this.store.tickets_dir, this.steps, 0, this.found), 0, 2, 2)))
        worker.stage.process = lambda rows: [RowError("refused", "no") for _ in rows]  # type: ignore[method-assign]
        assert worker(batch).num_rows == 0
    assert [f["kind"] for f in tables.read_table(asked.run_dir, "failures").to_pylist()] == ["refused", "refused"]
