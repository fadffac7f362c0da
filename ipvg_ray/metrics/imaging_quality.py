"""Imaging quality: MUSIQ's technical quality, trained on SPAQ, averaged over all frames as VBench does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ipvg_ray.metrics.frames import all_frames
from ipvg_ray.metrics.metric import Sampled, Score, in_batches
from ipvg_ray.metrics.pixels import to_tensor

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


class ImagingQuality:
    """Rates frames.

    Args:
        quality: MUSIQ, on the device to use.
        batch: frames at a time.
    """

    rule = staticmethod(all_frames)

    def __init__(self, quality: Quality, *, device: str | torch.device = "cpu", batch: int = 8) -> None:
        self.quality, self.device, self.batch = quality, device, batch

    def score(self, videos: Sequence[Sampled]) -> list[Score]:
        """Mean quality / 100 of each video, about 0 to 1."""
        rated = in_batches([video.frames for video in videos], self.batch, self._rate)
        return [float(np.mean(ratings)) / 100.0 for ratings in rated]

    @torch.no_grad()
    def _rate(self, frames: np.ndarray) -> list[float]:
        found: list[float] = self.quality(shrunk(to_tensor(frames, self.device)) / 255.0).tolist()
        return found
