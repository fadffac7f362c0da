"""How the ranks of a group meet in torch.distributed's default process group."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

_PEER_SECONDS = 24 * 3600.0
"""torch.distributed's own limit for a collective; far off, since whoever leads the ranks is quicker."""


class TorchRendezvous:
    """NCCL between cards, gloo between processes on the CPU. See `ipvg_ray.pipeline.stage.Rendezvous`."""

    def __init__(self) -> None:
        self.store: Any = None

    def open(self, host: str, ranks: int) -> tuple[str, int]:
        """Open a store at a port that the kernel picks; returns address and port."""
        import torch.distributed as dist

        self.store = dist.TCPStore(host, 0, ranks, is_master=True, wait_for_workers=False)
        return host, self.store.port

    def join(self, place: tuple[str, int], context: Any) -> None:
        """Set up the process group; `context` as `ipvg_ray.pipeline.stage.RankContext` describes it."""
        import torch
        import torch.distributed as dist

        torch.set_num_threads(context.threads)
        on_card = context.device == "cuda"
        dist.init_process_group(
            "nccl" if on_card else "gloo",
            store=self.store or dist.TCPStore(*place, context.ranks, is_master=False),
            rank=context.rank,
            world_size=context.ranks,
            timeout=timedelta(seconds=_PEER_SECONDS),
            device_id=torch.device("cuda", 0) if on_card else None,
        )
