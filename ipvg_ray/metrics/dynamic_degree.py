"""Dynamic degree: whether a video moves, by RAFT's optical flow, as VBench decides it (arXiv 2311.17982)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

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


@torch.no_grad()
def dynamic_degree(
    frames: np.ndarray, flow: Flow, *, device: str | torch.device = "cpu", batch: int = 4
) -> tuple[bool, int]:
    """Whether the sampled frames move, and how many pairs were looked at.

    It stops as soon as enough pairs move, or too few are left: more pairs could not change the answer.

    Args:
        frames: those of `frames.eight_a_second`, uint8 RGB, (n, H, W, 3).
        flow: RAFT with 20 iterations.
        batch: pairs at a time.
    """
    height, width = frames.shape[1:3]
    least, needed, total = threshold(height, width), pairs_needed(len(frames)), max(len(frames) - 1, 0)
    # Zero needed pairs are reached by the first pair that is looked at, not by none.
    moving = done = 0
    pads = padding(height, width, 8)
    while done < total:
        stop = min(done + batch, total)
        pictures = F.pad(to_tensor(frames[done : stop + 1], device), pads, mode="replicate")
        moving += int((pair_scores(flow(pictures[:-1], pictures[1:])) > least).sum())
        done = stop
        if moving >= needed:
            return True, done
        if moving + total - done < needed:
            return False, done
    return False, done
