"""How much a video moves, from its pixels alone: a figure to find still or flickering ones, not a published metric."""

from __future__ import annotations

import itertools

import numpy as np


def motion(frames: np.ndarray) -> float:
    """Mean absolute difference of consecutive frames, pixels scaled 0 to 1; 0 for a single frame.

    Args:
        frames: uint8, (N, H, W, 3), N ≥ 1.

    Raises:
        ValueError: for other frames.
    """
    if frames.ndim != 4 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; uint8 (N, H, W, 3) with N ≥ 1 is needed")
    # Pair by pair and in 16 bits: a video of 81 frames at 832x480 as float64 would take 780 MB.
    pairs = itertools.pairwise(frames)
    steps = [float(np.abs(after.astype(np.int16) - before).mean()) for before, after in pairs]
    return float(np.mean(steps)) / 255 if steps else 0.0
