"""Weights that any machine draws alike, so that golden values of the original networks can be compared with ours."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch


def drawn(shapes: Mapping[str, torch.Size | tuple[int, ...]], scale: float = 1.0) -> dict[str, torch.Tensor]:
    """A state dict: each value from its name alone; variances positive, norms around 1, weights scaled by fan-in."""
    return {key: _value(key, tuple(shape), scale) for key, shape in shapes.items()}


def _value(key: str, shape: tuple[int, ...], scale: float) -> torch.Tensor:
    random = np.random.default_rng(zlib.crc32(key.replace(".downsample.1.", ".norm3.").encode()))
    if key.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.long)
    if key.endswith("running_var"):
        return torch.from_numpy(random.uniform(0.5, 1.5, shape)).float()
    values = random.standard_normal(shape)
    if len(shape) == 1 and key.endswith("weight"):
        return torch.from_numpy(1 + 0.1 * values).float()
    if len(shape) <= 1:
        return torch.from_numpy(np.asarray(0.1 * values)).float()
    return torch.from_numpy(scale * values / np.sqrt(np.prod(shape[1:]))).float()


def pictures(*shape: int) -> torch.Tensor:
    """Float64 noise of 0 to 1 rounded to float32, of the given shape."""
    return torch.from_numpy(np.random.default_rng(7).random(shape)).float()
