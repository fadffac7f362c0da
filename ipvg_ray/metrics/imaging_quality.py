"""Imaging quality: MUSIQ's technical quality, trained on SPAQ, averaged over all frames as VBench does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ipvg_ray.metrics.pixels import in_chunks, to_tensor

_LONGEST = 512

Quality = Callable[[Tensor], Tensor]
"""RGB pictures, 0 to 1, (N, 3, H, W), to quality (N,), 0 to 100."""


def shrunk(pixels: Tensor) -> Tensor:
    """VBench's mode `longer`: bilinear without antialiasing to a longer side of 512 pixels, where it is longer."""
    height, width = pixels.shape[2:]
    if max(height, width) <= _LONGEST:
        return pixels
    scale = _LONGEST / max(height, width)
    return F.interpolate(pixels, (int(scale * height), int(scale * width)), mode="bilinear", align_corners=False)


@torch.no_grad()
def imaging_quality(
    frames: np.ndarray, quality: Quality, *, device: str | torch.device = "cpu", batch: int = 8
) -> float:
    """Mean quality / 100, about 0 to 1.

    Args:
        frames: all frames of the video, uint8 RGB, (N, H, W, 3).
        quality: MUSIQ.
        batch: frames at a time.
    """
    parts = in_chunks(len(frames), batch)
    found = torch.cat([quality(shrunk(to_tensor(frames[part], device)) / 255.0) for part in parts])
    return float(found.double().mean()) / 100.0
