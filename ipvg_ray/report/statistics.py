"""Means with intervals, and comparisons of two runs on the same samples. Fixed seeds: the same numbers every time.

Prompts of one identity resemble each other more than those of two: intervals and p values therefore draw whole
identities (a cluster bootstrap; Cameron and Miller, "A Practitioner's Guide to Cluster-Robust Inference", 2015).
"""

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

Owners = Mapping[str, str]
"""Sample to its identity; a sample that is not in it stands for itself."""


class GateError(UserError, ValueError):
    """A gate that cannot be read, or that names a score which is not there."""


@dataclass(frozen=True)
class Mean:
    """A mean with its bootstrap interval at 95 %; None where there is no value, or no second identity to draw."""

    count: int
    mean: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Pairing:
    """The second run against the first, on the samples that both have.

    Attributes:
        count: such samples.
        first, second: each run's mean over them; None where there is none.
        only_first, only_second: samples that have a value in one run alone.
        difference: mean of second minus first, with its interval; None where there is no such sample.
        p: of a two-sided sign-flip permutation test that the differences lie around 0.
        wins: share of samples on which the second is better, equal ones counted half.
    """

    count: int
    first: float | None
    second: float | None
    only_first: int
    only_second: int
    difference: Mean
    p: float | None
    wins: float | None


def mean_of(values: Values, owners: Owners | None = None) -> Mean:
    """The mean of all values, and the range in which 95 % of the means lie when identities are drawn anew."""
    values = _finite(values)
    if not values:
        return Mean(0, None)
    mean = math.fsum(values.values()) / len(values)
    sums, counts = _by_identity(values, owners or {})
    if len(sums) == 1:
        return Mean(len(values), mean)
    low, high = np.quantile(_resampled(sums, counts), [0.025, 0.975])
    return Mean(len(values), mean, float(low), float(high))


def paired(first: Values, second: Values, *, lower_is_better: bool = False, owners: Owners | None = None) -> Pairing:
    """Compare two runs sample by sample."""
    first, second = _finite(first), _finite(second)
    shared = sorted(first.keys() & second.keys())
    alone = len(first) - len(shared), len(second) - len(shared)
    if not shared:
        return Pairing(0, None, None, *alone, Mean(0, None), None, None)
    means = [float(np.mean([run[sample] for sample in shared])) for run in (first, second)]
    differences = {sample: second[sample] - first[sample] for sample in shared}
    numbers = np.array(list(differences.values()))
    better = np.sign(-numbers if lower_is_better else numbers)
    p = _sign_flip(_by_identity(differences, owners or {})[0])
    change = mean_of(differences, owners)
    return Pairing(len(shared), means[0], means[1], *alone, change, p, float(((better + 1) / 2).mean()))


def _finite(values: Values) -> dict[str, float]:
    return {sample: value for sample, value in values.items() if math.isfinite(value)}


def _by_identity(values: Values, owners: Owners) -> tuple[np.ndarray, np.ndarray]:
    """Of each identity the sum of its samples' values, and how many they are."""
    groups: dict[str, list[float]] = {}
    for sample, value in values.items():
        groups.setdefault(owners.get(sample, sample), []).append(value)
    return np.array([math.fsum(group) for group in groups.values()]), np.array([len(g) for g in groups.values()])


def _sign_flip(numbers: np.ndarray) -> float:
    """How often random signs of the identities' sums move their mean at least as far from 0; all signs where there are
    few identities, else a sample of them."""
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


def _resampled(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means over the samples of as many identities drawn with replacement, often."""
    random = np.random.default_rng(_SEED)
    parts = []
    for rows in _portions(len(sums)):
        drawn = random.integers(0, len(sums), (rows, len(sums)))
        parts.append(sums[drawn].sum(1) / counts[drawn].sum(1))
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

    def holds(self, found: Mapping[str, Pairing], *, allow_missing: bool = False) -> bool:
        """Whether the mean difference lies beyond the bound.

        Args:
            allow_missing: whether the second run may lack the score of samples that have it in the first.

        Raises:
            GateError: where the two runs share no value of the score, so that nothing is known, or the second has lost
                some, which may well be its worst ones.
        """
        pairing = found.get(self.score)
        if pairing is None or pairing.difference.mean is None:
            raise GateError(f"--fail-if {self}: the two runs share no sample with a value of {self.score}")
        if pairing.only_first and not allow_missing:
            raise GateError(
                f"--fail-if {self}: {pairing.only_first} samples have {self.score} in the first run alone; "
                "finish the second run, or accept that with --allow-missing"
            )
        difference = pairing.difference.mean
        return difference < self.bound if self.sign == "<" else difference > self.bound

    def __str__(self) -> str:
        return f"{self.score}{self.sign}{self.bound:g}"
