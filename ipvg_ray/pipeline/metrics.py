"""Figures of a run for Prometheus, through Ray's own metrics agent: per stage rows, failures, seconds, queue, use.

The driver tells them, from what the workers tell it; Ray serves them on every node's metrics port, with `ray_` in front
of each name. `deploy/grafana.json` shows them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ipvg_ray.pipeline.ledger import Event
from ipvg_ray.pipeline.plan import Step
from ipvg_ray.pipeline.progress import Progress

_EVERY = 5.0
"""Seconds between two values of a gauge."""
_BOUNDARIES = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000]


class Meters:
    """The run's figures. Make it when Ray is connected.

    Args:
        steps: the stages, for how many batches each can have in work.
        run: the run directory, a tag of every figure.
        kinds: where counters, gauges and histograms come from; Ray's unless a test brings its own.
    """

    def __init__(self, steps: Sequence[Step], run: str, kinds: Any = None) -> None:
        if kinds is None:
            from ray.util import metrics as kinds

        asks = {step.name: step.stage.resources() for step in steps}
        self.slots = {name: max(1, a.max_workers * a.concurrency) for name, a in asks.items()}
        self.run = run
        self.due = time.monotonic()
        self.seen: dict[str, tuple[float, float]] = dict.fromkeys(self.slots, (time.monotonic(), 0.0))
        keys = ("stage", "run")
        self.rows = kinds.Counter("ipvg_rows", "Rows finished.", keys)
        self.failures = kinds.Counter("ipvg_failures", "Rows set aside as failures.", keys)
        self.seconds = kinds.Histogram("ipvg_batch_seconds", "Seconds of a batch.", _BOUNDARIES, keys)
        self.gauges = {
            name: kinds.Gauge(f"ipvg_{name}", description, keys)
            for name, description in {
                "rows_waiting": "Rows that the stage has still to begin.",
                "rows_running": "Rows in work.",
                "busy_share": "Share of the stage's largest pool that was at work since the last value.",
                "first_row_seconds": "Longest that a node was up before its first row of the stage began.",
            }.items()
        }

    def add(self, events: Sequence[Event], progress: Progress) -> None:
        """Take in what workers told, and how the stages stand after it."""
        for event in events:
            tags = {"stage": event.stage, "run": self.run}
            if event.done:
                self.rows.inc(event.done, tags)
            if event.failed:
                self.failures.inc(event.failed, tags)
            if event.seconds:
                self.seconds.observe(event.seconds, tags)
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + _EVERY
            for name in self.slots:
                for gauge, value in self._standing(name, progress).items():
                    self.gauges[gauge].set(value, {"stage": name, "run": self.run})

    def _standing(self, name: str, progress: Progress) -> Mapping[str, float]:
        stage, now = progress.stages[name], time.monotonic()
        before, busy = self.seen[name]
        self.seen[name] = (now, stage.busy)
        # Work is told when its batch ends, so a long one counts where it ended.
        share = (stage.busy - busy) / ((now - before) * self.slots[name]) if now > before else 0.0
        return {
            "rows_waiting": stage.waiting,
            "rows_running": stage.running,
            "busy_share": min(1.0, max(0.0, share)),
            "first_row_seconds": stage.first_row,
        }
