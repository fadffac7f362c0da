"""Aesthetic quality: LAION's linear head on CLIP ViT-L/14, averaged over all frames as VBench does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipvg_ray.metrics.clip_score import load_pretrained
from ipvg_ray.metrics.nets import weights
from ipvg_ray.metrics.pixels import in_chunks, vbench_clip


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

    def __init__(self, vision: Any, head: nn.Linear, batch: int = 32) -> None:
        self.vision, self.head, self.batch = vision, head, batch

    @torch.no_grad()
    def rate(self, frames: np.ndarray) -> Tensor:
        """Each frame's rating, about 0 to 10, (N,), of uint8 RGB (N, H, W, 3)."""
        side, device = int(self.vision.config.image_size), self.vision.device
        rated = []
        for part in in_chunks(len(frames), self.batch):
            features = self.vision(pixel_values=vbench_clip(frames[part], side, device, whole=False)).image_embeds
            rated.append(self.head(F.normalize(features.float(), dim=-1))[:, 0])
        return torch.cat(rated)

    def score(self, frames: np.ndarray) -> float:
        """Mean rating / 10, about 0 to 1."""
        return float((self.rate(frames) / 10).double().mean())
