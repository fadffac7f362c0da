"""Aesthetic quality: LAION's linear head on CLIP ViT-L/14, averaged over all frames as VBench does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ipvg_ray.metrics.clip_score import load_pretrained
from ipvg_ray.metrics.frames import all_frames
from ipvg_ray.metrics.metric import Sampled, Score, in_batches
from ipvg_ray.metrics.nets import weights
from ipvg_ray.metrics.pixels import vbench_clip


def load_head(path: Path) -> nn.Linear:
    """The head of `sa_0_4_vit_l_14_linear.pth`: features to one number. Raises weights.WeightsError."""
    state = weights.read(path)
    features = weights.require(state, "weight", path).shape[1]
    return weights.fill(lambda: nn.Linear(features, 1), state, path)


def load_vision(folder: Path, device: str = "cpu") -> Any:
    """CLIP's picture encoder with projection from a transformers folder. Raises WeightsError."""
    from transformers import CLIPVisionModelWithProjection

    return load_pretrained(CLIPVisionModelWithProjection, folder, device)


class AestheticQuality:
    """Rates frames.

    Args:
        vision: a CLIP picture encoder with projection (transformers), on the device to use.
        head: features to a rating.
        batch: frames at a time.
    """

    rule = staticmethod(all_frames)

    def __init__(self, vision: Any, head: nn.Linear, batch: int = 32) -> None:
        self.vision, self.head, self.batch = vision, head, batch

    def score(self, videos: Sequence[Sampled]) -> list[Score]:
        """Mean rating / 10 of each video, about 0 to 1."""
        rated = in_batches([video.frames for video in videos], self.batch, self.rate)
        return [float(np.mean(ratings)) / 10 for ratings in rated]

    @torch.no_grad()
    def rate(self, frames: np.ndarray) -> list[float]:
        """Each frame's rating, about 0 to 10, of uint8 RGB (N, H, W, 3)."""
        pixels = vbench_clip(frames, int(self.vision.config.image_size), self.vision.device, whole=False)
        features = self.vision(pixel_values=pixels).image_embeds
        found: list[float] = self.head(F.normalize(features.float(), dim=-1))[:, 0].tolist()
        return found
