"""Which frames of a video each metric looks at. A video is decoded once; every metric takes its own frames from it.

The rules are those of the published evaluation codes: ConsisID (16 frames, ends included), its CLIP score (16, last one
left out), TPIGE (at most 16 or 32), VBench (middles of 8 intervals; every n-th; even ones). They differ on purpose.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Rule = Callable[[int, float], list[int]]
"""Number of frames and frames per second to the indices of the frames wanted, in order, perhaps some of them twice."""


@dataclass(frozen=True, eq=False)
class Clip:
    """A decoded video.

    Attributes:
        frames: uint8 RGB, (N, H, W, 3), N ≥ 1.
        fps: frames per second, above 0.
    """

    frames: np.ndarray
    fps: float

    def __post_init__(self) -> None:
        if self.frames.dtype != np.uint8 or self.frames.ndim != 4 or self.frames.shape[3] != 3 or not self.frames.size:
            found = f"{self.frames.dtype} {self.frames.shape}"
            raise ValueError(f"frames are {found}; uint8 (N, H, W, 3) with N ≥ 1 is needed")
        if not self.fps > 0:
            raise ValueError(f"fps is {self.fps}; it must be above 0")

    def take(self, rule: Rule) -> np.ndarray:
        """The frames that a rule wants, uint8 RGB, (n, H, W, 3)."""
        numbers = rule(len(self.frames), self.fps)
        if numbers == [*range(len(self.frames))]:
            return self.frames  # indexing would copy a whole video
        taken: np.ndarray = self.frames[numbers]
        return taken


def ends(count: int) -> Rule:
    """`count` frames from the first to the last, both included, positions cut to whole numbers (ConsisID)."""
    return lambda n, fps: np.linspace(0, n - 1, count).astype(int).tolist()


def starts(count: int) -> Rule:
    """The first frame of each of `count` equal intervals (ConsisID's CLIP score)."""
    return lambda n, fps: [int(i * n / count) for i in range(count)]


def at_most(count: int) -> Rule:
    """All frames of a video that has no more than `count`, else as `ends` (TPIGE)."""
    return lambda n, fps: list(range(n)) if n <= count else ends(count)(n, fps)


def middles(count: int) -> Rule:
    """The middle frame of each of `count` intervals; a shorter video repeats its last one (VBench)."""

    def rule(n: int, fps: float) -> list[int]:
        bounds = np.linspace(0, n, min(count, n) + 1).astype(int)
        found = [int(low + high - 1) // 2 for low, high in itertools.pairwise(bounds)]
        return found + [found[-1]] * (count - len(found))

    return rule


def all_frames(n: int, fps: float) -> list[int]:
    """Every frame."""
    return list(range(n))


def eight_a_second(n: int, fps: float) -> list[int]:
    """Every k-th frame, k = fps / 8 rounded to the even of two equally near numbers, at least 1 (VBench's RAFT)."""
    return list(range(0, n, max(1, round(fps / 8))))
