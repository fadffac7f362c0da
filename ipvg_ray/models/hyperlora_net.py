"""The networks of a HyperLoRA checkpoint (Li et al., arXiv 2503.16944), under the published names of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ipvg_ray.models.lora import PARTS, LoraPair

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
"""An attention module's projections, as the bases are named; in the order of `lora.PARTS`."""

TOKENS_PER_MODULE = 2 * len(PROJECTIONS)

Kind = Literal["id", "base"]
"""Which LoRA: of the identity, or of all else on the picture (hair, clothes, light), where a checkpoint has one."""


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
    """Bases of one projection: `id_down_basis` (hyper_dim, in, rank) and `id_up_basis` (hyper_dim, rank, out).

    With a Base LoRA also `base_down_basis` and `base_up_basis`, of `base_rank`.
    """

    def __init__(self, hyper_dim: int, width_in: int, width_out: int, ranks: Mapping[Kind, int]) -> None:
        super().__init__()
        for kind, rank in ranks.items():
            self.register_parameter(f"{kind}_down_basis", nn.Parameter(torch.empty(hyper_dim, width_in, rank)))
            self.register_parameter(f"{kind}_up_basis", nn.Parameter(torch.empty(hyper_dim, rank, width_out)))

    def forward(self, down: torch.Tensor, up: torch.Tensor, kind: Kind) -> LoraPair:
        """Mix the bases with two tokens (hyper_dim,)."""
        return LoraPair(
            torch.einsum("d,dir->ri", down, self.get_parameter(f"{kind}_down_basis")),
            torch.einsum("d,dro->or", up, self.get_parameter(f"{kind}_up_basis")),
        )


class HyperLoraModules(nn.ModuleList):
    """The bases of all attention modules, in the order of `hyper_lora_modules.json`."""

    def __init__(self, widths: Mapping[str, tuple[int, int]], hyper_dim: int, rank: int, base_rank: int = 0) -> None:
        """Leave the bases empty.

        Args:
            widths: an attention module's name, to the width of its queries and that of its keys and values' input.
            hyper_dim: width of the tokens.
            rank: of the ID LoRA.
            base_rank: of the Base LoRA; 0 for none.
        """
        super().__init__()
        self.names = tuple(widths)
        self.ranks: dict[Kind, int] = {"id": rank, "base": base_rank} if base_rank else {"id": rank}
        for hidden, context in widths.values():
            inputs = {"to_q": hidden, "to_k": context, "to_v": context, "to_out": hidden}
            bases = {p: LoraBasis(hyper_dim, inputs[p], hidden, self.ranks) for p in PROJECTIONS}
            self.append(nn.ModuleDict(bases))

    def forward(self, tokens: torch.Tensor, kind: Kind = "id") -> dict[str, LoraPair]:
        """`{name}_{part}` to its pair, from tokens (1, 8·modules, hyper_dim)."""
        by_part = tokens[0].unflatten(0, (len(self), len(PROJECTIONS), 2))
        return {
            f"{name}_{part}": module.get_submodule(projection)(*by_part[i, j], kind)
            for i, (name, module) in enumerate(zip(self.names, self, strict=True))
            for j, (projection, part) in enumerate(zip(PROJECTIONS, PARTS, strict=True))
        }
