"""A stage with groups in the engine: rows done, rows that break groups set aside, nothing left over."""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_driver import Third, freeze_fake, request
from group_ranks import Adder, asking, journal, pids

from ipvg_ray import tables
from ipvg_ray.pipeline import run as engine
from ipvg_ray.pipeline.stage import Ranks, Row

pytestmark = pytest.mark.slow


class Led(Third):
    """The last stage, whose answer two ranks work out together; their folder is the run's neighbour."""

    folder: Path

    def ranks(self) -> Ranks:
        return asking(functools.partial(Adder, self.folder), rebuilds=1)

    def one(self, row: Row) -> Row:
        total = self.context.group.run("add", row["seed"] % 1000, 3)
        return super().one(row) | {"answer": f"{total:.6f}"}

    def process(self, rows: Any) -> Any:
        for row in rows:
            (self.folder / "now").write_text(row["sample_id"])
        return super().process(rows)


class Picky(Adder):
    """Dies at one row, always."""

    def add(self, seed: int, steps: int, pause: float = 0.0) -> float:
        if self.context.rank == 1 and (self.folder / "now").read_text() == "id00001/prompt0":
            (self.folder / "fail-1-1").write_text("always kill")
        elif self.context.rank == 1:
            (self.folder / "fail-1-1").unlink(missing_ok=True)
        return super().add(seed, steps, pause)


class LedToDeath(Led):
    def ranks(self) -> Ranks:
        return asking(functools.partial(Picky, self.folder), rebuilds=1)


def asked(stage: type[Led], tmp_path: Path) -> engine.Request:
    made = request(tmp_path / "run")
    last = stage(made.stages[-1].config)
    last.folder = tmp_path
    return dataclasses.replace(made, stages=[*made.stages[:-1], last])


def gone(tmp_path: Path) -> bool:
    deadline = time.monotonic() + 10
    while (left := pids(tmp_path) & set(psutil.pids())) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not left


def test_a_run_with_groups_goes_on_past_a_killed_rank(tmp_path: Path) -> None:
    (tmp_path / "fail-1-1").write_text("kill")
    result = engine.run(asked(Led, tmp_path), freeze_fake(2, 2))
    assert (result.outcome, result.failed, result.waiting) == ("complete", 0, 0)
    rows = tables.read_table(tmp_path / "run", Third.table()).to_pylist()
    assert len({row["answer"] for row in rows}) == 4, "each row has an answer from its own seed"
    assert sum(line["event"] == "made" for line in journal(tmp_path)) == 4, "two ranks, and two more after the kill"
    assert gone(tmp_path)


def test_a_row_that_breaks_every_group_is_set_aside(tmp_path: Path) -> None:
    result = engine.run(asked(LedToDeath, tmp_path), freeze_fake(2, 2))
    assert (result.outcome, result.failed, result.waiting) == ("complete", 1, 0)
    (failure,) = tables.read_table(tmp_path / "run", "failures").to_pylist()
    assert (failure["sample_id"], failure["kind"]) == ("id00001/prompt0", "group_lost")
    assert "lost 2 times, the last time so: rank 1 died" in failure["message"]
    assert gone(tmp_path)
