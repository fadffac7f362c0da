"""Inception-v3 up to its 2048 pooled features, under torchvision's key names (`inception_v3_google-0cc3c7bd.pth`).

Szegedy et al., arXiv 1512.00567. The auxiliary and the last classifier of the checkpoint are not used.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipvg_ray.metrics.nets import weights

SIDE = 299
"""Pixels of the square picture."""
FULL = 16

Size = int | tuple[int, int]


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Size, stride: int = 1, padding: Size = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _pooled(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1)


class MixedA(nn.Module):
    """1×1, 5×5 and doubled 3×3 branches beside a pooled one."""

    def __init__(self, inputs: int, pool: int, w: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(inputs, 4 * w, 1)
        self.branch5x5_1 = ConvNorm(inputs, 3 * w, 1)
        self.branch5x5_2 = ConvNorm(3 * w, 4 * w, 5, padding=2)
        self.branch3x3dbl_1 = ConvNorm(inputs, 4 * w, 1)
        self.branch3x3dbl_2 = ConvNorm(4 * w, 6 * w, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(6 * w, 6 * w, 3, padding=1)
        self.branch_pool = ConvNorm(inputs, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat(
            [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_pooled(x))], 1
        )


class MixedB(nn.Module):
    """Halves the size."""

    def __init__(self, inputs: int, w: int) -> None:
        super().__init__()
        self.branch3x3 = ConvNorm(inputs, 24 * w, 3, stride=2)
        self.branch3x3dbl_1 = ConvNorm(inputs, 4 * w, 1)
        self.branch3x3dbl_2 = ConvNorm(4 * w, 6 * w, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(6 * w, 6 * w, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class MixedC(nn.Module):
    """Branches of 1×7 and 7×1 convolutions; `c` channels inside them."""

    def __init__(self, inputs: int, c: int, w: int) -> None:
        super().__init__()
        outputs, row, column = 12 * w, (0, 3), (3, 0)
        self.branch1x1 = ConvNorm(inputs, outputs, 1)
        self.branch7x7_1 = ConvNorm(inputs, c, 1)
        self.branch7x7_2 = ConvNorm(c, c, (1, 7), padding=row)
        self.branch7x7_3 = ConvNorm(c, outputs, (7, 1), padding=column)
        self.branch7x7dbl_1 = ConvNorm(inputs, c, 1)
        self.branch7x7dbl_2 = ConvNorm(c, c, (7, 1), padding=column)
        self.branch7x7dbl_3 = ConvNorm(c, c, (1, 7), padding=row)
        self.branch7x7dbl_4 = ConvNorm(c, c, (7, 1), padding=column)
        self.branch7x7dbl_5 = ConvNorm(c, outputs, (1, 7), padding=row)
        self.branch_pool = ConvNorm(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_pooled(x))], 1)


class MixedD(nn.Module):
    """Halves the size again."""

    def __init__(self, inputs: int, w: int) -> None:
        super().__init__()
        self.branch3x3_1 = ConvNorm(inputs, 12 * w, 1)
        self.branch3x3_2 = ConvNorm(12 * w, 20 * w, 3, stride=2)
        self.branch7x7x3_1 = ConvNorm(inputs, 12 * w, 1)
        self.branch7x7x3_2 = ConvNorm(12 * w, 12 * w, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvNorm(12 * w, 12 * w, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvNorm(12 * w, 12 * w, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        long = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), long, F.max_pool2d(x, 3, stride=2)], 1)


class MixedE(nn.Module):
    """Branches that end in 1×3 and 3×1 convolutions side by side."""

    def __init__(self, inputs: int, w: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(inputs, 20 * w, 1)
        self.branch3x3_1 = ConvNorm(inputs, 24 * w, 1)
        self.branch3x3_2a = ConvNorm(24 * w, 24 * w, (1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvNorm(24 * w, 24 * w, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvNorm(inputs, 28 * w, 1)
        self.branch3x3dbl_2 = ConvNorm(28 * w, 24 * w, 3, padding=1)
        self.branch3x3dbl_3a = ConvNorm(24 * w, 24 * w, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvNorm(24 * w, 24 * w, (3, 1), padding=(1, 0))
        self.branch_pool = ConvNorm(inputs, 12 * w, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        wide = [self.branch3x3_2a(single), self.branch3x3_2b(single)]
        deep = [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *wide, *deep, self.branch_pool(_pooled(x))], 1)


class InceptionV3(nn.Module):
    """Pictures to features: (N, 3, 299, 299) RGB in 0 to 1, to (N, 128 · `w`).

    The published network is trained on pixels in -1 to 1, and torchvision's brings pixels that were normalised for
    ImageNet there. ConsisID's evaluation hands it pixels in 0 to 1; the same conversion is applied to them here.

    Args:
        w: sixteenth of the channels' common divisor; 16 in the published weights.
    """

    def __init__(self, w: int = FULL) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 2 * w, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(2 * w, 2 * w, 3)
        self.Conv2d_2b_3x3 = ConvNorm(2 * w, 4 * w, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(4 * w, 5 * w, 1)
        self.Conv2d_4a_3x3 = ConvNorm(5 * w, 12 * w, 3)
        self.Mixed_5b = MixedA(12 * w, 2 * w, w)
        self.Mixed_5c = MixedA(16 * w, 4 * w, w)
        self.Mixed_5d = MixedA(18 * w, 4 * w, w)
        self.Mixed_6a = MixedB(18 * w, w)
        self.Mixed_6b = MixedC(48 * w, 8 * w, w)
        self.Mixed_6c = MixedC(48 * w, 10 * w, w)
        self.Mixed_6d = MixedC(48 * w, 10 * w, w)
        self.Mixed_6e = MixedC(48 * w, 12 * w, w)
        self.Mixed_7a = MixedD(48 * w, w)
        self.Mixed_7b = MixedE(80 * w, w)
        self.Mixed_7c = MixedE(128 * w, w)

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x = x * (std / 0.5) + (mean - 0.5) / 0.5
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return cast(Tensor, x.mean(dim=(2, 3)))


def load(path: Path) -> InceptionV3:
    """The network with a checkpoint's weights, its width read from them. Raises weights.WeightsError."""
    state = weights.read(path)
    w = weights.require(state, "Conv2d_1a_3x3.conv.weight", path).shape[0] // 2
    return weights.fill(lambda: InceptionV3(w), state, path, spare=("AuxLogits.", "fc."))
