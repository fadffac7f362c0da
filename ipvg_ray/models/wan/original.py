"""Wan's original checkpoint folders, as the authors publish them, read into diffusers' and transformers' classes.

    config.json, diffusion_pytorch_model*.safetensors    the transformer; of A14B in high_noise_model/, low_noise_model/
    Wan2.1_VAE.pth or Wan2.2_VAE.pth                     the VAE
    models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/    text encoder and tokenizer

Widths are read off the weights. Keys are renamed by diffusers' own single-file converters; those of the VAE of TI2V-5B
and of UMT5, for which it has none, here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipvg_ray.models.wan.errors import WanError
from ipvg_ray.models.wan.tasks import Task

_EXPERTS = ("high_noise_model", "low_noise_model")
_VAES = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
_TEXT = "models_t5_umt5-xxl-enc-bf16.pth"
_TOKENIZER = "google/umt5-xxl"

# Of Wan2.2's VAE, per latent channel; constants of its authors' code that its weights do not carry.
_MEAN_22 = [
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
]  # fmt: skip
_STD_22 = [
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
]  # fmt: skip

_RESIDUAL = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
_UMT5 = {
    "norm1": "layer.0.layer_norm",
    "attn": "layer.0.SelfAttention",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def is_original(folder: Path) -> bool:
    """Whether a folder holds an original checkpoint, and not one in diffusers' layout."""
    if (folder / "model_index.json").is_file():
        return False
    return (folder / "config.json").is_file() or all((folder / name).is_dir() for name in _EXPERTS)


def load_transformers(folder: Path, task: Task, dtype: torch.dtype) -> list[Any]:
    """The transformer, or the experts of high and low noise, as diffusers' classes.

    Raises:
        WanError: where a file is missing, or the folder holds a model of another task.
    """
    places = [folder / name for name in _EXPERTS] if task.experts == 2 else [folder]
    return [_transformer(place, task, dtype) for place in places]


def _transformer(folder: Path, task: Task, dtype: torch.dtype) -> Any:
    import diffusers
    from accelerate import init_empty_weights

    vace = task.form == "vace"
    cls: Any = diffusers.WanVACETransformer3DModel if vace else diffusers.WanTransformer3DModel
    state: dict[str, Tensor] = {}
    for key, value in _renamed_shards(folder):
        exact = any(part in key.split(".") for part in cls._keep_in_fp32_modules or ())
        state[key] = value.to(torch.float32 if exact else dtype)
    if ("vace_patch_embedding.weight" in state) != vace:
        raise WanError(f"{folder} is {'a' if not vace else 'no'} VACE model; task {task.name} needs another")
    try:
        settings = _transformer_config(json.loads((folder / "config.json").read_text()), state)
        with init_empty_weights():
            model = cls(**settings)
        model.load_state_dict(state, assign=True)
    except (KeyError, RuntimeError, OSError) as error:
        raise WanError(f"{folder} is no Wan transformer as its authors publish them: {error}") from error
    return model


