"""The scores of a run by sample, read from its table, and which of its samples have none."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ipvg_ray import tables
from ipvg_ray.report.progress import score_columns
from ipvg_ray.report.statistics import LOWER_IS_BETTER, Mean, mean_of
from ipvg_ray.storage import RunPath

_CHECKS = ("arc_frames", "frames_ok", "motion")
"""Columns that are no metrics."""


@dataclass(frozen=True)
class Scored:
    """A run's scores.

    Attributes:
        name: what it is called in tables.
        scores: metric to (sample to value), in the schema's order; truth values are 0 and 1.
        asked: samples of the identity set, the refused ones not among them.
        failed: kind of failure to the samples that ended in it.
        skipped: reason for a missing score to how many samples lack one for it.
    """

    name: str
    scores: dict[str, dict[str, float]]
    asked: list[str]
    failed: dict[str, list[str]] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    def mean(self, metric: str) -> Mean:
        """Over the samples that have a value."""
        return mean_of(self.scores.get(metric, {}))

    def counted(self, metric: str) -> float | None:
        """The mean over all samples asked for, a missing one counted as 0; None where 0 would be the best value."""
        values = self.scores.get(metric, {})
        if metric in LOWER_IS_BETTER or not values or not self.asked:
            return None
        return sum(values.get(sample, 0.0) for sample in self.asked) / len(self.asked)


def read_scored(run_dir: RunPath, name: str) -> Scored:
    """Read a run's scores; metrics of which no sample has a value are left out.

    Raises:
        NotARunError: where the folder is not a run directory.
    """
    tables.read_run(run_dir)
    rows = tables.read_table(run_dir, "evaluate").to_pylist()
    scores: dict[str, dict[str, float]] = {}
    for column in score_columns():
        values = {row["sample_id"]: float(row[column]) for row in rows if _is_number(row[column])}
        if column not in _CHECKS and values:
            scores[column] = values
    asked = tables.read_table(run_dir, "samples", [])["sample_id"].to_pylist()
    failed: dict[str, list[str]] = {}
    done = {row["sample_id"] for row in rows}
    for failure in tables.read_table(run_dir, "failures", ["kind"]).to_pylist():
        place = failure["sample_id"] or failure["identity_id"]
        if place not in done:
            failed.setdefault(failure["kind"], []).append(place)
    return Scored(name, scores, asked, failed, skipped_reasons(row["skipped"] for row in rows))


def skipped_reasons(texts: Iterable[str | None]) -> dict[str, int]:
    """Each `metric: reason` of the column `skipped`, with the number of rows that say it, the commonest first."""
    found: Counter[str] = Counter()
    for text in texts:
        found.update(text.split("; ") if text else ())
    return dict(found.most_common())


def _is_number(value: object) -> bool:
    return isinstance(value, bool | int | float) and math.isfinite(float(value))
