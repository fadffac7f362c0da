"""What RAFT and AMT share: sampling at fractional pixels, and correlations of every pixel with every other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pixel_grid(like: Tensor) -> Tensor:
    """Coordinates of every pixel of (N, C, H, W): (N, 2, H, W), x before y."""
    n, _, height, width = like.shape
    rows, columns = (torch.arange(size, device=like.device, dtype=torch.float32) for size in (height, width))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y])[None].repeat(n, 1, 1, 1)


def sample(maps: Tensor, places: Tensor) -> Tensor:
    """Bilinear values of (N, C, H, W) at pixel coordinates (N, h, w, 2), x before y; 0 outside.

    Pixels are addressed by their middles rather than by the corners that the original code uses: the values are the
    same, and maps of one row or column, which small videos come to, do not divide by zero.
    """
    height, width = maps.shape[-2:]
    scale = places.new_tensor([width, height])
    return F.grid_sample(maps, (2 * places + 1) / scale - 1, align_corners=False)


class CorrelationPyramid:
    """Dot products of all feature pairs of two pictures, pooled to several sizes, to be looked up around places.

    Args:
        first, second: features, (N, C, h, w).
        levels: how many sizes, each half of the one before.
        radius: how far around a place is looked, in pixels of each size.
    """

    def __init__(self, first: Tensor, second: Tensor, *, levels: int, radius: int) -> None:
        n, channels, h, w = first.shape
        products = first.flatten(2).transpose(1, 2) @ second.flatten(2) / channels**0.5
        self._maps = [products.reshape(n * h * w, 1, *second.shape[2:])]
        for _ in range(levels - 1):
            last = self._maps[-1]
            small = min(last.shape[-2:]) < 2  # a picture below 64 pixels has no level to pool from
            self._maps.append(last[..., :0, :0] if not last.numel() or small else F.avg_pool2d(last, 2))
        steps = torch.linspace(-radius, radius, 2 * radius + 1, device=first.device)
        self._around = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)

    def __call__(self, places: Tensor) -> Tensor:
        """Correlations around (N, 2, h, w) coordinates: (N, levels · (2 · radius + 1)², h, w)."""
        n, _, h, w = places.shape
        centres = places.permute(0, 2, 3, 1).reshape(n * h * w, 1, 1, 2)
        found = []
        for level, maps in enumerate(self._maps):
            around = centres / 2**level + self._around
            values = sample(maps, around) if maps.numel() else around.new_zeros(around.shape[:3])
            found.append(values.reshape(n, h, w, -1))
        return torch.cat(found, -1).permute(0, 3, 1, 2).contiguous()
