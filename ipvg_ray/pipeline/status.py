"""How a run stands, live or dead, from its files alone: no lock is taken, nothing is written, Ray is not asked."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
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

    `seconds_left` is None where nothing was finished lately or nothing is left. `first_row_seconds` is the longest that
    a node was up before its first row of the stage began, in all starts that have ended; 0 where none is known.
    """

    counts: Counts
    rate: float
    seconds_left: float | None
    first_row_seconds: float = 0.0


@dataclass(frozen=True)
class Status:
    """A run: who is at work in it (None if nobody), outcome of its last start, problems of its identity set, stages,
    and what was lost with nodes in all starts; see `ipvg_ray.pipeline.progress.Progress`."""

    running: str | None
    outcome: str
    problems: int
    stages: dict[str, StageStatus]
    lost: dict[str, int] = field(default_factory=dict)

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
    sessions = run.get("sessions") or [{}]
    outcome, lost = sessions[-1].get("outcome", "not started"), Counter[str]()
    for session in sessions:
        lost.update(session.get("lost", {}))
    return Status(
        running=running,
        outcome="killed" if outcome == "running" and running is None else outcome,
        problems=problems,
        stages={
            name: _stage(counts, found.indexes[name], _first_row(sessions, name))
            for name, counts in found.counts.items()
        },
        lost=dict(lost),
    )


def _first_row(sessions: Sequence[Mapping[str, Any]], name: str) -> float:
    return max(s.get("stages", {}).get(name, {}).get("first_row_seconds", 0.0) for s in sessions)


def _stage(counts: Counts, index: Index, first_row: float) -> StageStatus:
    now = time.time()
    ages = [now - file.stat().st_mtime for file in index.files]
    sizes = index.starts[1:] - index.starts[:-1]
    lately = [(age, int(rows)) for age, rows in zip(ages, sizes, strict=True) if age <= _WINDOW]
    span = max((age for age, _ in lately), default=0.0)
    rate = sum(rows for _, rows in lately) / span if span > 1 else 0.0
    left = round(counts.waiting / rate, 1) if rate and counts.waiting else None
    return StageStatus(counts, round(rate, 4), left, first_row)
