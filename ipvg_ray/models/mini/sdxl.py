"""A miniature SDXL: one file in the original layout with baked VAE, and the diffusers folder of its configurations.

Random weights in SDXL's shape; what it draws is coloured noise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ipvg_ray.models.mini.clip_tokenizer import LENGTH, write_clip_tokenizer
from ipvg_ray.models.mini.sdxl_keys import single_file
from ipvg_ray.models.quiet import only_errors

NAME = "mini-sdxl.safetensors"
CONFIG_NAME = "mini-sdxl-config"

_TEXT_WIDTHS = (32, 48)  # of the two text encoders; the UNet reads both, side by side
_TIME_ID_WIDTH = 8  # of each of the six numbers for size and crop
_GAIN = 3.0  # on what carries the prompt: a random network barely hears it otherwise


def make(root: Path, seed: int = 0) -> None:
    """Write `<root>/mini-sdxl.safetensors` and `<root>/mini-sdxl-config`; the same seed gives the same bytes.

    The folder holds what a single file leaves out: configurations and tokenizers. As in the published checkpoints the
    weights are float16 and the scheduler's configuration is that of Euler steps.
    """
    from safetensors.torch import save_file

    folder = root / CONFIG_NAME
    words = write_clip_tokenizer(folder / "tokenizer", pad="<|endoftext|>")
    write_clip_tokenizer(folder / "tokenizer_2", pad="!")
    with torch.random.fork_rng(devices=[]), only_errors():
        torch.manual_seed(seed)
        encoder, encoder_2, unet, vae = _text_encoder(words), _text_encoder_2(words), _unet(), _vae()
    encoder.config.save_pretrained(folder / "text_encoder")
    encoder_2.config.save_pretrained(folder / "text_encoder_2")
    unet.save_config(folder / "unet")
    vae.save_config(folder / "vae")
    _scheduler().save_config(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(_index(), indent=2) + "\n")
    tensors = single_file(unet.state_dict(), vae.state_dict(), encoder.state_dict(), encoder_2.state_dict())
    save_file({key: value.half() for key, value in tensors.items()} | _unused_tensors(), root / NAME)


def _index() -> dict[str, object]:
    from diffusers import __version__

    return {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": __version__,
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _unused_tensors() -> dict[str, torch.Tensor]:
    """What published files hold besides, and a loader must pass over."""
    return {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(LENGTH)[None],
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6055, dtype=torch.float16),
    }


def _text_config(words: int, width: int, activation: str) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_act=activation,
        initializer_factor=_GAIN,
        # SDXL's published numbers: 2 makes transformers pool at the highest id, which is the end mark's
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        dtype="float16",
    )


def _text_encoder(words: int) -> Any:
    from transformers import CLIPTextModel

    return CLIPTextModel(_text_config(words, _TEXT_WIDTHS[0], "quick_gelu"))


def _text_encoder_2(words: int) -> Any:
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(_text_config(words, _TEXT_WIDTHS[1], "gelu"))


def _unet() -> Any:
    """SDXL's three resolutions, the first without attention; 34 attention modules in place of 140."""
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(16, 32, 48),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 3),  # the number of heads, as in SDXL's own configuration
        use_linear_projection=True,
        cross_attention_dim=sum(_TEXT_WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=6 * _TIME_ID_WIDTH + _TEXT_WIDTHS[1],
    )
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if ".to_out.0.weight" in name or "add_embedding.linear" in name:
                weight *= _GAIN
    return unet


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=256,
        block_out_channels=(8, 16, 16, 16),
        norm_num_groups=8,
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.13025,
        force_upcast=True,
    )


def _scheduler() -> Any:
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
