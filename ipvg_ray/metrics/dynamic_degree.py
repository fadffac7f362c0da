"""Dynamic degree: whether a video moves, by RAFT's optical flow, as VBench decides it (arXiv 2311.17982)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ipvg_ray.metrics.frames import eight_a_second
from ipvg_ray.metrics.metric import Sampled, Score, in_batches
from ipvg_ray.metrics.pixels import padding, to_tensor

Flow = Callable[[Tensor, Tensor], Tensor]
"""Two batches of RGB pictures, 0 to 255, (N, 3, H, W) with H and W multiples of 8, to flow in pixels (N, 2, H, W)."""

_SHARE = 0.05


def threshold(height: int, width: int) -> float:
    """Pixels that a pair must move by to count."""
    return 6.0 * min(height, width) / 256.0


def pairs_needed(frames: int) -> int:
    """How many pairs of consecutive sampled frames must move, of so many sampled frames."""
    return round(4 * (frames / 16.0))


def pair_scores(flow: Tensor) -> Tensor:
    """Mean magnitude of the largest 5 % of each flow field: (N, 2, H, W) to (N,), pixels."""
    lengths = flow.square().sum(1).sqrt().flatten(1)
    return lengths.topk(max(1, int(lengths.shape[1] * _SHARE)), dim=1).values.mean(1)


@dataclass(eq=False)
class Verdict:
    """Whether a video moves, as far as it has been looked at.

    Attributes:
        frames: the sampled ones, uint8 RGB, (n, H, W, 3).
        looked: pairs looked at, from the first on; moving: those of them that move.
        moves: the answer; None while it is open.
    """

    frames: np.ndarray
    looked: int = 0
    moving: int = 0
    moves: bool | None = None

    def __post_init__(self) -> None:
        if self.left == 0:
            self.moves = False

    @property
    def left(self) -> int:
        """Pairs not looked at."""
        return len(self.frames) - 1 - self.looked

    def next(self, count: int) -> list[np.ndarray]:
        """The next pairs at most so many, (2, H, W, 3) each."""
        last = self.looked + min(count, self.left)
        return [self.frames[i : i + 2] for i in range(self.looked, last)]

    def take(self, moves: Sequence[bool]) -> None:
        """Count the next pairs. The answer is there as soon as enough move, or too few are left: more change nothing.

        Zero needed pairs are reached by the first pair that is looked at, not by none.
        """
        self.looked, self.moving = self.looked + len(moves), self.moving + sum(moves)
        needed = pairs_needed(len(self.frames))
        if self.moving >= needed:
            self.moves = True
        elif self.moving + self.left < needed:
            self.moves = False


class DynamicDegree:
    """Looks at pairs of sampled frames, of each video from its first on, until its answer is sure.

    Args:
        flow: RAFT with 20 iterations, on the device to use.
        batch: pairs at a time, shared out evenly among the videos whose answer is still open.
    """

    rule = staticmethod(eight_a_second)

    def __init__(self, flow: Flow, *, device: str | torch.device = "cpu", batch: int = 4) -> None:
        self.flow, self.device, self.batch = flow, device, batch

    def score(self, videos: Sequence[Sampled]) -> list[Score]:
        """Whether each video moves."""
        return [verdict.moves for verdict in self.decide(videos)]

    def decide(self, videos: Sequence[Sampled]) -> list[Verdict]:
        """As `score`, with how many pairs it took."""
        verdicts = [Verdict(video.frames) for video in videos]
        while undecided := [verdict for verdict in verdicts if verdict.moves is None]:
            share = max(1, self.batch // len(undecided))
            asked = [verdict.next(share) for verdict in undecided]
            for verdict, moves in zip(undecided, in_batches(asked, self.batch, self._move), strict=True):
                verdict.take(moves)
        return verdicts

    @torch.no_grad()
    def _move(self, pairs: np.ndarray) -> list[bool]:
        """Whether each pair moves: (N, 2, H, W, 3) to N."""
        height, width = pairs.shape[2:4]
        pads = padding(height, width, 8)
        ends = (F.pad(to_tensor(pairs[:, i], self.device), pads, mode="replicate") for i in (0, 1))
        found: list[bool] = (pair_scores(self.flow(*ends)) > threshold(height, width)).tolist()
        return found
