"""A miniature HyperLoRA for the miniature SDXL and CLIP, in the published checkpoint format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ipvg_ray.models.hyperlora_net import HyperLoraModules, IdProjector, Resampler, ResamplerShape
from ipvg_ray.models.mini import clip_vision, sdxl

NAME = "mini-hyperlora"

_EMBEDDING = 512  # ArcFace
_ID_TOKENS = 4
_HYPER_DIM = 16
_RANK = 4
_DIM, _HEADS, _DIM_HEAD, _DEPTH, _HIDDEN = 64, 3, 16, 2, 128
_STRENGTH = 1.5  # how large a generated weight is beside a projection's own: faces must be told apart in the noise


def make(root: Path, seed: int = 0) -> None:
    """Write `<root>/mini-hyperlora`; the same seed gives the same bytes.

    The modules are those of `<root>/mini-sdxl-config`, the CLIP width is that of `<root>/mini-clip-vision`, so both
    must be made before. Unlike the released checkpoints it has a config.json, since its heads are smaller.

    Raises:
        FileNotFoundError: where one of the two is not there.
    """
    from safetensors.torch import save_file

    folder = root / NAME
    folder.mkdir(parents=True, exist_ok=True)
    described = _attention_modules(root / sdxl.CONFIG_NAME / "unet" / "config.json")
    width = json.loads((root / clip_vision.NAME / "config.json").read_text())["hidden_size"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, nn.Module] = {
            "id_projector": IdProjector(_EMBEDDING, _ID_TOKENS, width),
            "resampler": _resampler(8 * len(described), width),
            "hyper_lora_modules": _bases(described),
        }
    for name, part in parts.items():
        save_file({key: value.half() for key, value in part.state_dict().items()}, folder / f"{name}.safetensors")
    (folder / "hyper_lora_modules.json").write_text(json.dumps(described, indent=1) + "\n")
    settings = {"dim": _DIM, "dim_head": _DIM_HEAD, "heads": _HEADS, "depth": _DEPTH, "ff_mult": _HIDDEN // _DIM}
    (folder / "config.json").write_text(json.dumps({"resampler": settings}, indent=1) + "\n")


def _attention_modules(unet_config: Path) -> dict[str, dict[str, Any]]:
    """What `hyper_lora_modules.json` says of each attention of the UNet, named in diffusers' numbering."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(json.loads(unet_config.read_text()))
    context = unet.config.cross_attention_dim
    return {
        f"lora_unet_{path.replace('.', '_')}": {
            "hidden_size": module.to_q.in_features,
            "cross_attention_dim": context if path.endswith("attn2") else None,
        }
        for path, module in unet.named_modules()
        if path.endswith((".attn1", ".attn2"))
    }


def _resampler(queries: int, width: int) -> Resampler:
    shape = ResamplerShape(queries, _DIM, _HYPER_DIM, (width, width), _HEADS, _DIM_HEAD, _DEPTH, _HIDDEN)
    resampler = Resampler(shape)
    with torch.no_grad():  # quieter queries: what a token says comes from the face more than from its own start
        resampler.latents.mul_(0.2)
    return resampler


def _bases(described: dict[str, dict[str, Any]]) -> HyperLoraModules:
    widths = {n: (d["hidden_size"], d["cross_attention_dim"] or d["hidden_size"]) for n, d in described.items()}
    bases = HyperLoraModules(widths, _HYPER_DIM, _RANK)
    with torch.no_grad():
        for name, basis in bases.named_parameters():
            if name.endswith("id_down_basis"):
                basis.normal_(std=basis.shape[1] ** -0.5)
            else:
                basis.normal_(std=_STRENGTH * _RANK**-0.5)
    return bases
