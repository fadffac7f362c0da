"""How a run stands, live or dead, from its files alone: no lock is taken, nothing is written, Ray is not asked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ipvg_ray import tables
from ipvg_ray.pipeline.lease import holder
from ipvg_ray.pipeline.plan import make_steps
from ipvg_ray.pipeline.stage import Stage
from ipvg_ray.pipeline.store import Store
from ipvg_ray.pipeline.survey import Counts, Index, survey
from ipvg_ray.storage import RunPath

_WINDOW = 600.0
"""Seconds over which the rate is taken."""


@dataclass(frozen=True)
class StageStatus:
    """One stage: its counts of rows, rows finished per second over the last ten minutes, and seconds left at that rate.

    `seconds_left` is None where nothing was finished lately or nothing is left.
    """

    counts: Counts
    rate: float
    seconds_left: float | None


@dataclass(frozen=True)
class Status:
    """A run: who is at work in it (None if nobody), outcome of its last start, problems of its identity set, stages."""

    running: str | None
    outcome: str
    problems: int
    stages: dict[str, StageStatus]

    def as_json(self) -> dict[str, Any]:
        """Plain values, for machines."""
        return asdict(self)


def status(run_dir: RunPath, stages: Sequence[Stage]) -> Status:
    """Read how a run stands.

    Args:
        stages: the pipeline's stages, made from the run's own configuration.

    Raises:
        NotARunError: where the folder is no run.
        InconsistentRunError: where its tables contradict each other.
    """
    run = tables.read_run(run_dir)
    begun = [stage for stage in stages if stage.name in run["stages"]]
    problems, running = run["dataset"].get("problems", 0), holder(run_dir)
    if not begun:
        return Status(running, "not started", problems, {})
    prints = {name: kept["fingerprint"] for name, kept in run["stages"].items()}
    found = survey(Store(run_dir, ""), make_steps(begun), prints)
    outcome = (run.get("sessions") or [{}])[-1].get("outcome", "not started")
    return Status(
        running=running,
        outcome="killed" if outcome == "running" and running is None else outcome,
        problems=problems,
        stages={name: _stage(counts, found.indexes[name]) for name, counts in found.counts.items()},
    )


def _stage(counts: Counts, index: Index) -> StageStatus:
    now = time.time()
    ages = [now - file.stat().st_mtime for file in index.files]
    sizes = index.starts[1:] - index.starts[:-1]
    lately = [(age, int(rows)) for age, rows in zip(ages, sizes, strict=True) if age <= _WINDOW]
    span = max((age for age, _ in lately), default=0.0)
    rate = sum(rows for _, rows in lately) / span if span > 1 else 0.0
    return StageStatus(counts, round(rate, 4), round(counts.waiting / rate, 1) if rate and counts.waiting else None)
