"""Scores in one glance: mean, median, range and distribution of each column of the evaluate table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ipvg_ray import schema
from ipvg_ray.report.progress import score_columns
from ipvg_ray.report.statistics import LOWER_IS_BETTER

MAX_BINS = 28
NAMES = {
    "arc_sim": "Arc-Sim",
    "arc_frames": "Frames with a face",
    "frames_ok": "Frames as configured",
    "motion": "Motion",
    "cur_sim": "Cur-Sim",
    "face_distance": "FID (face)",
    "human_identity": "Human identity",
    "overall_consistency": "OC",
    "aesthetic_quality": "AQ",
    "imaging_quality": "IQ",
    "motion_smoothness": "MS",
    "dynamic_degree": "DD",
    "clip_score": "CLIP score",
    "clip_score_tpige": "CLIP score (TPIGE)",
    "gme_score": "GME score",
}


@dataclass(frozen=True)
class Score:
    """One score over all samples.

    Attributes:
        column, label, doc: its column, the name people read, and what it means.
        count: samples that have it, NaN left out.
        mean, median, low, high: of those; None where there are none.
        bars: share of the fullest of equal bins from low to high, 0 to 1 each; none where all are the same.
        truth: whether it is a truth value, so that the mean is the share that holds.
        whole: whether it counts something.
        lower_is_better: whether the best value is the lowest.
    """

    column: str
    label: str
    doc: str
    count: int
    mean: float | None
    median: float | None
    low: float | None
    high: float | None
    bars: tuple[float, ...]
    truth: bool
    whole: bool
    lower_is_better: bool

    def text(self, value: float) -> str:
        """A figure of this score as text: three decimals, or of counts one where there is need for it."""
        return f"{value:.1f}".removesuffix(".0") if self.whole else f"{value:.3f}"


def label(column: str) -> str:
    """What people read for a column's name."""
    return NAMES.get(column, column.replace("_", " ").capitalize())


def summarise(rows: pa.Table) -> list[Score]:
    """Summaries of the scores among a table's columns, in the schema's order; one row is one sample."""
    return [_summary(column, rows[column]) for column in score_columns() if column in rows.column_names]


def _summary(column: str, values: pa.ChunkedArray) -> Score:
    field = schema.table("evaluate").columns[column]
    doc = (field.metadata or {}).get(b"doc", b"").decode()
    numbers = np.asarray(pc.cast(values.drop_null(), pa.float64()).to_numpy())
    numbers = numbers[np.isfinite(numbers)]
    figures: dict[str, Any] = dict.fromkeys(("mean", "median", "low", "high"))
    if len(numbers):
        figures = {
            "mean": float(numbers.mean()),
            "median": float(np.median(numbers)),
            "low": float(numbers.min()),
            "high": float(numbers.max()),
        }
    return Score(
        column,
        label(column),
        doc,
        len(numbers),
        **figures,
        bars=_bars(numbers),
        truth=pa.types.is_boolean(field.type),
        whole=pa.types.is_integer(field.type),
        lower_is_better=column in LOWER_IS_BETTER,
    )


def _bars(numbers: np.ndarray) -> tuple[float, ...]:
    if not len(numbers) or numbers.min() == numbers.max():
        return ()
    bins = min(MAX_BINS, 2 * math.isqrt(len(numbers)) + 6)
    counts = np.histogram(numbers, bins=bins)[0]
    return tuple(float(count) for count in counts / counts.max())
