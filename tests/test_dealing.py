"""How rows are dealt to workers: singly where they are dear, not far ahead of the next stage, again after losses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from engine_checks import check_complete, events
from engine_driver import freeze_fake, request
from engine_inprocess import drive
from ray.data import DataContext
from ray.data._internal.logical.optimizers import get_execution_plan

from ipvg_ray import schema
from ipvg_ray.pipeline import execute, lead
from ipvg_ray.pipeline import run as engine
from ipvg_ray.pipeline.plan import make_steps, rows_ahead, rows_dealt
from ipvg_ray.pipeline.progress import Progress
from ipvg_ray.pipeline.stage import Resources
from ipvg_ray.pipeline.store import Store
from ipvg_ray.pipeline.tickets import TicketFile, write_tickets


def test_dear_rows_are_dealt_singly() -> None:
    assert execute._in_flight(Resources(batch_size=1, max_workers=8)) == 1
    assert execute._in_flight(Resources(batch_size=16)) == 2
    assert execute._in_flight(Resources(batch_size=1, concurrency=4)) == 8


@pytest.mark.parametrize("batch", [1, 3, 16, 100, 256, 1000, 5000])
@pytest.mark.parametrize("light", [True, False])
@pytest.mark.parametrize("slots", [(1, 1), (4, 16)])
@pytest.mark.parametrize("rows", [1, 1000, 1_000_000, 100_000_000])
def test_what_is_dealt_and_read_is_whole_batches(batch: int, light: bool, slots: tuple[int, int], rows: int) -> None:
    asks = Resources(batch_size=batch, max_workers=slots[0], concurrency=slots[1])
    dealt = rows_dealt(asks, light, rows)
    assert dealt % batch == 0
    if dealt > batch:
        assert light
        assert 256 <= batch < dealt <= 4096
        assert rows / dealt >= 8 * slots[0] * slots[1], "and every worker is dealt several times"
    span = execute.read_span(dealt, rows)
    assert span % dealt == 0
    assert span <= max(dealt, 16384) or rows / span > 2048, "large only so that there are not too many"
    assert rows / span <= 4096
    assert rows_ahead(asks, dealt=dealt) >= 2 * dealt, "else a worker might wait for the next to be dealt"


def test_rows_with_pictures_are_dealt_batch_by_batch() -> None:
    text, picture = pa.field("text", pa.string()), pa.field("pictures", schema.IMAGE)
    step = make_steps(request(Path("run"), batch=512).stages)[1]
    assert step.light
    hashes = pa.field("pictures", pa.binary(32))
    for field in (picture, hashes, pa.field("pictures", pa.list_(pa.struct([text, picture])))):
        assert not dataclasses.replace(step, arriving=step.arriving.append(field)).light


def test_a_large_pool_has_several_readers_and_a_small_one_a_single_one(tmp_path: Path) -> None:
    def flow(workers: int, rows: int) -> execute.Flow:
        steps = make_steps(request(tmp_path, workers=workers).stages)
        return execute.Flow.of(steps, {"first": TicketFile(tmp_path, rows, pa.schema([]), ())})

    for rows in (100, 1_000_000, 100_000_000):
        small, large = flow(1, rows), flow(64, rows)
        assert small.promised["read_first"] >= small.ahead["first"]
        assert 4 <= large.ahead["first"] / large.promised["read_first"] <= 16


@pytest.mark.slow
def test_reading_and_dealing_are_one_task(tmp_path: Path) -> None:
    asked = request(tmp_path / "run", batch=2)
    with engine.opened(asked, freeze_fake(5, 2)) as this:
        tickets = {"first": write_tickets(this.store.tickets_dir, this.steps, 0, this.found)}
        execute.connect()
        specs = engine.specs(this, asked)
        dealt = execute.Flow.of(this.steps, tickets).dealt
        dataset = execute._dataset(this.steps, specs, tickets, dealt, None, {})
        assert dataset is not None
        last, _ = get_execution_plan(dataset._logical_plan)
        names, op = [], last.dag
        while op.input_dependencies:
            names.append(op.name)
            op = op.input_dependencies[0]
        execute.shutdown()
    assert names[::-1][:2] == [
        "MapBatches(read_first)->StreamingRepartition[num_rows_per_block=2,strict=False]",
        "MapBatches(first)",
    ]


def test_readers_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool(_Operator):
        pass

    monkeypatch.setattr(lead, "ActorPoolMapOperator", Pool)
    reader, stage = _Operator("MapBatches(read_second)->Cut"), Pool("MapBatches(second)")
    stage.input_dependencies = [reader]
    context = DataContext()
    lead.bound_lead(context, {"second": 40}, {"read_second": 100})
    policy = lead.LeadPolicy(context, [reader, stage], None)
    assert policy.can_add_input(reader)
    reader.metrics.num_tasks_running = 1
    assert not policy.can_add_input(reader), "one that has yet to deal its rows is enough"
    assert policy.max_task_output_bytes_to_read(reader) is None, "and these are wanted"
    reader.metrics.rows_task_outputs_generated = 40
    assert policy.max_task_output_bytes_to_read(reader) == 0
    reader.metrics.num_tasks_running, stage.metrics.rows_inputs_of_submitted_tasks = 0, 1
    assert policy.can_add_input(reader), "a reader that ended early, as readers do when the run stops, holds up nothing"


class _Operator:
    """As much of Ray Data's operators as the policy looks at."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.input_dependencies: list[_Operator] = []
        self.metrics = SimpleNamespace(
            num_tasks_running=0, rows_task_outputs_generated=0, rows_inputs_of_submitted_tasks=0
        )


