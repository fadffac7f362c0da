"""ViCLIP (Wang et al., InternVid, arXiv 2307.06942), under the key names of `ViClip-InternVid-10M-FLT.pth`."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ipvg_ray.metrics.nets import weights

_HEAD = 64


@dataclass(frozen=True)
class ViClipSizes:
    """Sizes of both halves; the defaults are the published L/14's.

    Attributes:
        side, patch, frames: what the video half takes.
        width, layers: of the video half.
        text_width, text_layers, vocabulary, tokens: of the text half.
        embedding: length of what both give.
    """

    side: int = 224
    patch: int = 14
    frames: int = 8
    width: int = 1024
    layers: int = 24
    text_width: int = 768
    text_layers: int = 12
    vocabulary: int = 49408
    tokens: int = 32
    embedding: int = 768


class QuickGelu(nn.Module):
    """x · sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a layer norm; tokens first, then the batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, max(1, width // _HEAD))
        self.ln_1 = nn.LayerNorm(width)
        parts = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGelu()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(parts))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return cast(Tensor, x + self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width) for _ in range(layers)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class VideoEncoder(nn.Module):
    """(N, T, 3, side, side) to (N, embedding): every patch of every frame attends to every other."""

    def __init__(self, sizes: ViClipSizes) -> None:
        super().__init__()
        kernel = (1, sizes.patch, sizes.patch)
        self.conv1 = nn.Conv3d(3, sizes.width, kernel, kernel, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(sizes.width))
        self.positional_embedding = nn.Parameter(torch.empty((sizes.side // sizes.patch) ** 2 + 1, sizes.width))
        self.ln_pre = nn.LayerNorm(sizes.width)
        self.temporal_positional_embedding = nn.Parameter(torch.empty(1, sizes.frames, sizes.width))
        self.transformer = Transformer(sizes.width, sizes.layers)
        self.ln_post = nn.LayerNorm(sizes.width)
        self.proj = nn.Parameter(torch.empty(sizes.width, sizes.embedding))

    def forward(self, video: Tensor) -> Tensor:
        patches = self.conv1(video.transpose(1, 2)).flatten(3).permute(0, 3, 2, 1)  # N, patches, T, width
        patches = patches + self.positional_embedding[1:, None] + self.temporal_positional_embedding[:, None]
        first = (self.class_embedding + self.positional_embedding[0]).expand(len(video), 1, -1)
        x = self.ln_pre(torch.cat([first, patches.flatten(1, 2)], 1))
        x = self.transformer(x.transpose(0, 1))
        return cast(Tensor, self.ln_post(x[0]) @ self.proj)


class TextEncoder(nn.Module):
    """Token ids (N, tokens) to (N, embedding); the text ends at its highest id."""

    def __init__(self, sizes: ViClipSizes) -> None:
        super().__init__()
        self.transformer = Transformer(sizes.text_width, sizes.text_layers)
        self.token_embedding = nn.Embedding(sizes.vocabulary, sizes.text_width)
        self.positional_embedding = nn.Parameter(torch.empty(sizes.tokens, sizes.text_width))
        self.ln_final = nn.LayerNorm(sizes.text_width)
        self.text_projection = nn.Parameter(torch.empty(sizes.text_width, sizes.embedding))

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = torch.full((length, length), -torch.inf, device=tokens.device).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer(x.transpose(0, 1), mask).transpose(0, 1))
        ends = tokens.argmax(dim=-1)
        return cast(Tensor, x[torch.arange(len(x), device=x.device), ends] @ self.text_projection)


class ViClip(nn.Module):
    """Videos and texts in one space. `temp` is the training's temperature, kept because the checkpoint holds it."""

    def __init__(self, sizes: ViClipSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.vision_encoder = VideoEncoder(sizes)
        self.text_encoder = TextEncoder(sizes)
        self.temp = nn.Parameter(torch.empty([]))


def load(path: Path) -> ViClip:
    """The network with a checkpoint's weights, its sizes read from them. Raises weights.WeightsError."""
    state = weights.read(path)
    convolution = weights.require(state, "vision_encoder.conv1.weight", path)
    places = weights.require(state, "vision_encoder.positional_embedding", path)
    words = weights.require(state, "text_encoder.token_embedding.weight", path)
    patch = convolution.shape[-1]
    sizes = ViClipSizes(
        side=round((len(places) - 1) ** 0.5) * patch,
        patch=patch,
        frames=weights.require(state, "vision_encoder.temporal_positional_embedding", path).shape[1],
        width=convolution.shape[0],
        layers=_layers(list(state), "vision_encoder"),
        text_width=words.shape[1],
        text_layers=_layers(list(state), "text_encoder"),
        vocabulary=words.shape[0],
        tokens=len(weights.require(state, "text_encoder.positional_embedding", path)),
        embedding=weights.require(state, "vision_encoder.proj", path).shape[1],
    )
    return weights.fill(lambda: ViClip(sizes), state, path)


def _layers(keys: list[str], half: str) -> int:
    return sum(key.startswith(f"{half}.transformer.") and key.endswith(".ln_1.weight") for key in keys)
