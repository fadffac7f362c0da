"""HyperLoRA: a network that makes the LoRA weights of one identity from its face (Li et al., arXiv 2503.16944).

An independent implementation of the published checkpoint format. Reference pictures become ArcFace embeddings and CLIP
features; a resampler turns them into 8 tokens per attention module; each token mixes learned bases into one matrix.
Some checkpoints make a second, Base LoRA from the picture with its face blurred out: it takes up hair, clothes and
light, so that the ID LoRA need not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ipvg_ray.models.hyperlora_net import (
    TOKENS_PER_MODULE,
    HyperLoraError,
    HyperLoraModules,
    IdProjector,
    Resampler,
    ResamplerShape,
)
from ipvg_ray.models.lora import LoraPair, projection_paths

ALPHA_PER_RANK = 0.5
"""alpha / rank of the generated LoRA: an adapter is applied with weight · 0.5."""

TRIGGER_WORDS = "fcsks fxhks fhyks"
"""What a prompt has to begin with, as the networks were trained."""

_RELEASED_DIM_HEAD = 64


class HyperLora(nn.Module):
    """A loaded checkpoint. Build one with `HyperLora.load`.

    Attributes:
        paths: names of the LoRA pairs, to the linear layers of diffusers' SDXL UNet that they belong to.
    """

    def __init__(
        self,
        id_projector: IdProjector | None,
        resampler: Resampler,
        bases: HyperLoraModules,
        base_resampler: Resampler | None = None,
    ) -> None:
        super().__init__()
        self.id_projector = id_projector
        self.resampler = resampler
        self.bases = bases
        self.base_resampler = base_resampler
        self.paths = projection_paths(bases.names)

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> HyperLora:
        """Read a checkpoint folder such as `sdxl_hyper_id_lora_v1_fidelity`.

        All sizes are read off the tensors; `config.json`, where there is one, says how the resamplers' attention is
        cut into heads (the released checkpoints have none and heads of 64). Which encoders it was trained with
        follows from the files: two conditions are ArcFace and CLIP; one is ArcFace where there is an id projector,
        else CLIP. There is a Base LoRA where there is a `base_resampler.safetensors`.

        Args:
            folder: with hyper_lora_modules.json and .safetensors, resampler.safetensors, id_projector.safetensors.
            dtype: to compute in; the released weights are float16.
            device: where to.

        Raises:
            HyperLoraError: where a file is missing or does not fit the others.
        """

        def tensors(name: str) -> dict[str, torch.Tensor]:
            return {key: value.to(dtype) for key, value in _read(folder / name, device).items()}

        def resampler(name: str) -> Resampler:
            return _resampler(tensors(name), folder / name, _dim_head(folder))

        identity = resampler("resampler.safetensors")
        base = resampler("base_resampler.safetensors") if (folder / "base_resampler.safetensors").is_file() else None
        bases = _bases(tensors("hyper_lora_modules.safetensors"), folder, base is not None)
        for each in (identity, base):
            _check_queries(each, bases, folder)
        projector = None
        if (folder / "id_projector.safetensors").is_file() or identity.proj_in_2 is not None:
            projector = _projector(tensors("id_projector.safetensors"), folder / "id_projector.safetensors")
        return cls(projector, identity, bases, base).eval().requires_grad_(False)

    @property
    def rank(self) -> int:
        """Rank of the ID LoRA's pairs."""
        return self.bases.ranks["id"]

    @property
    def has_base(self) -> bool:
        """Whether it makes a Base LoRA."""
        return self.base_resampler is not None

    @property
    def clip_width(self) -> int | None:
        """Channels of the CLIP features that it makes the ID LoRA from; None where it reads none."""
        if self.resampler.proj_in_2 is not None:
            return self.resampler.proj_in_2.in_features
        return None if self.id_projector is not None else self.resampler.proj_in.in_features

    @torch.no_grad()
    def tokens(self, id_embeds: torch.Tensor | None, clip_hidden_states: torch.Tensor | None) -> torch.Tensor:
        """The tokens of one identity from n reference pictures: the mean of what each gives, at length 1.

        Args:
            id_embeds: ArcFace embeddings, (n, 512), each of length 1; not read where the checkpoint uses CLIP alone.
            clip_hidden_states: penultimate hidden states of the CLIP vision model, (n, length, width); not read where
                it uses ArcFace alone.

        Returns:
            (1, 8·modules, hyper_dim), each token of length 1.

        Raises:
            HyperLoraError: where an input is missing or has another width, or the two are of different numbers of
                pictures.
        """
        latents = self.resampler.latents
        conditions = []
        if self.id_projector is not None:
            embeds = _fitting(id_embeds, 2, self.id_projector.embedding, "ArcFace embeddings")
            conditions.append(self.id_projector(embeds.to(latents)))
        if self.clip_width is not None:
            conditions.append(_fitting(clip_hidden_states, 3, self.clip_width, "CLIP features").to(latents))
        counts = [len(condition) for condition in conditions]
        if min(counts) != max(counts):  # attention would repeat a single one for all
            raise HyperLoraError(f"given: ArcFace embeddings of {counts[0]} pictures, CLIP features of {counts[1]}")
        result: torch.Tensor = self.resampler(*conditions)
        return result

    @torch.no_grad()
    def base_tokens(self, clip_hidden_states: torch.Tensor) -> torch.Tensor:
        """The tokens of the Base LoRA, (1, 8·modules, hyper_dim), from the pictures with their faces blurred out.

        Args:
            clip_hidden_states: penultimate hidden states of the CLIP vision model, (n, length, width).

        Raises:
            HyperLoraError: where the checkpoint has no Base LoRA, or the features are of another width.
        """
        if self.base_resampler is None:
            raise HyperLoraError("this HyperLoRA has no Base LoRA: its folder holds no base_resampler.safetensors")
        features = _fitting(clip_hidden_states, 3, self.base_resampler.proj_in.in_features, "CLIP features")
        result: torch.Tensor = self.base_resampler(features.to(self.base_resampler.latents))
        return result

    @torch.no_grad()
    def lora(self, tokens: torch.Tensor) -> dict[str, LoraPair]:
        """The ID LoRA's pairs of `tokens`, by `{name}_{part}`; apply them with weight · `ALPHA_PER_RANK`."""
        result: dict[str, LoraPair] = self.bases(tokens, "id")
        return result

    @torch.no_grad()
    def base_lora(self, base_tokens: torch.Tensor) -> dict[str, LoraPair]:
        """The Base LoRA's pairs, by the same names and to be applied in the same way; of half the rank."""
        result: dict[str, LoraPair] = self.bases(base_tokens, "base")
        return result


