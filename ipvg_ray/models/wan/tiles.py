"""Wan's video decoder over the ranks of a group: each decodes a band of rows, and the bands meet without a seam.

Tiles that overlap and are blended cost up to 1.8 times the work and give another picture than the whole decoder. Here
neighbours exchange the rows at their edges in front of every convolution, so that the bands joined are what one
process would have decoded. Everything else in the decoder works pixel by pixel, except for one attention per latent
frame at the lowest resolution, which every rank makes whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ipvg_ray.models.wan.parallel import Axis, gathered_unequal


def decode(vae: Any, latents: torch.Tensor, axis: Axis) -> torch.Tensor:
    """What `vae.decode` gives, made by all ranks of an axis together; all must call it with the same latents.

    Args:
        vae: an `AutoencoderKLWan`, of Wan 2.1 or 2.2, without tiling.
        latents: (B, C, T, h, w), scaled as the VAE wants them.

    Returns:
        (B, 3, F, H, W) in [-1, 1], on every rank.
    """
    ranks, height = axis.size, latents.shape[3]
    if ranks == 1 or height < ranks:  # rows are not cut: where there are fewer than ranks, all decode everything
        return vae.decode(latents, return_dict=False)[0]  # type: ignore[no-any-return]
    rows = [len(band) for band in torch.arange(height).tensor_split(ranks)]
    start = sum(rows[: axis.rank])
    with _joined(vae, axis, rows):
        band = vae.decode(latents[:, :, :, start : start + rows[axis.rank]].contiguous(), return_dict=False)[0]
    scale = band.shape[3] // rows[axis.rank]
    return gathered_unequal(band, [scale * n for n in rows], axis, dim=3)


@contextmanager
def _joined(vae: Any, axis: Axis, rows: list[int]) -> Iterator[None]:
    """Every convolution of the decoder sees its neighbours' rows, and every attention all of them."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock

    handles = []
    for module in vae.decoder.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and module.kernel_size[-2] > 1:
            handles.append(module.register_forward_pre_hook(_with_borders(axis)))
            handles.append(module.register_forward_hook(lambda module, args, out: out[..., 1:-1, :]))
        elif isinstance(module, WanAttentionBlock):
            handles.append(module.register_forward_pre_hook(_whole(axis, rows)))
            handles.append(module.register_forward_hook(_own(axis, rows)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_borders(axis: Axis) -> Any:
    """One row of each neighbour around this rank's; zeros at the picture's edges, as the convolution pads itself."""

    def hook(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs = [x for x in args if x is not None]  # the frames, and those before them that the convolution keeps
        above, below = _neighbours([x[..., :1, :] for x in inputs], [x[..., -1:, :] for x in inputs], axis)
        return tuple(torch.cat([a, x, b], dim=-2) for a, x, b in zip(above, inputs, below, strict=True))

    return hook


def _neighbours(
    first: list[torch.Tensor], last: list[torch.Tensor], axis: Axis
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The last rows of the rank before and the first rows of the one behind, all in one message each way."""
    frames = [x.shape[2] if x.ndim == 5 else 1 for x in first]
    above, below = (torch.cat(edge, dim=2) if len(edge) > 1 else edge[0].contiguous() for edge in (first, last))
    come_above, come_below = torch.zeros_like(above), torch.zeros_like(below)
    trades = []
    for neighbour, sent, come in ((axis.rank - 1, above, come_above), (axis.rank + 1, below, come_below)):
        if 0 <= neighbour < axis.size:
            peer = dist.get_global_rank(axis.group, neighbour)
            trades.append(dist.P2POp(dist.isend, sent, peer, axis.group))
            trades.append(dist.P2POp(dist.irecv, come, peer, axis.group))
    for request in dist.batch_isend_irecv(trades):
        request.wait()
    if len(frames) == 1:
        return [come_above], [come_below]
    return list(come_above.split(frames, dim=2)), list(come_below.split(frames, dim=2))


def _whole(axis: Axis, rows: list[int]) -> Any:
    return lambda module, args: (gathered_unequal(args[0], rows, axis, dim=3),)


def _own(axis: Axis, rows: list[int]) -> Any:
    start = sum(rows[: axis.rank])
    return lambda module, args, out: out[:, :, :, start : start + rows[axis.rank]]
