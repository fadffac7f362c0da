"""The engine on Ray with stages that need no model: resume, failures, retries, forks, changes, pools."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from engine_checks import check_complete, check_nothing_redone, events
from engine_driver import STAGES, Third, freeze_fake, request

from ipvg_ray import tables
from ipvg_ray.pipeline import run as engine
from ipvg_ray.pipeline.space import ResourceError
from ipvg_ray.pipeline.worker import WorkerStartError

pytestmark = pytest.mark.slow
CORES = os.cpu_count() or 1


def refuse_to_freeze(out: Path) -> dict[str, object]:
    raise AssertionError("a resumed run must not read its input again")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of 4 identities × 2 prompts."""
    run_dir = tmp_path_factory.mktemp("engine") / "run"
    result = engine.run(request(run_dir, batch=2), freeze_fake(4, 2))
    assert (result.outcome, result.failed, result.waiting) == ("complete", 0, 0)
    return run_dir


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def answers(run_dir: Path) -> dict[str, str]:
    return {r["sample_id"]: r["answer"] for r in tables.read_table(run_dir, Third.table()).to_pylist()}


def test_complete(finished: Path) -> None:
    check_complete(finished)


def test_a_finished_run_has_nothing_to_do(copy: Path) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in copy.rglob("*.parquet"))
    result = engine.run(request(copy), refuse_to_freeze)
    assert result.waiting == 0
    assert sorted((p, p.stat().st_mtime_ns) for p in copy.rglob("*.parquet")) == before


def test_pools_and_batches_do_not_change_results(finished: Path, tmp_path: Path) -> None:
    engine.run(request(tmp_path / "other", workers=2, batch=3), freeze_fake(4, 2))
    assert answers(tmp_path / "other") == answers(finished)


def test_missing_rows_are_made_from_checkpoints(copy: Path) -> None:
    lost = tables.parts(copy, "third")[0]
    lost.unlink()
    engine.run(request(copy, batch=2), refuse_to_freeze)
    check_complete(copy)
    check_nothing_redone(copy)


def test_changed_setting_is_refused_and_named(copy: Path) -> None:
    with pytest.raises(engine.ChangedError, match=r"third\.add: 1 → 5(.|\n)*--redo-from third"):
        engine.run(request(copy, add=5), refuse_to_freeze)
    with pytest.raises(engine.ChangedError, match="seed: 1 → 2"):
        engine.run(request(copy, seed=2), refuse_to_freeze)


def test_redo_from(copy: Path) -> None:
    engine.run(request(copy, add=5, redo_from="third"), refuse_to_freeze)
    assert all(text.endswith("/5") for text in answers(copy).values())
    check_complete(copy)


def test_fork_reuses_what_is_still_valid(copy: Path, tmp_path: Path) -> None:
    asked = request(tmp_path / "new", add=5)
    assert engine.fork(copy, asked) == ["first", "second"]
    assert not (tmp_path / "new" / "files").exists()
    engine.run(asked, refuse_to_freeze)
    check_complete(tmp_path / "new")
    check_nothing_redone(tmp_path / "new")
    assert all(text.endswith("/5") for text in answers(tmp_path / "new").values())
    assert all(text.endswith("/1") for text in answers(copy).values())
    with pytest.raises(engine.ChangedError, match="is not empty"):
        engine.fork(copy, asked)


def test_failures_retries_and_worker_deaths(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    bad = {"first:id00001": "raise", "second:id00000/prompt1": "exit", "third:id00002/prompt0": "row-error"}
    result = engine.run(request(run_dir, batch=2, bad=bad), freeze_fake(4, 2))
    assert (result.outcome, result.failed, result.waiting) == ("complete", 3, 0)
    failed = {"first": {"id00001"}, "second": {"id00000/prompt1"}, "third": {"id00002/prompt0"}}
    check_complete(run_dir, failed)
    found = {f["stage"]: f for f in tables.read_table(run_dir, "failures").to_pylist()}
    assert found["first"]["kind"] == "error"
    assert "ValueError: bad input id00001" in found["first"]["traceback"]
    assert found["second"]["kind"] == "worker_died"
    assert found["third"]["kind"] == "planted"
    assert {f["attempt"] for f in found.values()} == {1}

    result = engine.run(request(run_dir), refuse_to_freeze)
    assert result.failed == 3, "failures stand until they are asked to be retried"

    still = {"third:id00002/prompt0": "row-error"}
    result = engine.run(request(run_dir, bad=still, retry_failures=True), refuse_to_freeze)
    assert result.failed == 1
    check_complete(run_dir, {"third": {"id00002/prompt0"}})
    check_nothing_redone(run_dir)
    assert tables.read_table(run_dir, "failures")["attempt"].to_pylist() == [2]


def test_a_machine_too_small_for_all_stages_runs_them_in_turn(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    result = engine.run(request(run_dir, cpus=CORES / 2), freeze_fake(4, 2))
    assert (result.outcome, result.failed, result.waiting) == ("complete", 0, 0)
    check_complete(run_dir)


def test_a_stage_that_fits_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"first asks for 100 CPUs, and there are"):
        engine.run(request(tmp_path / "run", cpus=99.0), freeze_fake(1, 1))


def test_hung_rows_are_ended_and_set_aside_with_their_stack(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    asked = request(run_dir, batch=2, bad={"second:id00001/prompt0": "hang"}, limit=1.0)
    result = engine.run(asked, freeze_fake(3, 2))
    assert (result.outcome, result.failed, result.waiting) == ("complete", 1, 0)
    check_complete(run_dir, {"second": {"id00001/prompt0"}})
    failure = tables.read_table(run_dir, "failures").to_pylist()[0]
    assert failure["kind"] == "timeout"
    assert "in process" in failure["traceback"], "the stack shows where it hung"


def test_several_batches_in_work_at_a_time(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    bad = {"second:id00001/prompt0": "exit", "second:id00002/prompt1": "hang"}
    result = engine.run(request(run_dir, concurrency=4, bad=bad, delay=0.2, limit=3.0), freeze_fake(4, 3))
    assert (result.outcome, result.failed, result.waiting) == ("complete", 2, 0)
    check_complete(run_dir, {"second": {"id00001/prompt0", "id00002/prompt1"}})
    kinds = {f["sample_id"]: f["kind"] for f in tables.read_table(run_dir, "failures").to_pylist()}
    assert kinds == {"id00001/prompt0": "worker_died", "id00002/prompt1": "timeout"}
    open_at_once = most = 0
    for event in events(run_dir, "second"):
        open_at_once += 1 if event["event"] == "begin" else -1
        most = max(most, open_at_once)
    assert most > 1


def test_a_stage_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(WorkerStartError, match="second cannot start: no such weights"):
        engine.run(request(tmp_path / "run", bad={"second": "setup-raise"}), freeze_fake(2, 1))
    run = tables.read_run(tmp_path / "run")
    assert run["sessions"][-1]["outcome"] == "failed"


def test_tables_have_their_schemas(finished: Path) -> None:
    for stage in STAGES:
        for part in tables.parts(finished, stage.name):
            import pyarrow.parquet as pq

            assert pq.read_schema(part).equals(tables.stored_schema(stage.table()))