def kohya_state_dict(pairs: Mapping[str, LoraPair]) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA file in kohya's layout: `{name}_{part}.lora_down.weight`, `.lora_up.weight`, `.alpha`."""
    result = {}
    for name, pair in pairs.items():
        result[f"{name}.lora_down.weight"] = pair.down.contiguous()
        result[f"{name}.lora_up.weight"] = pair.up.contiguous()
        result[f"{name}.alpha"] = pair.down.new_tensor(ALPHA_PER_RANK * len(pair.down))
    return result


def save_lora(path: Path, pairs: Mapping[str, LoraPair], title: str) -> None:
    """Write a LoRA file that ComfyUI, diffusers and kohya's tools load; load it with the weight meant for the network.

    Args:
        path: the .safetensors file; replaced where it exists.
        pairs: as `HyperLora.lora` gives them, or several LoRAs merged by `lora.merged`.
        title: shown by programs that list LoRA files.
    """
    rank = len(next(iter(pairs.values())).down)
    described = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": title,
        "modelspec.trigger_phrase": TRIGGER_WORDS,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(ALPHA_PER_RANK * rank),
    }
    save_file({key: value.cpu() for key, value in kohya_state_dict(pairs).items()}, path, metadata=described)


def _read(path: Path, device: str) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise HyperLoraError(f"{path} is missing; give the folder of a HyperLoRA checkpoint")
    return load_file(path, device=device)


def _widths(path: Path) -> dict[str, tuple[int, int]]:
    try:
        described: dict[str, dict[str, Any]] = json.loads(path.read_text())
        return {
            name: (int(sizes["hidden_size"]), int(sizes["cross_attention_dim"] or sizes["hidden_size"]))
            for name, sizes in described.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HyperLoraError(f"{path} does not list attention modules with their widths: {error!r}") from None


def _dim_head(folder: Path) -> int:
    path = folder / "config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    return int(settings.get("resampler", {}).get("dim_head", _RELEASED_DIM_HEAD))


def _projector(tensors: Mapping[str, torch.Tensor], path: Path) -> IdProjector:
    try:
        flat, embedding = tensors["0.weight"].shape
        width = len(tensors["2.weight"])
    except KeyError as error:
        raise HyperLoraError(f"{path} is no id projector: the tensor {error} is missing") from None
    with torch.device("meta"):
        projector = IdProjector(embedding, flat // width, width)
    _fill(projector, tensors, path)
    return projector


def _fill(module: nn.Module, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    try:
        module.load_state_dict(dict(tensors), assign=True)
    except RuntimeError as error:
        raise HyperLoraError(f"{path} does not hold what the checkpoint's other files ask for: {error}") from None


def _resampler(tensors: Mapping[str, torch.Tensor], path: Path, dim_head: int) -> Resampler:
    try:
        with torch.device("meta"):
            resampler = Resampler(ResamplerShape.of(tensors, dim_head))
    except KeyError as error:
        raise HyperLoraError(f"{path} is no HyperLoRA resampler: the tensor {error} is missing") from None
    _fill(resampler, tensors, path)
    return resampler


def _bases(tensors: Mapping[str, torch.Tensor], folder: Path, with_base: bool) -> HyperLoraModules:
    """The bases, without those of a Base LoRA where nothing makes tokens for them."""
    path = folder / "hyper_lora_modules.safetensors"
    try:
        hyper_dim, _, rank = tensors["0.to_q.id_down_basis"].shape
        base_rank = tensors["0.to_q.base_down_basis"].shape[2] if with_base else 0
    except KeyError as error:
        raise HyperLoraError(f"{path} does not fit the folder's other files: the tensor {error} is missing") from None
    with torch.device("meta"):
        bases = HyperLoraModules(_widths(folder / "hyper_lora_modules.json"), hyper_dim, rank, base_rank)
    wanted = tuple(f".{kind}_" for kind in bases.ranks)
    kept = {key: value for key, value in tensors.items() if "_basis" in key and any(kind in key for kind in wanted)}
    _fill(bases, kept, path)
    return bases


def _check_queries(resampler: Resampler | None, bases: HyperLoraModules, folder: Path) -> None:
    wanted = TOKENS_PER_MODULE * len(bases)
    if resampler is not None and (queries := resampler.latents.shape[1]) != wanted:
        raise HyperLoraError(f"{folder}: the resampler gives {queries} tokens, {len(bases)} modules need {wanted}")


def _fitting(given: torch.Tensor | None, dims: int, width: int, what: str) -> torch.Tensor:
    if given is None or given.dim() != dims or given.shape[-1] != width:
        found = "none" if given is None else tuple(given.shape)
        raise HyperLoraError(f"this HyperLoRA reads {what} {width} wide, in {dims} dimensions; given: {found}")
    return given
