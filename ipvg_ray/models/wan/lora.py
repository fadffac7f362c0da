"""Low-rank adapters (Hu et al., "LoRA", arXiv 2106.09685) added to the weights of a Wan transformer for good.

The files that are in use name their keys in three ways:

    diffusion_model.blocks.0.self_attn.q.lora_down.weight    the authors' names (lightx2v, CausVid, self-forcing);
                                                             also lora_A, and .alpha, .diff, .diff_b, .diff_m
    transformer.blocks.0.attn1.to_q.lora_A.weight            diffusers' names
    lora_unet_blocks_0_self_attn_q.lora_down.weight          kohya's, dots become underscores

`diff`, `diff_b` and `diff_m` are whole differences, of a weight, a bias and a block's modulation. Step-distilled files
bring them beside their pairs; leaving them out would give another network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipvg_ray.models.wan.errors import WanError

_PREFIX = re.compile(r"^(model\.)?(diffusion_model|transformer|base_model\.model)\.")
_KEY = re.compile(
    r"(?P<module>.+?)\.(?P<part>(lora_A|lora_B|lora_down|lora_up)(\.default)?\.weight|lora_B\.bias|alpha|diff|diff_b|diff_m)"
)
_DOWN, _UP = ("lora_A", "lora_down"), ("lora_B", "lora_up")
_KOHYA = "lora_unet_"
_FLAT = re.compile(r"_?(?P<block>(vace_)?blocks)_(?P<number>\d+)_(?P<part>self_attn|cross_attn|ffn)_(?P<rest>\w+)")
_FLAT_OUTSIDE = re.compile(r"_?(?P<part>text_embedding|time_embedding|time_projection|head)_(?P<rest>\w+)")


@dataclass
class _Change:
    """What a file changes of one parameter; `keys` as the file has them."""

    keys: list[str]
    down: Tensor | None = None
    up: Tensor | None = None
    alpha: Tensor | None = None
    whole: Tensor | None = None

    def delta(self, shape: torch.Size, device: torch.device) -> Tensor:
        """What to add, float32. Raises ValueError where the parts do not make up `shape`."""
        total = torch.zeros(shape, device=device)
        if self.whole is not None:
            if self.whole.shape != shape:
                raise ValueError(f"is {tuple(self.whole.shape)}")
            total += self.whole.to(device, torch.float32)
        if self.down is None and self.up is None and self.alpha is None:
            return total
        if self.down is None or self.up is None:
            raise ValueError("lacks the other half of its pair")
        rank = len(self.down)
        if (*self.up.shape[:2], *self.down.shape[1:]) != (shape[0], rank, *shape[1:]):
            raise ValueError(f"makes {tuple(self.up.shape)} times {tuple(self.down.shape)}")
        scale = self.alpha.item() / rank if self.alpha is not None else 1.0
        up, down = (half.to(device, torch.float32).flatten(1) for half in (self.up, self.down))
        return total + scale * (up @ down).view(shape)


def fuse(transformer: Any, file: Path, scale: float) -> None:
    """Add a file's adapters to the weights, in place; in float32, then rounded to each weight's own type.

    Args:
        transformer: a diffusers Wan or VACE transformer, its weights whole and not yet in 8 bits.
        file: safetensors.
        scale: of all that the file adds.

    Raises:
        WanError: for a key that the transformer has no weight for, and for one of another shape; the transformer is
            then as it was. For a file that is none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise WanError(f"{file} cannot be read as safetensors: {error}") from error
    parameters: dict[str, Tensor] = dict(transformer.named_parameters())
    changes = _changes(state, parameters, file)
    for check in (True, False):  # all are looked at before one is made
        for name, change in changes.items():
            weight = parameters[name]
            device = torch.device("meta") if check else weight.device
            try:
                delta = change.delta(weight.shape, device)
            except ValueError as error:
                raise WanError(f"{file}: {change.keys[0]} {error}, and {name} is {tuple(weight.shape)}") from None
            if not check:
                with torch.no_grad():
                    weight.copy_(weight.float() + scale * delta)


def _changes(state: Mapping[str, Tensor], parameters: Mapping[str, Tensor], file: Path) -> dict[str, _Change]:
    changes: dict[str, _Change] = {}
    for key, value in state.items():
        found = _KEY.fullmatch(_dotted(key))
        name = _parameter(found["module"], found["part"], parameters) if found else None
        if found is None or name is None:
            raise WanError(f"{file}: {key} names no weight of this transformer; the LoRA was made for another model")
        change = changes.setdefault(name, _Change([]))
        change.keys.append(key)
        part = found["part"].partition(".")[0]
        if part == "alpha":
            change.alpha = value
        elif part in _DOWN:
            change.down = value
        elif part in _UP and not found["part"].endswith("bias"):
            change.up = value
        else:
            change.whole = value
    return changes


def _parameter(module: str, part: str, parameters: Mapping[str, Tensor]) -> str | None:
    """diffusers' name of what a key changes; None where the transformer has no such parameter."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    leaf = {"diff_b": "bias", "lora_B.bias": "bias", "diff_m": "modulation"}.get(part, "weight")
    name = f"{module}.{leaf}"
    if name in parameters:
        return name
    (renamed,) = convert_wan_transformer_to_diffusers({name: torch.empty(0)})
    return renamed if renamed in parameters else None


def _dotted(key: str) -> str:
    """A key without its prefix, and kohya's underscores as the dots that they were."""
    if not key.startswith(_KOHYA):
        return _PREFIX.sub("", key)
    flat, dot, part = key.removeprefix(_KOHYA).partition(".")
    if found := _FLAT.fullmatch(flat):
        flat = f"{found['block']}.{found['number']}.{found['part']}.{found['rest']}"
    elif found := _FLAT_OUTSIDE.fullmatch(flat):
        flat = f"{found['part']}.{found['rest']}"
    return f"{flat}{dot}{part}"
