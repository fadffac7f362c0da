"""Means with intervals, and comparisons of two runs on the same samples. Fixed seeds: the same numbers every time."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ipvg_ray.errors import UserError

_DRAWS, _SEED = 10_000, 2025
_ROWS_AT_ONCE = 2_000_000
LOWER_IS_BETTER = frozenset({"face_distance"})
"""Scores of which less is better."""

Values = Mapping[str, float]
"""Sample to score."""


class GateError(UserError, ValueError):
    """A gate that cannot be read, or that names a score which is not there."""


@dataclass(frozen=True)
class Mean:
    """A mean with its bootstrap interval at 95 %; None where there is no value."""

    count: int
    mean: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Pairing:
    """The second run against the first, on the samples that both have.

    Attributes:
        count: such samples.
        difference: mean of second minus first, with its interval; None where there is no such sample.
        p: of a two-sided sign-flip permutation test that the differences lie around 0.
        wins: share of samples on which the second is better, equal ones counted half.
    """

    count: int
    difference: Mean
    p: float | None
    wins: float | None


def mean_of(values: Values) -> Mean:
    """The mean of all values, and the range in which 95 % of the means of resampled values lie."""
    numbers = np.array([value for value in values.values() if math.isfinite(value)])
    if not len(numbers):
        return Mean(0, None)
    if len(numbers) == 1:
        return Mean(1, float(numbers[0]))
    means = _resampled(numbers)
    low, high = np.quantile(means, [0.025, 0.975])
    return Mean(len(numbers), float(numbers.mean()), float(low), float(high))


def paired(first: Values, second: Values, *, lower_is_better: bool = False) -> Pairing:
    """Compare two runs sample by sample."""
    shared = sorted(set(first) & set(second))
    differences = {sample: second[sample] - first[sample] for sample in shared}
    differences = {sample: value for sample, value in differences.items() if math.isfinite(value)}
    if not differences:
        return Pairing(0, Mean(0, None), None, None)
    numbers = np.array(list(differences.values()))
    better = np.sign(-numbers if lower_is_better else numbers)
    return Pairing(len(numbers), mean_of(differences), _sign_flip(numbers), float(((better + 1) / 2).mean()))


def _sign_flip(numbers: np.ndarray) -> float:
    """How often random signs move the mean at least as far from 0; all of them where there are few, else a sample."""
    found = abs(float(numbers.mean())) - 1e-12
    count = len(numbers)
    if count <= 12:
        signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
        return float((np.abs((signs * numbers).mean(1)) >= found).mean())
    flips = np.zeros(0)
    random = np.random.default_rng(_SEED)
    for rows in _portions(count):
        signs = 1 - 2 * random.integers(0, 2, (rows, count), np.int8)
        flips = np.append(flips, np.abs((signs * numbers).mean(1)))
    return float(((flips >= found).sum() + 1) / (len(flips) + 1))


def _resampled(numbers: np.ndarray) -> np.ndarray:
    """Means of as many values drawn with replacement, often."""
    random = np.random.default_rng(_SEED)
    parts = [
        numbers[random.integers(0, len(numbers), (rows, len(numbers)))].mean(1) for rows in _portions(len(numbers))
    ]
    return np.concatenate(parts)


def _portions(count: int) -> list[int]:
    """So many draws at a time that they fit into memory."""
    each = max(1, min(_DRAWS, _ROWS_AT_ONCE // count))
    return [min(each, _DRAWS - start) for start in range(0, _DRAWS, each)]


@dataclass(frozen=True)
class Gate:
    """A condition on a mean difference, such as `arc_sim<-0.01`, that ends a check with an error where it holds."""

    score: str
    sign: str
    bound: float

    @classmethod
    def read(cls, text: str) -> Gate:
        """From `score<number` or `score>number`. Raises GateError."""
        match = re.fullmatch(r"\s*([a-z_0-9]+)\s*([<>])\s*([-+]?[0-9.]+(?:[eE][-+]?\d+)?)\s*", text)
        try:
            return cls(match[1], match[2], float(match[3]))  # type: ignore[index]
        except (TypeError, ValueError):
            raise GateError(f"--fail-if {text!r}: write score<number or score>number, such as arc_sim<-0.01") from None

    def holds(self, found: Mapping[str, Pairing]) -> bool:
        """Whether the mean difference lies beyond the bound.

        Raises:
            GateError: where the two runs share no value of the score, so that nothing is known.
        """
        pairing = found.get(self.score)
        if pairing is None or pairing.difference.mean is None:
            raise GateError(f"--fail-if {self}: the two runs share no sample with a value of {self.score}")
        difference = pairing.difference.mean
        return difference < self.bound if self.sign == "<" else difference > self.bound

    def __str__(self) -> str:
        return f"{self.score}{self.sign}{self.bound:g}"
