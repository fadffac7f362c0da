"""MUSIQ (Ke et al., arXiv 2108.05997), under the key names of `musiq_spaq_ckpt-358bb6af.pth`.

A picture is cut into patches of 32 pixels at three sizes; each patch becomes a token that knows its place and size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipvg_ray.metrics.nets import weights

_PATCH, _GROUPS, _HEAD = 32, 32, 64
_LONG_SIDES = (224, 384)


@dataclass(frozen=True)
class MusiqSizes:
    """Sizes; the defaults are the published ones. `tokens` are the channels of the first convolution."""

    tokens: int = 64
    hidden: int = 384
    mlp: int = 1152
    layers: int = 14
    scales: int = 3
    grid: int = 10


class StdConv(nn.Conv2d):
    """A convolution whose filters have mean 0 and deviation 1, padded as TensorFlow's SAME does."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(_same(x, self.kernel_size[0], self.stride[0]), weight, self.bias, self.stride)


def _same(x: Tensor, kernel: int, stride: int) -> Tensor:
    pads: list[int] = []
    for size in (x.shape[3], x.shape[2]):
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class Bottleneck(nn.Module):
    """The one residual block in front of the transformer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = StdConv(inputs, inputs, 1, bias=False)
        self.gn1 = nn.GroupNorm(_GROUPS, inputs, eps=1e-4)
        self.conv2 = StdConv(inputs, inputs, 3, bias=False)
        self.gn2 = nn.GroupNorm(_GROUPS, inputs, eps=1e-4)
        self.conv3 = StdConv(inputs, outputs, 1, bias=False)
        self.gn3 = nn.GroupNorm(_GROUPS, outputs, eps=1e-4)
        self.conv_proj = StdConv(inputs, outputs, 1, bias=False)
        self.gn_proj = nn.GroupNorm(_GROUPS, outputs, eps=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.gn1(self.conv1(x)))
        y = F.relu(self.gn2(self.conv2(y)))
        return F.relu(self.gn3(self.conv3(y)) + self.gn_proj(self.conv_proj(x)))


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // _HEAD)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = (
            layer(x).view(n, length, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return cast(Tensor, self.out(mixed.transpose(1, 2).reshape(n, length, width)))


class Mlp(nn.Module):
    """The feed-forward part."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x))))


class EncoderBlock(nn.Module):
    """Attention and feed-forward, each behind a layer norm."""

    def __init__(self, width: int, mlp: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, mlp)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class PlaceEmbedding(nn.Module):
    """One vector for each cell of a square grid that is laid over a picture of any size."""

    def __init__(self, grid: int, width: int) -> None:
        super().__init__()
        self.position_emb = nn.Parameter(torch.empty(1, grid * grid, width))


class ScaleEmbedding(nn.Module):
    """One vector for each of the sizes."""

    def __init__(self, scales: int, width: int) -> None:
        super().__init__()
        self.scale_emb = nn.Parameter(torch.empty(scales, width))


class TransformerEncoder(nn.Module):
    """Patch tokens to the class token's final state."""

    def __init__(self, sizes: MusiqSizes) -> None:
        super().__init__()
        self.posembed_input = PlaceEmbedding(sizes.grid, sizes.hidden)
        self.scaleembed_input = ScaleEmbedding(sizes.scales, sizes.hidden)
        self.cls = nn.Parameter(torch.empty(1, 1, sizes.hidden))
        self.encoder_norm = nn.LayerNorm(sizes.hidden, eps=1e-6)
        blocks = {f"encoderblock_{number}": EncoderBlock(sizes.hidden, sizes.mlp) for number in range(sizes.layers)}
        self.transformer = nn.ModuleDict(blocks)

    def forward(self, tokens: Tensor, places: Tensor, scales: Tensor) -> Tensor:
        x = tokens + self.posembed_input.position_emb[0, places] + self.scaleembed_input.scale_emb[scales]
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        for block in self.transformer.values():
            x = block(x)
        return cast(Tensor, self.encoder_norm(x[:, 0]))


class Musiq(nn.Module):
    """Pictures to technical quality: (N, 3, H, W) in 0 to 1, to (N,), 0 to 100 for SPAQ."""

    def __init__(self, sizes: MusiqSizes) -> None:
        super().__init__()
        self.grid = sizes.grid
        self.conv_root = StdConv(3, sizes.tokens, 7, 2, bias=False)
        self.gn_root = nn.GroupNorm(_GROUPS, sizes.tokens, eps=1e-6)
        self.block1 = Bottleneck(sizes.tokens, 4 * sizes.tokens)
        self.embedding = nn.Linear(4 * sizes.tokens * (_PATCH // 4) ** 2, sizes.hidden)
        self.transformer_encoder = TransformerEncoder(sizes)
        self.head = nn.Linear(sizes.hidden, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        pictures = (pictures - 0.5) * 2
        height, width = pictures.shape[2:]
        long = max(height, width)
        pieces = []
        for side in _LONG_SIDES:
            size = (round(height * (side / long)), round(width * (side / long)))
            pieces.append(_patches(F.interpolate(pictures, size, mode="bicubic"), self.grid))
        pieces.append(_patches(pictures, self.grid))
        patches = torch.cat([patch for patch, _ in pieces], 1)
        places = torch.cat([place for _, place in pieces])
        scales = torch.cat([torch.full_like(place, number) for number, (_, place) in enumerate(pieces)])
        n, length = patches.shape[:2]
        x = F.relu(self.gn_root(self.conv_root(patches.flatten(0, 1))))
        x = self.block1(F.max_pool2d(_same(x, 3, 2), 3, 2))
        x = self.embedding(x.permute(0, 2, 3, 1).reshape(n, length, -1))
        return cast(Tensor, self.head(self.transformer_encoder(x, places, scales))[:, 0])


def _patches(pictures: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Patches (N, L, 3, 32, 32) row by row, zeros around them where they do not fit, and each one's cell of the grid.

    The original pads the patches of a size to a fixed count and masks what it added; left out, nothing changes.
    """
    n, channels = pictures.shape[:2]
    cut = F.unfold(_same(pictures, _PATCH, _PATCH), _PATCH, stride=_PATCH).transpose(1, 2)
    rows, columns = (math.ceil(size / _PATCH) for size in pictures.shape[2:])
    cells = [torch.arange(count, device=pictures.device) * grid // count for count in (rows, columns)]
    return cut.reshape(n, -1, channels, _PATCH, _PATCH), (cells[0][:, None] * grid + cells[1]).flatten()


def load(path: Path) -> Musiq:
    """The network with a checkpoint's weights, its sizes read from them. Raises weights.WeightsError."""
    state = weights.read(path, inside=("state_dict", "model", "params"))
    embedding = weights.require(state, "embedding.weight", path)
    sizes = MusiqSizes(
        tokens=weights.require(state, "conv_root.weight", path).shape[0],
        hidden=embedding.shape[0],
        mlp=weights.require(state, "transformer_encoder.transformer.encoderblock_0.mlp.fc1.weight", path).shape[0],
        layers=sum(key.endswith(".norm1.weight") for key in state),
        scales=weights.require(state, "transformer_encoder.scaleembed_input.scale_emb", path).shape[0],
        grid=math.isqrt(weights.require(state, "transformer_encoder.posembed_input.position_emb", path).shape[1]),
    )
    return weights.fill(lambda: Musiq(sizes), state, path)
