"""The scores of a run by sample, read from its table, and which of its samples have none."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from ipvg_ray import tables
from ipvg_ray.report.lookup import Lookup
from ipvg_ray.report.progress import Progress, read_progress, score_columns
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
        failed: kind of failure to the samples or identities that it still keeps from being done.
        skipped: reason for a missing score to how many samples lack one for it.
        owners: sample to its identity.
        finished: samples that were scored, if only by some of the metrics.
    """

    name: str
    scores: dict[str, dict[str, float]]
    asked: list[str]
    failed: dict[str, list[str]] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    finished: frozenset[str] = frozenset()

    @property
    def scored(self) -> int:
        """Videos that have any score: as many as have the score that most have."""
        return max((len(values) for values in self.scores.values()), default=0)

    def mean(self, metric: str) -> Mean:
        """Over the samples that have a value."""
        return mean_of(self.scores.get(metric, {}), self.owners)

    def counted(self, metric: str) -> float | None:
        """The mean over all samples asked for, a missing or broken video counted as 0.

        Videos on which the metric is not defined are left out. None where 0 would be the best value.
        """
        values = self.scores.get(metric, {})
        counted = [sample for sample in self.asked if sample in values or sample not in self.finished]
        if metric in LOWER_IS_BETTER or not values or not counted:
            return None
        return sum(values.get(sample, 0.0) for sample in counted) / len(counted)


def read_scored(run_dir: RunPath, name: str) -> Scored:
    """Read a run's scores; metrics of which no sample has a value are left out.

    Raises:
        NotARunError: where the folder is not a run directory.
    """
    progress = read_progress(run_dir, tables.read_run(run_dir))
    columns = [column for column in score_columns() if column not in _CHECKS]
    found = Lookup.open(run_dir, "evaluate", ["sample_id", *columns, "skipped"])  # tables of older runs lack some
    rows = tables.first_of_each(found.narrow, "sample_id") if len(found) else found.narrow
    samples = rows["sample_id"].to_pylist() if len(found) else []
    scores: dict[str, dict[str, float]] = {}
    for column in set(columns) & set(rows.column_names):
        pairs = zip(samples, rows[column].to_pylist(), strict=True)
        scores[column] = {sample: float(value) for sample, value in pairs if _is_number(value)}
    asked = progress.samples["sample_id"].to_pylist()
    owners = dict(zip(asked, progress.samples["identity_id"].to_pylist(), strict=True))
    kept = {column: scores[column] for column in columns if scores.get(column)}
    return Scored(name, kept, asked, _failed(progress), skipped_reasons(rows), owners, frozenset(samples))


def _failed(progress: Progress) -> dict[str, list[str]]:
    """Kind to the samples or identities of the failures that stand."""
    failed: dict[str, dict[str, None]] = {}
    if len(progress.open_failures):
        for failure in progress.failures.narrow.take(pa.array(progress.open_failures)).to_pylist():
            place = failure["sample_id"] or failure["identity_id"] or failure["where"] or "?"
            failed.setdefault(failure["kind"], {})[place] = None
    return {kind: list(places) for kind, places in failed.items()}


def skipped_reasons(rows: pa.Table) -> dict[str, int]:
    """Each `metric: reason` of the column `skipped`, with the number of rows that say it, the commonest first."""
    found: Counter[str] = Counter()
    if "skipped" in rows.column_names:
        for entry in pc.value_counts(rows["skipped"].drop_null()).to_pylist():
            found.update(dict.fromkeys(entry["values"].split("; "), entry["counts"]))
    return dict(found.most_common())


def _is_number(value: object) -> bool:
    return isinstance(value, bool | int | float) and math.isfinite(float(value))