def _renamed_shards(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Weights with diffusers' names; one shard of the file is in memory at a time."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
    from safetensors.torch import load_file

    shards = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    wanted = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    if not shards or (missing := wanted - {shard.name for shard in shards}):
        raise WanError(f"{folder} lacks {', '.join(sorted(missing)) if shards else 'its weights'}; pull it again")
    for shard in shards:
        yield from convert_wan_transformer_to_diffusers(load_file(shard)).items()


def _transformer_config(given: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """diffusers' settings from the original's, and from shapes where those do not say."""
    patch = state["patch_embedding.weight"]
    settings = {
        "patch_size": tuple(patch.shape[2:]),
        "num_attention_heads": given["num_heads"],
        "attention_head_dim": patch.shape[0] // given["num_heads"],
        "in_channels": patch.shape[1],
        "out_channels": given["out_dim"],
        "text_dim": state["condition_embedder.text_embedder.linear_1.weight"].shape[1],
        "freq_dim": given["freq_dim"],
        "ffn_dim": given["ffn_dim"],
        "num_layers": given["num_layers"],
        "cross_attn_norm": "blocks.0.norm2.weight" in state,
        "eps": given["eps"],
    }
    if "vace_patch_embedding.weight" in state:
        settings["vace_in_channels"] = state["vace_patch_embedding.weight"].shape[1]
        count = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("vace_blocks."))
        every = given["num_layers"] // count
        settings["vace_layers"] = list(given.get("vace_layers") or range(0, given["num_layers"], every))
    return settings


def load_vae(folder: Path) -> Any:
    """The VAE, float32. Raises WanError where it is missing or of another kind."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    file = next((folder / name for name in _VAES if (folder / name).is_file()), None)
    if file is None:
        raise WanError(f"{folder} holds neither {' nor '.join(_VAES)}; pull the model's whole repository")
    raw = _read_pickle(file)
    state = {key: value.float() for key, value in convert_wan_vae_to_diffusers(_unnested(raw)).items()}
    settings: dict[str, Any] = {"base_dim": raw["encoder.conv1.weight"].shape[0], "z_dim": raw["conv2.weight"].shape[0]}
    if any(".downsamples." in key.removeprefix("encoder.downsamples") for key in raw):
        settings |= {
            "decoder_base_dim": raw["decoder.conv1.weight"].shape[0] // 4,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "scale_factor_temporal": 4,
            "latents_mean": _MEAN_22,
            "latents_std": _STD_22,
        }
    try:
        with init_empty_weights():
            model: Any = AutoencoderKLWan(**settings)
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise WanError(f"{file} is no Wan VAE as its authors publish them: {error}") from error
    return model


def _unnested(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Wan2.2 groups the VAE's blocks by stage, and diffusers' converter knows only Wan2.1's flat lists."""
    nested = re.compile(r"(encoder|decoder)\.(down|up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\.(.+)")
    result = {}
    for key, value in raw.items():
        if match := nested.fullmatch(key):
            side, way, stage, place, rest = match.groups()
            block = f"{side}.{way}_blocks.{stage}"
            if rest.startswith(("resample.", "time_conv.")):
                key = f"{block}.{way}sampler.{rest}"
            else:
                inner, _, leaf = rest.rpartition(".")
                key = f"{block}.resnets.{place}.{(_RESIDUAL | {'shortcut': 'conv_shortcut'})[inner]}.{leaf}"
        result[key] = value
    return result


def load_text(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tokenizer and UMT5 encoder. Raises WanError where one is missing or of another kind."""
    from accelerate import init_empty_weights
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

    if not (folder / _TEXT).is_file() or not (folder / _TOKENIZER).is_dir():
        raise WanError(f"{folder} lacks {_TEXT} or {_TOKENIZER}/; pull the model's whole repository")
    tokenizer = AutoTokenizer.from_pretrained(folder / _TOKENIZER, local_files_only=True)
    raw = _read_pickle(folder / _TEXT)
    buckets, heads = raw["blocks.0.pos_embedding.embedding.weight"].shape
    config = UMT5Config(
        vocab_size=raw["token_embedding.weight"].shape[0],
        d_model=raw["token_embedding.weight"].shape[1],
        d_kv=raw["blocks.0.attn.q.weight"].shape[0] // heads,
        d_ff=raw["blocks.0.ffn.fc1.weight"].shape[0],
        num_layers=1 + max(int(key.split(".")[1]) for key in raw if key.startswith("blocks.")),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
    )
    state = {_umt5_key(key): value.to(dtype) for key, value in raw.items()}
    with init_empty_weights():
        model: Any = UMT5EncoderModel(config)
    if (tied := "encoder.embed_tokens.weight") in model.state_dict():
        state[tied] = state["shared.weight"]
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise WanError(f"{folder / _TEXT} is no UMT5 as Wan's authors publish it: {error}") from error
    return tokenizer, model


def _umt5_key(key: str) -> str:
    """transformers' name of a weight of the authors' T5."""
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", key):
        number, inner = match.groups()
        head, _, leaf = inner.rpartition(".")
        inner = _UMT5[inner] if inner in _UMT5 else f"{_UMT5[head]}.{leaf}"
        return f"encoder.block.{number}.{inner}.weight"
    return {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}.get(key, key)


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """Tensors of a `.pth` file, and nothing that could run code."""
    state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return state
