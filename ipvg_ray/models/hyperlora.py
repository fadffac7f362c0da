"""HyperLoRA: a network that makes the LoRA weights of one identity from its face (Li et al., arXiv 2503.16944).

An independent implementation of the published checkpoint format. Reference pictures become ArcFace embeddings and CLIP
features; a resampler turns them into 8 tokens per attention module; each token mixes learned bases into one matrix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from ipvg_ray.models.lora import PARTS, LoraPair, projection_paths

ALPHA_PER_RANK = 0.5
"""alpha / rank of the generated LoRA: an adapter is applied with weight · 0.5."""

_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
_TOKENS_PER_MODULE = 2 * len(_PROJECTIONS)
_RELEASED_DIM_HEAD = 64


class HyperLoraError(ValueError):
    """A folder that holds no HyperLoRA checkpoint, or inputs that the loaded one cannot take."""


@dataclass(frozen=True)
class ResamplerShape:
    """Sizes of a resampler.

    Attributes:
        queries: learned queries, 8 per attention module.
        dim: width of the queries.
        out: width of the tokens it gives (the hyper dimension).
        conditions: width of each of its one or two conditions.
        heads, dim_head: of all attentions; their product need not be `dim`.
        depth: layers.
        hidden: width of the feed-forwards' middle.
    """

    queries: int
    dim: int
    out: int
    conditions: tuple[int, ...]
    heads: int
    dim_head: int
    depth: int
    hidden: int

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], dim_head: int) -> ResamplerShape:
        """The shape that a state dict was saved from; only the cut of the attention's width into heads is not in it.

        Raises:
            HyperLoraError: where `dim_head` does not divide the attention's width.
        """
        inner = tensors["layers.0.attn1.to_q.weight"].shape[0]
        if inner % dim_head:
            raise HyperLoraError(
                f"the resampler's attention is {inner} wide, no multiple of {dim_head}; put heads and dim_head under "
                "`resampler` into the checkpoint's config.json"
            )
        return cls(
            queries=tensors["latents"].shape[1],
            dim=tensors["latents"].shape[2],
            out=tensors["proj_out.weight"].shape[0],
            conditions=tuple(tensors[key].shape[1] for key in ("proj_in.weight", "proj_in_2.weight") if key in tensors),
            heads=inner // dim_head,
            dim_head=dim_head,
            depth=1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("layers.")),
            hidden=tensors["layers.0.ff.net.0.proj.weight"].shape[0],
        )


class IdProjector(nn.Sequential):
    """ArcFace embeddings (n, embedding) to tokens (n, tokens, width)."""

    def __init__(self, embedding: int, tokens: int, width: int) -> None:
        super().__init__(nn.Linear(embedding, tokens * width), nn.Unflatten(1, (tokens, width)), nn.LayerNorm(width))
        self.embedding = embedding


class Attention(nn.Module):
    """Multi-head attention of x (n, queries, dim) over a condition (n, length, dim); no projection has a bias."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * dim_head
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(inner, dim, bias=False)])

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.to_q(x), self.to_k(condition), self.to_v(condition))
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        result: torch.Tensor = self.to_out[0](mixed.transpose(1, 2).flatten(-2))
        return result


class _Gelu(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.proj(x))


