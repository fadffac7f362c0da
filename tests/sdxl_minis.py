"""The miniatures of the first frame, made together since HyperLoRA is cut to the other two, and made-up faces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ipvg_ray.models import sdxl_load
from ipvg_ray.models.mini import clip_vision, hyperlora, sdxl
from ipvg_ray.models.sdxl import DrawSettings, Request, Sdxl
from ipvg_ray.models.sdxl_load import SdxlError

PROMPT = "fcsks fxhks fhyks, a woman in a red dress, close-up"
NEGATIVE = "blurry, low quality"
SMALL = {"height": 32, "width": 48, "steps": 3, "guidance": 5.0}

torch.set_num_threads(1)  # networks this small are slower with more, much slower on a busy machine


def make_minis(root: Path, seed: int = 0) -> Path:
    """CLIP vision, SDXL and HyperLoRA below `root`; takes a second."""
    for maker in (clip_vision, sdxl, hyperlora):
        maker.make(root, seed)
    return root


def full_unet() -> Any:
    """SDXL base's UNet with random weights, on the device of the context."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def embedding(number: int) -> torch.Tensor:
    """A made-up ArcFace embedding, (512,), of length 1."""
    values = torch.randn(512, generator=torch.Generator().manual_seed(number))
    return torch.nn.functional.normalize(values, dim=0)


def face(number: int, side: int = 72) -> np.ndarray:
    """A made-up id picture: smooth colours on grey, RGB uint8, (side, side, 3)."""
    generator = np.random.default_rng(number)
    coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((side // 6, side // 6, 1), np.uint8))


def load_pipeline(minis: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The miniature SDXL below `minis`."""
    return sdxl_load.load(minis / sdxl.NAME, minis / sdxl.CONFIG_NAME, dtype=dtype, device="cpu")


def drawn(model: Sdxl, prompt: str = PROMPT, negative: str = NEGATIVE, seed: int = 1, **changes: Any) -> np.ndarray:
    """One small picture; raises the error that it came out as."""
    (result,) = model.draw([Request(prompt, seed)], DrawSettings(**(SMALL | changes), negative_prompt=negative))
    if isinstance(result, SdxlError):
        raise result
    return result


def words(count: int) -> str:
    """A text of that many tokens in the miniature's vocabulary."""
    known = ("woman", "man", "red", "dress", "smile", "street", "light")
    return " ".join(known[i * i % len(known)] for i in range(count))


def add_base(folder: Path, rank: int = 2) -> dict[str, torch.Tensor]:
    """Give a checkpoint a Base LoRA: bases of half the rank, and a resampler whose one condition is CLIP's features."""
    generator = torch.Generator().manual_seed(3)
    path = folder / "hyper_lora_modules.safetensors"
    bases = load_file(path)
    added = {}
    for key, value in bases.items():
        shape = [rank if size == 4 and i else size for i, size in enumerate(value.shape)]
        added[key.replace(".id_", ".base_")] = torch.randn(shape, generator=generator)
    save_file(bases | added, path)
    tensors = load_file(folder / "resampler.safetensors")
    kept = {k: v.clone() for k, v in tensors.items() if "attn3" not in k and not k.startswith("proj_in_2")}
    kept["latents"] = torch.randn(kept["latents"].shape, generator=generator)
    save_file(kept, folder / "base_resampler.safetensors")
    return added


def one_condition(folder: Path) -> None:
    """Take the second condition out of a checkpoint."""
    tensors = load_file(folder / "resampler.safetensors")
    kept = {k: v for k, v in tensors.items() if "attn3" not in k and not k.startswith("proj_in_2")}
    save_file(kept, folder / "resampler.safetensors")