NAMES = ("first", "second", "third")


def test_the_guard_against_standstill_follows_the_slowest_stage(tmp_path: Path) -> None:
    steps = make_steps(request(tmp_path, limit=4000.0, batch=2).stages)
    assert execute.no_progress_limit(steps, dict.fromkeys(NAMES, 2)) == 32000
    assert execute.no_progress_limit(steps, dict.fromkeys(NAMES, 8)) == 128000, "a task tells nothing before its end"
    quick, unlimited = make_steps(request(tmp_path, limit=1.0).stages), make_steps(request(tmp_path).stages)
    assert execute.no_progress_limit(quick, dict.fromkeys(NAMES, 2)) == 1800
    assert execute.no_progress_limit(unlimited, dict.fromkeys(NAMES, 2)) == -1


@pytest.mark.slow
def test_no_row_waits_behind_a_slow_one_while_a_worker_is_idle(tmp_path: Path) -> None:
    slow = "second:id00000/prompt0"
    asked = request(tmp_path / "run", workers=2, initial=2, bad={slow: "slow15"}, delay=0.01)
    engine.run(dataclasses.replace(asked, stages=asked.stages[:1]), freeze_fake(4, 4))
    engine.run(asked, freeze_fake(4, 4))  # now all rows of the second stage are there from the beginning
    ends = [event["keys"] for event in events(tmp_path / "run", "second") if event["event"] == "end"]
    assert ends[-1] == [slow.removeprefix("second:")], "every other row was finished meanwhile by the other worker"
    check_complete(tmp_path / "run")


@pytest.mark.slow
def test_a_fast_stage_does_not_run_far_ahead(tmp_path: Path) -> None:
    bad = {f"third:id{i:05d}/prompt{k}": "slow0.15" for i in range(20) for k in range(5)}
    engine.run(request(tmp_path / "run", bad=bad), freeze_fake(20, 5))
    ahead = most = 0
    for event in sorted(
        [e | {"way": 1} for e in events(tmp_path / "run", "second") if e["event"] == "end"]
        + [e | {"way": -1} for e in events(tmp_path / "run", "third") if e["event"] == "begin"],
        key=lambda e: e["t"],
    ):
        ahead += event["way"] * len(event["keys"])
        most = max(most, ahead)
    assert most <= rows_ahead(Resources()) + 4, "what was in work when enough rows waited"
    check_complete(tmp_path / "run")


def test_losses_without_progress_end_the_run(tmp_path: Path) -> None:
    asked = request(tmp_path / "run")
    stores: list[Store] = []
    with engine.opened(asked, freeze_fake(2, 1)) as this:

        def once() -> None:
            stores.append(this.store)
            raise execute.LossError("ObjectLostError: gone")

        with pytest.raises(execute.LossError):
            engine._go_on_after_losses(this, once, Progress(this.found.counts, {}, 1.0), lambda line: None)
    assert len({store.session for store in stores}) == 3
    for old in stores:
        with pytest.raises(FileNotFoundError):
            old.publish_bytes(tmp_path / "run" / "late", b"")


def test_after_a_loss_the_run_goes_on_in_a_new_session(tmp_path: Path) -> None:
    asked = request(tmp_path / "run")
    said: list[str] = []
    with engine.opened(asked, freeze_fake(2, 1)) as this:
        rounds = iter([True, False])

        def once() -> None:
            if next(rounds):
                raise execute.LossError("ActorDiedError: its node is gone")

        engine._go_on_after_losses(this, once, Progress(this.found.counts, {}, 1.0), said.append)
    assert "going on from the checkpoints (ActorDiedError: its node is gone)" in said[0]
    drive(asked)
    check_complete(tmp_path / "run")
