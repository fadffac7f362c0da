"""The weighted sum by which TPIGE ranks methods; the single scores are averaged over videos first, or of one video."""

from __future__ import annotations

from collections.abc import Mapping

WEIGHTS = {"gme_score": 0.3, "cur_sim": 0.2, "arc_sim": 0.2, "motion_smoothness": 0.15, "imaging_quality": 0.15}
"""They sum to 1, and each score lies about 0 to 1."""


def overall(scores: Mapping[str, float | None]) -> float | None:
    """The sum, or None where one of its scores is missing: a sum of some of them would be another metric."""
    values = {name: scores.get(name) for name in WEIGHTS}
    if any(value is None for value in values.values()):
        return None
    return sum(weight * float(values[name] or 0.0) for name, weight in WEIGHTS.items())
