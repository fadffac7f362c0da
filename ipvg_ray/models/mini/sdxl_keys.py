"""Names of SDXL's tensors in the single-file layout of its original repository (Stability-AI/generative-models), from
diffusers' and transformers' names. diffusers reads that layout but does not write it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

State = Mapping[str, torch.Tensor]
Rules = tuple[tuple[str, str], ...]
"""Regular expressions and what they become, applied in order."""

_UNET_ENDS: Rules = (
    (r"^time_embedding\.linear_1", "time_embed.0"),
    (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^add_embedding\.linear_1", "label_emb.0.0"),
    (r"^add_embedding\.linear_2", "label_emb.0.2"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^mid_block\.resnets\.0", "middle_block.0"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^mid_block\.resnets\.1", "middle_block.2"),
)
_UNET_RESNET: Rules = (
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
)
_VAE: Rules = (
    (r"\.down_blocks\.(\d+)\.resnets\.(\d+)", r".down.\1.block.\2"),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0", r".down.\1.downsample"),
    (r"\.up_blocks\.(\d+)\.resnets\.(\d+)", r".up.\1.block.\2"),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0", r".up.\1.upsample"),
    (r"\.mid_block\.resnets\.0", ".mid.block_1"),
    (r"\.mid_block\.resnets\.1", ".mid.block_2"),
    (r"\.mid_block\.attentions\.0", ".mid.attn_1"),
    (r"\.attn_1\.group_norm", ".attn_1.norm"),
    (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
    (r"\.attn_1\.to_out\.0", ".attn_1.proj_out"),
    (r"\.conv_norm_out", ".norm_out"),
    (r"\.conv_shortcut", ".nin_shortcut"),
)
_OPEN_CLIP: Rules = (
    (r"^text_model\.embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"^text_model\.encoder\.layers\.(\d+)", r"transformer.resblocks.\1"),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^text_projection\.weight", "text_projection"),
)


def single_file(unet: State, vae: State, text_encoder: State, text_encoder_2: State) -> dict[str, torch.Tensor]:
    """The tensors of one SDXL file.

    Args:
        unet: of a UNet2DConditionModel with SDXL's blocks: two resnets each (three on the way up), attentions
            wherever there is an upsampler.
        vae: of an AutoencoderKL.
        text_encoder: of a CLIPTextModel.
        text_encoder_2: of a CLIPTextModelWithProjection whose projection is as wide as its states.
    """
    up_blocks = 1 + max(int(m[1]) for key in vae if (m := re.match(r"decoder\.up_blocks\.(\d+)", key)))
    result = {f"model.diffusion_model.{_unet_key(key)}": value for key, value in unet.items()}
    result |= {f"first_stage_model.{_vae_key(key, up_blocks)}": _as_conv(key, value) for key, value in vae.items()}
    prefix = "conditioner.embedders.0.transformer.text_model."
    result |= {f"{prefix}{key.removeprefix('text_model.')}": value for key, value in text_encoder.items()}
    result |= {f"conditioner.embedders.1.model.{key}": value for key, value in _open_clip(text_encoder_2).items()}
    return {key: value.contiguous() for key, value in sorted(result.items())}


def _renamed(key: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _unet_key(key: str) -> str:
    """Blocks are counted in one row, three to a resolution: two (up: three) of layers, one of resampling."""
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)(.*)", key):
        half, block, kind, layer, rest = match.groups()
        row, first = ("input", 1) if half == "down" else ("output", 0)
        key = f"{row}_blocks.{3 * int(block) + int(layer) + first}.{int(kind == 'attentions')}{rest}"
    elif match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv(.*)", key):
        return f"input_blocks.{3 * int(match[1]) + 3}.0.op{match[2]}"
    elif match := re.match(r"up_blocks\.(\d+)\.upsamplers\.0(.*)", key):
        return f"output_blocks.{3 * int(match[1]) + 2}.2{match[2]}"
    key = _renamed(key, _UNET_ENDS)
    return key if ".transformer_blocks." in key else _renamed(key, _UNET_RESNET)


def _vae_key(key: str, up_blocks: int) -> str:
    """The decoder's blocks are counted from the picture's side."""
    renamed = _renamed(key, _VAE)
    return re.sub(r"^decoder\.up\.(\d+)", lambda match: f"decoder.up.{up_blocks - 1 - int(match[1])}", renamed)


def _as_conv(key: str, value: torch.Tensor) -> torch.Tensor:
    """The autoencoder's attention is made of 1×1 convolutions in the original."""
    return value[:, :, None, None] if ".attentions." in key and value.dim() == 2 else value


def _open_clip(state: State) -> dict[str, torch.Tensor]:
    """OpenCLIP keeps query, key and value in one matrix, and its projection the other way round."""
    result = {}
    for key, value in state.items():
        if ".q_proj." in key:
            stacked = torch.cat([state[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            result[_renamed(key, _OPEN_CLIP).replace("q_proj.", "in_proj_")] = stacked
        elif ".k_proj." not in key and ".v_proj." not in key:
            result[_renamed(key, _OPEN_CLIP)] = value.T if key == "text_projection.weight" else value
    return result
