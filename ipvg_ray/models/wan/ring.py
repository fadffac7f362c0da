"""Ring attention: keys and values travel from rank to rank while each attends to those it holds.

Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context", arXiv 2310.01889. Each round's
result is weighted by its share of the softmax's denominator, so the sum over all rounds is exact attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def ring_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, known: Sequence[int], axis: Any) -> torch.Tensor:
    """Attention of this rank's queries to the keys of all ranks of a ring.

    The next keys and values are on their way while the present ones are attended to.

    Args:
        q, k, v: (B, length, heads, head_dim); the same length on every rank.
        known: per rank, how many of its tokens are real; those behind are padding that nobody attends to.
        axis: the ring, an `ipvg_ray.models.wan.parallel.Axis`.

    Returns:
        (B, length, heads, head_dim).
    """
    held = torch.stack((k, v))
    total: tuple[torch.Tensor, torch.Tensor] | None = None
    for hop in range(axis.size):
        coming, sending = _pass_on(held, axis) if hop + 1 < axis.size else (held, [])
        tokens = known[(axis.rank - hop) % axis.size]
        if tokens:
            found = attention_with_lse(q, held[0, :, :tokens], held[1, :, :tokens])
            total = found if total is None else _merged(total, found)
        for request in sending:
            request.wait()
        held = coming
    assert total is not None  # the first rank of a ring always holds tokens
    return total[0].type_as(q)


def _pass_on(held: torch.Tensor, axis: Any) -> tuple[torch.Tensor, list[Any]]:
    coming = torch.empty_like(held)
    after = dist.get_global_rank(axis.group, (axis.rank + 1) % axis.size)
    before = dist.get_global_rank(axis.group, (axis.rank - 1) % axis.size)
    trades = [
        dist.P2POp(dist.isend, held, after, axis.group),
        dist.P2POp(dist.irecv, coming, before, axis.group),
    ]
    return coming, dist.batch_isend_irecv(trades)


def _merged(
    one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two parts of one attention as if made together; outputs (B, L, H, D), log-sum-exps (B, L, H, 1), float32."""
    lse = torch.logaddexp(one[1], other[1])
    return one[0] * (one[1] - lse).exp() + other[0] * (other[1] - lse).exp(), lse


def attention_with_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and the logarithm of its denominator, from torch's own kernels (its public call keeps the latter back).

    Args:
        q, k, v: (B, L, heads, head_dim).

    Returns:
        float32: output (B, L, heads, head_dim) and log-sum-exp (B, L, heads, 1).
    """
    aten = torch.ops.aten
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2]
    elif q.dtype not in (torch.bfloat16, torch.float16):
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    elif torch.cuda.get_device_capability(q.device) >= (9, 0):  # where cuDNN's kernels are far ahead of the others
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    else:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    lse = lse.reshape(*lse.shape[:3], 1)[:, :, : q.shape[2]]  # some kernels round the length up
    return out.transpose(1, 2).float(), lse.transpose(1, 2).float()
