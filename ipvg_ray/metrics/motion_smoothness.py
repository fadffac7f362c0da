"""Motion smoothness: how well every second frame is predicted from its neighbours, as VBench computes it with AMT-S."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ipvg_ray.metrics.pixels import in_chunks, padding, to_tensor

Between = Callable[[Tensor, Tensor], Tensor]
"""Two batches of RGB pictures, 0 to 1, (N, 3, H, W) with H and W multiples of 16, to the pictures halfway."""


@torch.no_grad()
def motion_smoothness(
    frames: np.ndarray, between: Between, *, device: str | torch.device = "cpu", batch: int = 4
) -> float | None:
    """(255 - mean absolute difference of predicted and real odd frames) / 255, 0 to 1; None below three frames.

    Args:
        frames: all frames of the video, uint8 RGB, (N, H, W, 3). The last one is not used where N is even.
        between: AMT-S.
        batch: predictions at a time.
    """
    count = (len(frames) - 1) // 2
    if count < 1:
        return None
    height, width = frames.shape[1:3]
    pads = padding(height, width, 16)
    differences = []
    for part in in_chunks(count, batch):
        even = to_tensor(frames[2 * part.start : 2 * part.stop + 1 : 2], device) / 255.0
        even = F.pad(even, pads, mode="replicate")
        predicted = between(even[:-1], even[1:])[..., pads[2] : pads[2] + height, pads[0] : pads[0] + width]
        whole = (predicted * 255.0).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()  # cut, as the original does
        real = frames[2 * part.start + 1 : 2 * part.stop : 2]
        differences += np.abs(whole.astype(np.int16) - real).mean((1, 2, 3)).tolist()
    return float((255.0 - np.mean(differences)) / 255.0)
