"""Frames as the networks want them: resized, cropped, padded and normalised in plain torch, without torchvision."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_tensor(frames: np.ndarray, device: str | torch.device = "cpu") -> Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W), still 0 to 255."""
    return torch.from_numpy(np.ascontiguousarray(frames)).to(device).permute(0, 3, 1, 2).float()


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(pixels - mean) / std per channel of (N, C, H, W)."""
    shape = (1, -1, 1, 1)
    return (pixels - pixels.new_tensor(mean).view(shape)) / pixels.new_tensor(std).view(shape)


def vbench_clip(frames: np.ndarray, side: int, device: str | torch.device, *, whole: bool) -> Tensor:
    """VBench's preprocessing for CLIP-like networks: bicubic without antialiasing to the short side, centre crop.

    Args:
        frames: uint8 RGB, (N, H, W, 3).
        side: of the square, pixels.
        whole: whether the resized pixels are clamped and rounded to whole numbers. VBench resizes bytes for the overall
            consistency, and floats, which keep what overshoots, for the aesthetic quality.

    Returns:
        float32, (N, 3, side, side), normalised with CLIP's mean and deviation.
    """
    pixels = to_tensor(frames, device)
    height, width = pixels.shape[2:]
    short = min(height, width)
    size = (int(side * height / short), int(side * width / short))
    if size != (height, width):
        pixels = F.interpolate(pixels, size, mode="bicubic", align_corners=False)
        if whole:
            pixels = pixels.clamp(0, 255).round()
    top, left = (round((extent - side) / 2) for extent in size)
    pixels = pixels[:, :, top : top + side, left : left + side]
    return normalise(pixels / 255, CLIP_MEAN, CLIP_STD)


def padding(height: int, width: int, multiple: int) -> tuple[int, int, int, int]:
    """What centred padding to a multiple adds: left, right, top, bottom, as `torch.nn.functional.pad` takes it."""
    tall, wide = -height % multiple, -width % multiple
    return wide // 2, wide - wide // 2, tall // 2, tall - tall // 2