class FeedForward(nn.Module):
    """Linear, GELU, Linear; the keys are those of diffusers' module, whose `net.1` is a dropout."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(_Gelu(dim, hidden), nn.Identity(), nn.Linear(hidden, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.net(x)
        return result


class ResamplerLayer(nn.Module):
    """Pre-norm residual blocks: the queries over themselves, over each condition, then a feed-forward."""

    def __init__(self, shape: ResamplerShape) -> None:
        super().__init__()
        dim, heads = shape.dim, (shape.heads, shape.dim_head)
        self.norm_attn1, self.attn1 = nn.LayerNorm(dim), Attention(dim, *heads)
        self.norm_attn2_l, self.norm_attn2_x = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn2 = Attention(dim, *heads)
        self.two = len(shape.conditions) == 2
        if self.two:
            self.norm_attn3_l, self.norm_attn3_y = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.attn3 = Attention(dim, *heads)
        self.norm_ff, self.ff = nn.LayerNorm(dim), FeedForward(dim, shape.hidden)

    def forward(self, latents: torch.Tensor, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        normed = self.norm_attn1(latents)
        latents = latents + self.attn1(normed, normed)
        latents = latents + self.attn2(self.norm_attn2_l(latents), self.norm_attn2_x(x))
        if self.two:
            latents = latents + self.attn3(self.norm_attn3_l(latents), self.norm_attn3_y(y))
        result: torch.Tensor = latents + self.ff(self.norm_ff(latents))
        return result


class Resampler(nn.Module):
    """Learned queries that read one or two conditions per reference picture and give one set of tokens for all."""

    def __init__(self, shape: ResamplerShape) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, shape.queries, shape.dim) / shape.dim**0.5)
        self.proj_in = nn.Linear(shape.conditions[0], shape.dim)
        self.proj_in_2 = nn.Linear(shape.conditions[1], shape.dim) if len(shape.conditions) == 2 else None
        self.layers = nn.ModuleList(ResamplerLayer(shape) for _ in range(shape.depth))
        self.proj_out = nn.Linear(shape.dim, shape.out)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens of length 1, (1, queries, out), from conditions (n, length, width) of n reference pictures."""
        latents = self.latents.expand(len(x), -1, -1)
        x = self.proj_in(x)
        y = self.proj_in_2(y) if self.proj_in_2 is not None else None
        for layer in self.layers:
            latents = layer(latents, x, y)
        tokens = self.proj_out(latents).float().mean(0, keepdim=True)
        return (tokens / (tokens.square().sum(-1, keepdim=True) + 1e-8).sqrt()).to(latents.dtype)


class LoraBasis(nn.Module):
    """Bases of one projection: `id_down_basis` (hyper_dim, in, rank) and `id_up_basis` (hyper_dim, rank, out)."""

    def __init__(self, hyper_dim: int, width_in: int, width_out: int, rank: int) -> None:
        super().__init__()
        self.id_down_basis = nn.Parameter(torch.empty(hyper_dim, width_in, rank))
        self.id_up_basis = nn.Parameter(torch.empty(hyper_dim, rank, width_out))

    def forward(self, down: torch.Tensor, up: torch.Tensor) -> LoraPair:
        """Mix the bases with two tokens (hyper_dim,)."""
        return LoraPair(
            torch.einsum("d,dir->ri", down, self.id_down_basis), torch.einsum("d,dro->or", up, self.id_up_basis)
        )


class HyperLoraModules(nn.ModuleList):
    """The bases of all attention modules, in the order of `hyper_lora_modules.json`."""

    def __init__(self, widths: Mapping[str, tuple[int, int]], hyper_dim: int, rank: int) -> None:
        """`widths`: an attention module's name, to the width of its queries and that of its keys and values' input."""
        super().__init__()
        for hidden, context in widths.values():
            inputs = {"to_q": hidden, "to_k": context, "to_v": context, "to_out": hidden}
            self.append(nn.ModuleDict({p: LoraBasis(hyper_dim, inputs[p], hidden, rank) for p in _PROJECTIONS}))
        self.names = tuple(widths)
        self.rank = rank

    def forward(self, tokens: torch.Tensor) -> dict[str, LoraPair]:
        """`{name}_{part}` to its pair, from tokens (1, 8·modules, hyper_dim)."""
        by_part = tokens[0].unflatten(0, (len(self), len(_PROJECTIONS), 2))
        return {
            f"{name}_{part}": module.get_submodule(projection)(*by_part[i, j])
            for i, (name, module) in enumerate(zip(self.names, self, strict=True))
            for j, (projection, part) in enumerate(zip(_PROJECTIONS, PARTS, strict=True))
        }


