"""A Wan or VACE transformer's token sequence split over the ranks of a group: Ulysses, ring, and both together.

Ulysses (Jacobs et al., arXiv 2309.14509) trades token shards for head shards around each self-attention, ring
attention (Liu et al., arXiv 2310.01889) passes keys and values from rank to rank; USP (Fang and Zhao, arXiv
2405.07719) nests the first in the second. Everything but self-attention works token by token and needs no exchange.

Shards are of equal length: the sequence is padded at its end, and the padding is cut off the keys and values before
they are attended to. So any number of tokens and heads works, and no rank ever has to ask another for its sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ipvg_ray.models.wan.loop import Branch, Evaluate, Shared
from ipvg_ray.models.wan.ring import ring_attention


class ParallelError(ValueError):
    """A layout that does not fit the group, or a model that cannot be split."""


@dataclass(frozen=True)
class Layout:
    """How many ranks share what; the ranks of a group are numbered in this order, `ulysses` fastest.

    Attributes:
        cfg: ranks among which the branches of a guided step are dealt.
        ring: ranks around which keys and values travel.
        ulysses: ranks that trade tokens for heads; neighbours, so that they share a node where groups span nodes.
    """

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def ranks(self) -> int:
        """Ranks of the whole group."""
        return self.cfg * self.ring * self.ulysses


@dataclass(frozen=True)
class Axis:
    """One way in which this process's group is cut: the process group of its peers, their number, its own place."""

    group: Any
    size: int = 1
    rank: int = 0


class Mesh:
    """This process's place in its group, by layout. Every rank must make it, at the same time.

    Raises:
        ParallelError: where torch.distributed is not set up for as many ranks as the layout has.
    """

    def __init__(self, layout: Layout, device: str) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        there = dist.get_world_size() if dist.is_initialized() else 1
        if there != layout.ranks:
            raise ParallelError(f"{layout} is for {layout.ranks} ranks, and the group has {there}")
        self.layout = layout
        self.device_mesh = init_device_mesh(
            device, (layout.cfg, layout.ring, layout.ulysses), mesh_dim_names=("cfg", "ring", "ulysses")
        )
        self.cfg, self.ring, self.ulysses = (self._axis(name) for name in ("cfg", "ring", "ulysses"))
        self.everyone = Axis(dist.group.WORLD, layout.ranks, dist.get_rank())

    def _axis(self, name: str) -> Axis:
        group = self.device_mesh.get_group(name)
        return Axis(group, dist.get_world_size(group), dist.get_rank(group))


