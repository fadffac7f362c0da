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

from ipvg_ray import schema
from ipvg_ray.pipeline import execute, lead
from ipvg_ray.pipeline import run as engine
from ipvg_ray.pipeline.plan import make_steps, rows_ahead, rows_dealt
from ipvg_ray.pipeline.progress import Progress
from ipvg_ray.pipeline.stage import Resources
from ipvg_ray.pipeline.store import Store


def test_dear_rows_are_dealt_singly() -> None:
    assert execute._in_flight(Resources(batch_size=1, max_workers=8)) == 1
    assert execute._in_flight(Resources(batch_size=16)) == 2
    assert execute._in_flight(Resources(batch_size=1, concurrency=4)) == 8


@pytest.mark.parametrize("batch", [1, 3, 16, 100, 256, 1000, 5000])
@pytest.mark.parametrize("light", [True, False])
def test_what_is_dealt_and_read_is_whole_batches(batch: int, light: bool) -> None:
    asks = Resources(batch_size=batch)
    dealt = rows_dealt(asks, light)
    assert dealt % batch == 0
    assert dealt == batch or (light and batch >= 256 and dealt <= 4096)
    for rows in (1, 1_000_000, 100_000_000):
        span = execute.read_span(dealt, rows)
        assert span % dealt == 0
        assert span <= max(dealt, 16384) or rows / span > 2048, "large only so that there are not too many"
        assert rows / span <= 4096
    assert rows_ahead(asks, light=light) >= 2 * dealt, "else a worker might wait for the next to be dealt"


def test_rows_with_pictures_are_dealt_batch_by_batch() -> None:
    text, picture = pa.field("text", pa.string()), pa.field("pictures", schema.IMAGE)
    step = make_steps(request(Path("run"), batch=512).stages)[1]
    assert step.dealt == 4096
    for field in (picture, pa.field("pictures", pa.list_(pa.struct([text, picture])))):
        heavy = dataclasses.replace(step, arriving=step.arriving.append(field))
        assert not heavy.light
        assert heavy.dealt == 512


def test_readers_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lead, "ActorPoolMapOperator", _Operator)
    reader, stage = _Operator("MapBatches(read_second)->Cut"), _Operator("MapBatches(second)")
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


def test_the_guard_against_standstill_follows_the_slowest_stage(tmp_path: Path) -> None:
    steps = make_steps(request(tmp_path, limit=4000.0, batch=2).stages)
    assert execute.no_progress_limit(steps) == 32000
    assert execute.no_progress_limit(make_steps(request(tmp_path, limit=1.0).stages)) == 1800
    assert execute.no_progress_limit(make_steps(request(tmp_path).stages)) == -1


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
