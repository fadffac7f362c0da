"""ResNetFace-18 without squeeze-and-excitation, under the key names of arcface-pytorch's `resnet18_110.pth`.

Source of the layout: github.com/ronghuaiyang/arcface-pytorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ipvg_ray.metrics.nets import weights

SIDE = 128
"""Pixels of the square grey picture."""


class IrBlock(nn.Module):
    """A pre-activated residual block whose one PReLU serves twice."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, inputs, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.prelu = nn.PReLU()
        self.conv2 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.prelu(self.bn1(self.conv1(self.bn0(x))))))
        return cast(Tensor, self.prelu((x if self.downsample is None else self.downsample(x)) + y))


class ResNetFace(nn.Module):
    """(N, 1, 128, 128) grey in -1 to 1, to (N, `embedding`)."""

    def __init__(self, width: int = 64, embedding: int = 512) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU()
        inputs = width
        for stage in range(4):
            outputs = width << stage
            first = IrBlock(inputs, outputs, 1 if stage == 0 else 2)
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, IrBlock(outputs, outputs, 1)))
            inputs = outputs
        self.bn4 = nn.BatchNorm2d(inputs)
        self.fc5 = nn.Linear(inputs * (SIDE // 16) ** 2, embedding)
        self.bn5 = nn.BatchNorm1d(embedding)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.prelu(self.bn1(self.conv1(x))), 2)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return cast(Tensor, self.bn5(self.fc5(self.bn4(x).flatten(1))))


def load(path: Path) -> ResNetFace:
    """The network with a checkpoint's weights, its sizes read from them. Raises weights.WeightsError."""
    state = weights.read(path)
    width = weights.require(state, "conv1.weight", path).shape[0]
    embedding = weights.require(state, "fc5.weight", path).shape[0]
    return weights.fill(lambda: ResNetFace(width, embedding), state, path)