class SplitSequence:
    """The token sequence of one forward at a time, cut among the ring and Ulysses ranks of a mesh.

    Attributes:
        tokens: of the sequence now in work, all ranks together.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.ring = mesh.ring
        self.ulysses = mesh.ulysses
        self.shards = mesh.ring.size * mesh.ulysses.size
        self.place = mesh.ring.rank * mesh.ulysses.size + mesh.ulysses.rank
        self.tokens = 0

    def begin(self, tokens: int) -> None:
        """Note the length of the sequence that is to be cut next."""
        self.tokens = tokens

    @property
    def length(self) -> int:
        """Tokens of each shard, padding included."""
        return -(-self.tokens // self.shards)

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's shard of a sequence: (B, tokens, ...) to (B, length, ...), zeros behind its end."""
        start = min(self.place * self.length, self.tokens)
        shard = whole[:, start : start + self.length]
        if missing := self.length - shard.shape[1]:
            shard = torch.cat([shard, shard.new_zeros(shard.shape[0], missing, *shard.shape[2:])], dim=1)
        return shard.contiguous()

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """All ranks' shards put together: (B, length, ...) to (B, tokens, ...)."""
        for axis in (self.ulysses, self.ring):
            part = gathered(part, axis)
        return part[:, : self.tokens]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: Any) -> torch.Tensor:
        """Self-attention of this rank's tokens to those of all ranks.

        Args:
            q, k, v: (B, length, heads, head_dim).
            backend: diffusers' name of the attention kernels; ring attention takes torch's own, as it needs their
                log-sum-exp.

        Returns:
            (B, length, heads, head_dim).
        """
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        heads = q.shape[2]
        q, k, v = self._tokens_for_heads(q, k, v)
        chunk = self.length * self.ulysses.size
        known = [min(max(self.tokens - i * chunk, 0), chunk) for i in range(self.ring.size)]
        if self.ring.size > 1:
            out = ring_attention(q, k, v, known, self.ring)
        else:
            out = dispatch_attention_fn(q, k[:, : known[0]], v[:, : known[0]], backend=backend)
        return self._heads_for_tokens(out, heads)

    def _tokens_for_heads(self, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """All tokens of this ring place and a share of the heads, padded with zero heads where they do not divide.

        Padding costs no time: the busiest rank has ⌈heads / ranks⌉ of them either way.
        """
        ranks = self.ulysses.size
        if ranks == 1:
            return states
        batch, length, heads, width = states[0].shape
        share = -(-heads // ranks)
        if share * ranks > heads:
            states = tuple(nn.functional.pad(x, (0, 0, 0, share * ranks - heads)) for x in states)
        sent = torch.stack([x.view(batch, length, ranks, share, width).permute(2, 0, 1, 3, 4) for x in states], dim=1)
        come = self._trade(sent)  # (ranks, 3, B, length, share, width)
        return come.permute(1, 2, 0, 3, 4, 5).reshape(len(states), batch, ranks * length, share, width).unbind(0)

    def _heads_for_tokens(self, out: torch.Tensor, heads: int) -> torch.Tensor:
        ranks = self.ulysses.size
        if ranks == 1:
            return out
        batch, _, share, width = out.shape
        sent = out.reshape(batch, ranks, self.length, share, width).transpose(0, 1).contiguous()
        come = self._trade(sent)  # (ranks, B, length, share, width)
        return come.permute(1, 2, 0, 3, 4).reshape(batch, self.length, ranks * share, width)[:, :, :heads]

    def _trade(self, sent: torch.Tensor) -> torch.Tensor:
        come = torch.empty_like(sent)
        dist.all_to_all_single(come, sent, group=self.ulysses.group)
        return come


def gathered(part: torch.Tensor, axis: Axis, dim: int = 1) -> torch.Tensor:
    """The equal parts of an axis's ranks joined along a dimension."""
    if axis.size == 1:
        return part
    first = part.movedim(dim, 0).contiguous()
    joined = first.new_empty(axis.size * first.shape[0], *first.shape[1:])
    dist.all_gather_into_tensor(joined, first, group=axis.group)
    return joined.movedim(0, dim)


def gathered_unequal(part: torch.Tensor, sizes: Sequence[int], axis: Axis, dim: int) -> torch.Tensor:
    """Parts of known, unequal sizes joined along a dimension; gloo and NCCL want them equal, so they travel padded."""
    most = max(sizes)
    if missing := most - part.shape[dim]:
        shape = list(part.shape)
        shape[dim] = missing
        part = torch.cat([part, part.new_zeros(shape)], dim=dim)
    pieces = gathered(part, axis, dim).split(most, dim=dim)
    return torch.cat([piece.narrow(dim, 0, size) for piece, size in zip(pieces, sizes, strict=True)], dim=dim)


def summed(values: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Numbers added up, in place, over the ranks that share a sequence, for choices that they must make alike."""
    for axis in (mesh.ulysses, mesh.ring):
        if axis.size > 1:
            dist.all_reduce(values, group=axis.group)
    return values


def told(value: Any, axis: Axis) -> Any:
    """The first rank's value, on every rank of an axis; the others' values are not looked at."""
    values = [value]
    dist.broadcast_object_list(values, group=axis.group, group_src=0)
    return values[0]


def split_branches(evaluate: Evaluate, axis: Axis) -> Evaluate:
    """Deal a step's branches among ranks, each of which computes its own; all get all predictions.

    Two ranks halve the time of classifier-free guidance, three take a third for TPIGE's three branches.

    Args:
        evaluate: how one rank computes the branches that fall to it.
    """

    def dealt(shared: Shared, branches: Sequence[Branch]) -> list[torch.Tensor]:
        mine = branches[axis.rank :: axis.size]
        found = evaluate(shared, mine) if mine else []
        missing = -(-len(branches) // axis.size) - len(found)
        example = found[0] if found else shared.latents.new_empty(prediction_shape(shared))
        sent = torch.stack([*found, *([torch.zeros_like(example)] * missing)])
        come = gathered(sent, axis, dim=0).unflatten(0, (axis.size, -1))
        return [come[i % axis.size, i // axis.size] for i in range(len(branches))]

    return evaluate if axis.size == 1 else dealt


def prediction_shape(shared: Shared) -> tuple[int, ...]:
    """Shape of one branch's prediction: the latents', with the channels that the network gives."""
    return (len(shared.latents), shared.transformer.config.out_channels, *shared.latents.shape[2:])


class SplitAttention:
    """diffusers' attention processor for the self-attention of Wan's blocks, over a split sequence."""

    _attention_backend: Any = None  # written by set_attention_backend
    _parallel_config: Any = None  # read by diffusers, which must not split once more

    def __init__(self, sequence: SplitSequence, backend: Any) -> None:
        self.sequence = sequence
        self._attention_backend = backend

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if getattr(attn, "fused_projections", False):
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        if rotary_emb is not None:
            q, k = rotated(q, *rotary_emb), rotated(k, *rotary_emb)
        out = self.sequence.attend(q, k, v, self._attention_backend).flatten(2).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))  # type: ignore[no-any-return]


def rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding on interleaved pairs: (B, L, heads, head_dim), with tables (1, L, 1, head_dim)."""
    even, odd = states.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(states)


def split_transformer(transformer: Any, mesh: Mesh) -> SplitSequence:
    """Make every forward of a `WanTransformer3DModel` or `WanVACETransformer3DModel` a joint one of the mesh's ranks.

    All ranks call it with the same inputs and get the same, whole output. The cut is made where the blocks begin
    (VACE's blocks too, whose hints are then shards that fit), and mended behind `proj_out`. So guidance may leave out
    any block but the first.

    Raises:
        ParallelError: for another model.
    """
    if not all(hasattr(transformer, name) for name in ("rope", "blocks", "proj_out", "patch_embedding")):
        raise ParallelError(f"{type(transformer).__name__} is no Wan transformer; its sequence cannot be split")
    sequence = SplitSequence(mesh)
    if sequence.shards == 1:
        return sequence
    vace = list(getattr(transformer, "vace_blocks", ()))
    for block in (*transformer.blocks, *vace):
        block.attn1.set_processor(SplitAttention(sequence, block.attn1.processor._attention_backend))
    # Not where the sequence begins: TI2V gives every token a time, and those must be cut before they are embedded.
    transformer.register_forward_pre_hook(_cut_times(sequence), with_kwargs=True)
    transformer.rope.register_forward_hook(_cut_rotations(sequence))
    transformer.blocks[0].register_forward_pre_hook(_cut_inputs(sequence, {0: "hidden_states"}), with_kwargs=True)
    if vace:
        # Later VACE blocks take their control from the one before, and do not read the hidden states at all.
        cut = _cut_inputs(sequence, {0: "hidden_states", 2: "control_hidden_states"})
        vace[0].register_forward_pre_hook(cut, with_kwargs=True)
    transformer.proj_out.register_forward_hook(lambda module, args, output: sequence.whole(output))
    return sequence


def _cut_times(sequence: SplitSequence) -> Any:
    def cut(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args_ = list(args)
        times = kwargs.get("timestep", args_[1] if len(args_) > 1 else None)
        if times is None or times.ndim != 2:
            return None
        sequence.begin(times.shape[1])
        if "timestep" in kwargs:
            return args, {**kwargs, "timestep": sequence.part(times)}
        args_[1] = sequence.part(times)
        return tuple(args_), kwargs

    return cut


def _cut_rotations(sequence: SplitSequence) -> Any:
    def cut(module: Any, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        sequence.begin(output[0].shape[1])
        return tuple(sequence.part(table) for table in output)

    return cut


def _cut_inputs(sequence: SplitSequence, named: dict[int, str]) -> Any:
    def cut(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args_ = [sequence.part(x) if i in named else x for i, x in enumerate(args)]
        kwargs_ = {name: sequence.part(x) if name in named.values() else x for name, x in kwargs.items()}
        return tuple(args_), kwargs_

    return cut
