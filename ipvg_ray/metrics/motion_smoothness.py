"""Motion smoothness: how well every second frame is predicted from its neighbours, as VBench computes it with AMT-S."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ipvg_ray.metrics.frames import all_frames
from ipvg_ray.metrics.metric import Sampled, Score, in_batches
from ipvg_ray.metrics.pixels import padding, to_tensor

Between = Callable[[Tensor, Tensor], Tensor]
"""Two batches of RGB pictures, 0 to 1, (N, 3, H, W) with H and W multiples of 16, to the pictures halfway."""


class MotionSmoothness:
    """Predicts every odd frame from the even ones beside it. The last frame is not used where their number is even.

    Args:
        between: AMT-S, on the device to use.
        batch: predictions at a time.
    """

    rule = staticmethod(all_frames)

    def __init__(self, between: Between, *, device: str | torch.device = "cpu", batch: int = 4) -> None:
        self.between, self.device, self.batch = between, device, batch

    def score(self, videos: Sequence[Sampled]) -> list[Score]:
        """(255 - mean absolute difference of predicted and real odd frames) / 255 of each video, 0 to 1.

        None below three frames.
        """
        threes = [[v.frames[odd - 1 : odd + 2] for odd in range(1, len(v.frames) - 1, 2)] for v in videos]
        differences = in_batches(threes, self.batch, self._differences)
        return [float((255.0 - np.mean(found)) / 255.0) if found else None for found in differences]

    @torch.no_grad()
    def _differences(self, threes: np.ndarray) -> list[float]:
        """Mean absolute difference, 0 to 255, of each middle frame from its prediction: (N, 3, H, W, 3) to N."""
        height, width = threes.shape[2:4]
        pads = padding(height, width, 16)
        ends = (F.pad(to_tensor(threes[:, i], self.device) / 255.0, pads, mode="replicate") for i in (0, 2))
        predicted = self.between(*ends)[..., pads[2] : pads[2] + height, pads[0] : pads[0] + width]
        whole = (predicted * 255.0).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()  # cut, as the original does
        found: list[float] = np.abs(whole.astype(np.int16) - threes[:, 1]).mean((1, 2, 3)).tolist()
        return found
