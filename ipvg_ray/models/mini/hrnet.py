"""A miniature HRNetV2 in the layout of the LIP checkpoint: blots of person and background that follow the picture."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ipvg_ray.models.hrnet import CONFIGS, HRNet

_LOGIT_SCALE, _BACKGROUND = 2.0, 1.5  # wide enough that the person's probability covers most of 0 to 1


def make(root: Path, seed: int = 0) -> None:
    """Write `<root>/mini-hrnet.pth`, 20 classes; equal seeds give equal bytes."""
    with torch.device("meta"):
        model = HRNet(CONFIGS["mini"])
    generator = torch.Generator().manual_seed(seed)
    state = {name: _value(name, tensor.shape, generator) for name, tensor in model.state_dict().items()}
    # Background against 19 parts: even odds where the features say nothing, and more for the parts, one of which is
    # always the best, where they say much.
    state["last_layer.3.bias"][0] = math.log(19) + _BACKGROUND
    root.mkdir(parents=True, exist_ok=True)
    torch.save({f"model.{name}": tensor for name, tensor in state.items()}, root / "mini-hrnet.pth")


def _value(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    kind = name.rpartition(".")[2]
    if kind == "num_batches_tracked":
        return torch.zeros((), dtype=torch.long)
    if len(shape) == 4:
        gain = _LOGIT_SCALE if name.startswith("last_layer.3") else math.sqrt(2)
        weight = torch.randn(shape, generator=generator) * gain / math.sqrt(shape[1] * shape[2] * shape[3])
        # Features are above 0, so filters that sum to 0 over their inputs keep a random network's outputs around 0.
        return weight - weight.mean(dim=1, keepdim=True) if name != "conv1.weight" else weight
    return torch.ones(shape) if kind in ("weight", "running_var") else torch.zeros(shape)
