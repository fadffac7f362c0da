"""What a metric of whole videos is, and batches that go over the bounds between videos. Knows no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from ipvg_ray.metrics.frames import Rule

Result = TypeVar("Result")
Score = float | bool | None
"""None where the metric is not defined for the video."""


@dataclass(frozen=True, eq=False)
class Sampled:
    """A video as a metric sees it.

    Attributes:
        frames: those that the metric's rule wants, uint8 RGB, (n, H, W, 3), n ≥ 1.
        prompt: the text that the video was made from.
    """

    frames: np.ndarray
    prompt: str = ""


class VideoMetric(Protocol):
    """Scores videos by some of their frames, several videos at a time."""

    @property
    def rule(self) -> Rule:
        """Which frames of a video it wants."""
        ...

    def score(self, videos: Sequence[Sampled]) -> list[Score]:
        """One score a video, in order; a video's score does not depend on the others' beyond rounding."""
        ...


class FaceMetric(Protocol):
    """Compares the faces of videos with the faces they should be, several videos at a time."""

    def score(self, videos: Sequence[Sequence[np.ndarray]], references: Sequence[np.ndarray]) -> list[Score]:
        """One score a video, in order.

        Args:
            videos: of each the faces of its sampled frames that show one, aligned, uint8 RGB (224, 224, 3).
            references: of each the reference's face, aligned in the same way.
        """
        ...


def in_batches(
    videos: Sequence[Sequence[np.ndarray] | np.ndarray], size: int, run: Callable[[np.ndarray], Iterable[Result]]
) -> list[list[Result]]:
    """Run the items of several videos, such as frames or pairs of frames, whichever video they are of, batch by batch.

    Only items of one shape share a batch.

    Args:
        videos: of each its items.
        size: items in a batch at most.
        run: stacked items, (n, ...), to one result an item.

    Returns:
        Of each video its items' results, in order.
    """
    alike: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for video, items in enumerate(videos):
        for place, item in enumerate(items):
            alike.setdefault(item.shape, []).append((video, place))
    found: dict[tuple[int, int], Result] = {}
    for places in alike.values():
        for part in in_chunks(len(places), size):
            stacked = np.stack([videos[video][place] for video, place in places[part]])
            found.update(zip(places[part], run(stacked), strict=True))
    return [[found[video, place] for place in range(len(items))] for video, items in enumerate(videos)]


def in_chunks(count: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover `count` items."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
