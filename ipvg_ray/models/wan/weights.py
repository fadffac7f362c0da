"""Weights that one card cannot hold: cut over the ranks of a group, or kept in host memory."""

from __future__ import annotations

from typing import Any, Literal

import torch

from ipvg_ray.models.wan.parallel import Mesh, ParallelError

Placement = Literal["whole", "fsdp", "offload"]
"""`whole`: every rank holds all weights, which is fastest. `fsdp`: each holds a share and gathers one block at a time
(fully sharded data parallel, arXiv 2304.11277). `offload`: blocks are fetched from host memory ahead of their turn."""


def place(transformer: Any, placement: Placement, device: str, mesh: Mesh | None) -> None:
    """Bring a transformer's weights to where it computes.

    Args:
        transformer: a diffusers Wan transformer, on the CPU.
        device: where it computes.
        mesh: the group; None outside of groups.

    Raises:
        ParallelError: for `fsdp` where no two ranks work on the same branch: ranks of different branches do not call
            their blocks at the same time, and so cannot share weights.
    """
    if placement == "offload" and device != "cpu":
        transformer.enable_group_offload(
            onload_device=torch.device(device),
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=True,
        )
    elif placement == "fsdp":
        _shard(transformer, device, mesh)
    else:
        transformer.to(device)


def _shard(transformer: Any, device: str, mesh: Mesh | None) -> None:
    from torch.distributed.fsdp import fully_shard

    if mesh is None or mesh.ring.size * mesh.ulysses.size == 1:
        raise ParallelError("weights can only be cut over ring and Ulysses ranks, and the group has none")
    # FSDP shards over one dimension and copies over the other, so the longer of the two is cut.
    name = "ulysses" if mesh.ulysses.size >= mesh.ring.size else "ring"
    for block in (*transformer.blocks, *getattr(transformer, "vace_blocks", ())):
        # Every block is a root of its own, and roots keep what they gathered unless they are told not to.
        fully_shard(block.to(device), mesh=mesh.device_mesh[name], reshard_after_forward=True)
    transformer.to(device)
