"""The miniatures of the first frame, made together since HyperLoRA is cut to the other two, and made-up faces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ipvg_ray.models.mini import clip_vision, hyperlora, sdxl

torch.set_num_threads(1)  # networks this small are slower with more, much slower on a busy machine


def make_minis(root: Path, seed: int = 0) -> Path:
    """CLIP vision, SDXL and HyperLoRA below `root`; takes a second."""
    for maker in (clip_vision, sdxl, hyperlora):
        maker.make(root, seed)
    return root


def embedding(number: int) -> torch.Tensor:
    """A made-up ArcFace embedding, (512,), of length 1."""
    values = torch.randn(512, generator=torch.Generator().manual_seed(number))
    return torch.nn.functional.normalize(values, dim=0)


def face(number: int, side: int = 72) -> np.ndarray:
    """A made-up id picture: smooth colours on grey, RGB uint8, (side, side, 3)."""
    generator = np.random.default_rng(number)
    coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((side // 6, side // 6, 1), np.uint8))
