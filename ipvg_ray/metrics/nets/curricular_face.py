"""CurricularFace's IR-101 backbone, under the key names of `glint360k_curricular_face_r101_backbone.bin`.

Huang et al., "CurricularFace" (arXiv 2004.00288); layout of TFace's `model_irse`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from ipvg_ray.metrics.nets import weights

BLOCKS = (3, 13, 30, 3)
SIDE = 112
"""Pixels of the square picture."""


class IrBlock(nn.Module):
    """A pre-activated residual block; `norm` puts a batch norm behind the first convolution too."""

    def __init__(self, inputs: int, depth: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module
        if inputs == depth:
            self.shortcut_layer = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(nn.Conv2d(inputs, depth, 1, stride, bias=False), nn.BatchNorm2d(depth))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, depth, 3, 1, 1, bias=False),
            *([nn.BatchNorm2d(depth)] if norm else []),
            nn.PReLU(depth),
            nn.Conv2d(depth, depth, 3, stride, 1, bias=False),
            nn.BatchNorm2d(depth),
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.res_layer(x) + self.shortcut_layer(x))


class CurricularFace(nn.Module):
    """Aligned faces to embeddings: (N, 3, 112, 112) RGB in -1 to 1, to (N, `embedding`), not of length 1.

    Args:
        width: channels of the first stage; 64 in the published weights.
        blocks: per stage, each of which halves the size and, from the second on, doubles the channels.
    """

    def __init__(
        self, width: int = 64, embedding: int = 512, blocks: Sequence[int] = BLOCKS, norm: bool = True
    ) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.PReLU(width)
        )
        body: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(blocks):
            depth = width << stage
            body.append(IrBlock(inputs, depth, 2, norm))
            body += [IrBlock(depth, depth, 1, norm) for _ in range(count - 1)]
            inputs = depth
        self.body = nn.Sequential(*body)
        side = SIDE >> len(blocks)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Dropout(0.4),
            nn.Flatten(),
            nn.Linear(inputs * side * side, embedding),
            nn.BatchNorm1d(embedding, affine=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.output_layer(self.body(self.input_layer(x))))


def load(path: Path) -> CurricularFace:
    """The network with a checkpoint's weights, its sizes read from them. Raises weights.WeightsError."""
    state = weights.read(path)
    width = weights.require(state, "input_layer.0.weight", path).shape[0]
    embedding = weights.require(state, "output_layer.3.weight", path).shape[0]
    norm = "body.0.res_layer.5.weight" in state
    last = f"res_layer.{4 if norm else 3}.weight"
    depths = [value.shape[0] for key, value in state.items() if key.endswith(last)]
    blocks = [depths.count(width << stage) for stage in range(len(set(depths)))]
    return weights.fill(lambda: CurricularFace(width, embedding, blocks, norm), state, path)