class HyperLora(nn.Module):
    """A loaded checkpoint. Build one with `HyperLora.load`.

    Attributes:
        paths: names of the LoRA pairs, to the linear layers of diffusers' SDXL UNet that they belong to.
    """

    def __init__(self, id_projector: IdProjector | None, resampler: Resampler, bases: HyperLoraModules) -> None:
        super().__init__()
        self.id_projector = id_projector
        self.resampler = resampler
        self.bases = bases
        self.paths = projection_paths(bases.names)

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> HyperLora:
        """Read a checkpoint folder such as `sdxl_hyper_id_lora_v1_fidelity`.

        All sizes are read off the tensors; `config.json`, where there is one, says how the resampler's attention is
        cut into heads (the released checkpoints have none and heads of 64). Which encoders it was trained with
        follows from the files: two conditions are ArcFace and CLIP; one is ArcFace where there is an id projector,
        else CLIP. The bases of a Base LoRA are left aside.

        Args:
            folder: with hyper_lora_modules.json and .safetensors, resampler.safetensors, id_projector.safetensors.
            dtype: to compute in; the released weights are float16.
            device: where to.

        Raises:
            HyperLoraError: where a file is missing or does not fit the others.
        """

        def tensors(name: str) -> dict[str, torch.Tensor]:
            return {key: value.to(dtype) for key, value in _read(folder / name, device).items()}

        resampler_tensors, basis_tensors = tensors("resampler.safetensors"), tensors("hyper_lora_modules.safetensors")
        id_tensors = {key: value for key, value in basis_tensors.items() if "_basis" in key and ".id_" in key}
        widths = _widths(folder / "hyper_lora_modules.json")
        with torch.device("meta"):
            try:
                resampler = Resampler(ResamplerShape.of(resampler_tensors, _dim_head(folder)))
                hyper_dim, _, rank = id_tensors["0.to_q.id_down_basis"].shape
                bases = HyperLoraModules(widths, hyper_dim, rank)
            except KeyError as error:
                raise HyperLoraError(f"{folder} is no HyperLoRA checkpoint: the tensor {error} is missing") from None
        _fill(resampler, resampler_tensors, folder / "resampler.safetensors")
        _fill(bases, id_tensors, folder / "hyper_lora_modules.safetensors")
        _check(resampler, bases, folder)
        projector = None
        if (folder / "id_projector.safetensors").is_file() or resampler.proj_in_2 is not None:
            projector = _projector(tensors("id_projector.safetensors"), folder / "id_projector.safetensors")
        return cls(projector, resampler, bases).eval().requires_grad_(False)

    @property
    def rank(self) -> int:
        """Rank of the pairs."""
        return self.bases.rank

    @property
    def clip_width(self) -> int | None:
        """Channels of the CLIP features it reads; None where it reads none."""
        if self.resampler.proj_in_2 is not None:
            return self.resampler.proj_in_2.in_features
        return None if self.id_projector is not None else self.resampler.proj_in.in_features

    @torch.no_grad()
    def tokens(self, id_embeds: torch.Tensor | None, clip_hidden_states: torch.Tensor | None) -> torch.Tensor:
        """The tokens of one identity from n reference pictures.

        Args:
            id_embeds: ArcFace embeddings, (n, 512), each of length 1; not read where the checkpoint uses CLIP alone.
            clip_hidden_states: penultimate hidden states of the CLIP vision model, (n, length, width); not read where
                it uses ArcFace alone.

        Returns:
            (1, 8·modules, hyper_dim), each token of length 1.

        Raises:
            HyperLoraError: where an input is missing or has another width.
        """
        latents = self.resampler.latents
        conditions = []
        if self.id_projector is not None:
            embeds = _fitting(id_embeds, 2, self.id_projector.embedding, "ArcFace embeddings")
            conditions.append(self.id_projector(embeds.to(latents)))
        if self.clip_width is not None:
            conditions.append(_fitting(clip_hidden_states, 3, self.clip_width, "CLIP features").to(latents))
        result: torch.Tensor = self.resampler(*conditions)
        return result

    @torch.no_grad()
    def lora(self, tokens: torch.Tensor) -> dict[str, LoraPair]:
        """The LoRA pairs that `tokens` stand for, by `{name}_{part}`; apply them with weight · `ALPHA_PER_RANK`."""
        result: dict[str, LoraPair] = self.bases(tokens)
        return result


def kohya_state_dict(pairs: Mapping[str, LoraPair]) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA file in kohya's layout: `{name}_{part}.lora_down.weight`, `.lora_up.weight`, `.alpha`."""
    result = {}
    for name, pair in pairs.items():
        result[f"{name}.lora_down.weight"] = pair.down.contiguous()
        result[f"{name}.lora_up.weight"] = pair.up.contiguous()
        result[f"{name}.alpha"] = pair.down.new_tensor(ALPHA_PER_RANK * len(pair.down))
    return result


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


def _check(resampler: Resampler, bases: HyperLoraModules, folder: Path) -> None:
    queries, wanted = resampler.latents.shape[1], _TOKENS_PER_MODULE * len(bases)
    if queries != wanted:
        raise HyperLoraError(f"{folder}: the resampler gives {queries} tokens, {len(bases)} modules need {wanted}")


def _fitting(given: torch.Tensor | None, dims: int, width: int, what: str) -> torch.Tensor:
    if given is None or given.dim() != dims or given.shape[-1] != width:
        found = "none" if given is None else tuple(given.shape)
        raise HyperLoraError(f"this HyperLoRA reads {what} {width} wide, in {dims} dimensions; given: {found}")
    return given
