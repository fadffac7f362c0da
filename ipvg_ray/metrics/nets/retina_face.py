"""RetinaFace on ResNet-50, under the key names of `retinaface_resnet50_2020-07-20-f168fae3c.zip`, and its decoding.

Deng et al., arXiv 1905.00641; layout and constants of github.com/ternaus/retinaface.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipvg_ray.metrics.nets import weights
from ipvg_ray.metrics.pixels import normalise, to_tensor

_STEPS, _SIZES, _VARIANCES = (8, 16, 32), ((16, 32), (64, 128), (256, 512)), (0.1, 0.2)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FULL = 64


class Bottleneck(nn.Module):
    """ResNet's block of 1×1, 3×3 and 1×1 convolutions."""

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, 4 * inner, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * inner)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != 4 * inner:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 4 * inner, 1, stride, bias=False), nn.BatchNorm2d(4 * inner)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class Body(nn.Module):
    """ResNet-50 to its features at an eighth, a sixteenth and a thirty-second of the size."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, w, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(w)
        inputs = w
        for stage, count in enumerate((3, 4, 6, 3)):
            inner = w << stage
            blocks = [Bottleneck(inputs, inner, 1 if stage == 0 else 2)]
            blocks += [Bottleneck(4 * inner, inner, 1) for _ in range(count - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            inputs = 4 * inner

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        found = []
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
            found.append(x)
        return found[1:]


def _conv_norm(inputs: int, outputs: int, kernel: int = 3, leak: float | None = None) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([] if leak is None else [nn.LeakyReLU(leak)]))


class Fpn(nn.Module):
    """Brings the three sizes to one width and adds the coarse ones to the fine ones."""

    def __init__(self, inputs: list[int], width: int) -> None:
        super().__init__()
        leak = 0.1 if width <= 64 else 0.0
        for number, channels in enumerate(inputs, 1):
            self.add_module(f"output{number}", _conv_norm(channels, width, 1, leak))
        self.merge1, self.merge2 = _conv_norm(width, width, leak=leak), _conv_norm(width, width, leak=leak)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        one, two, three = (getattr(self, f"output{number}")(x) for number, x in enumerate(maps, 1))
        two = self.merge2(two + F.interpolate(three, two.shape[2:]))
        one = self.merge1(one + F.interpolate(two, one.shape[2:]))
        return [one, two, three]


class Ssh(nn.Module):
    """Looks at 3×3, 5×5 and 7×7 surroundings."""

    def __init__(self, width: int) -> None:
        super().__init__()
        leak, quarter = 0.1 if width <= 64 else 0.0, width // 4
        self.conv3X3 = _conv_norm(width, width // 2)
        self.conv5X5_1 = _conv_norm(width, quarter, leak=leak)
        self.conv5X5_2 = _conv_norm(quarter, quarter)
        self.conv7X7_2 = _conv_norm(quarter, quarter, leak=leak)
        self.conv7x7_3 = _conv_norm(quarter, quarter)

    def forward(self, x: Tensor) -> Tensor:
        five = self.conv5X5_1(x)
        return F.relu(torch.cat([self.conv3X3(x), self.conv5X5_2(five), self.conv7x7_3(self.conv7X7_2(five))], 1))


class Head(nn.Module):
    """A 1×1 convolution to `values` numbers for each of two anchors a place."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.values = values
        self.conv1x1 = nn.Conv2d(width, 2 * values, 1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv1x1(x).permute(0, 2, 3, 1).reshape(len(x), -1, self.values))


class RetinaFace(nn.Module):
    """(N, 3, S, S) normalised for ImageNet to (N, A, 4) box offsets and (N, A, 2) logits of no face and face.

    Args:
        w: channels of the first convolution, `width` of the pyramid; 64 and 256 in the published weights.
    """

    def __init__(self, w: int = _FULL, width: int = 256) -> None:
        super().__init__()
        self.body = Body(w)
        self.fpn = Fpn([8 * w, 16 * w, 32 * w], width)
        self.ssh1, self.ssh2, self.ssh3 = Ssh(width), Ssh(width), Ssh(width)
        self.ClassHead = nn.ModuleList(Head(width, 2) for _ in _STEPS)
        self.BboxHead = nn.ModuleList(Head(width, 4) for _ in _STEPS)
        self.LandmarkHead = nn.ModuleList(Head(width, 10) for _ in _STEPS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = [ssh(y) for ssh, y in zip((self.ssh1, self.ssh2, self.ssh3), self.fpn(self.body(x)), strict=True)]
        boxes, logits = (
            torch.cat([head(y) for head, y in zip(heads, maps, strict=True)], 1)
            for heads in (self.BboxHead, self.ClassHead)
        )
        return boxes, logits


class FaceBoxes:
    """Boxes of the faces of a picture, as ternaus' `predict_jsons` gives them: whole numbers x0, y0, x1, y1.

    Args:
        side: the picture's longer side is brought to it, and zeros fill the rest of the square.
        threshold: confidence above which an anchor is a face; nms: overlap above which the weaker box goes.
    """

    def __init__(self, net: RetinaFace, side: int = 2048, threshold: float = 0.7, nms: float = 0.4) -> None:
        self.net, self.side, self.threshold, self.nms = net, side, threshold, nms
        self._anchors = anchors(side)

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray) -> list[list[tuple[int, int, int, int]]]:
        """Faces of each picture of a uint8 RGB (N, H, W, 3), surest first."""
        device = next(self.net.parameters()).device
        own_height, own_width = pictures.shape[1:3]
        scale = max(own_height, own_width) / self.side
        height, width = round(own_height / scale), round(own_width / scale)
        if scale != 1:
            sized = [cv2.resize(rgb, (width, height), interpolation=cv2.INTER_LINEAR) for rgb in pictures]
            pictures = np.stack(sized)
        top, left = (self.side - height) // 2, (self.side - width) // 2
        pads = (left, self.side - width - left, top, self.side - height - top)
        offsets, logits = self.net(F.pad(normalise(to_tensor(pictures, device) / 255, _MEAN, _STD), pads))
        shift = np.array([left, top, left, top])
        found = [((boxes - shift) * scale).astype(int) for boxes in map(self._boxes, offsets, logits)]
        return [[box for box in map(tuple, boxes.tolist()) if _inside(box, own_width, own_height)] for boxes in found]

    def _boxes(self, offsets: Tensor, logits: Tensor) -> np.ndarray:
        """One picture's boxes in pixels of the square, whole numbers (n, 4), from its offsets (A, 4), logits (A, 2)."""
        sure = logits.softmax(-1)[:, 1]
        chosen = (sure > self.threshold).nonzero()[:, 0]
        boxes = decoded(offsets[chosen], self._anchors.to(offsets.device)[chosen]) * self.side
        whole: np.ndarray = boxes[suppressed(boxes, sure[chosen], self.nms)].int().cpu().numpy()
        return whole


def _inside(box: tuple[int, ...], width: int, height: int) -> bool:
    """Whether anything of the box is left after cutting it to the picture."""
    x0, y0 = min(max(box[0], 0), width - 1), min(max(box[1], 0), height - 1)
    return x0 < min(max(box[2], x0 + 1), width - 1) and y0 < min(max(box[3], y0 + 1), height - 1)


def anchors(side: int) -> Tensor:
    """Centre x, y, width and height of every anchor, shares of the square, in the heads' order."""
    found = []
    for step, sizes in zip(_STEPS, _SIZES, strict=True):
        middles = (torch.arange(-(-side // step)) + 0.5) * step / side
        y, x = torch.meshgrid(middles, middles, indexing="ij")
        places = torch.stack([x, y], -1).reshape(-1, 1, 2).repeat(1, len(sizes), 1)
        extents = torch.tensor(sizes).float().div(side).view(1, -1, 1).expand(len(places), -1, 2)
        found.append(torch.cat([places, extents], -1).reshape(-1, 4))
    return torch.cat(found)


def decoded(offsets: Tensor, priors: Tensor) -> Tensor:
    """Corner boxes from offsets to anchors."""
    centres = priors[:, :2] + offsets[:, :2] * _VARIANCES[0] * priors[:, 2:]
    extents = priors[:, 2:] * torch.exp(offsets[:, 2:] * _VARIANCES[1])
    return torch.cat([centres - extents / 2, centres + extents / 2], 1)


def suppressed(boxes: Tensor, scores: Tensor, most: float) -> list[int]:
    """Indices of the boxes left, surest first, after those that overlap a surer one by more than `most` have gone."""
    order = scores.argsort(descending=True).tolist()
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    kept: list[int] = []
    for index in order:
        if kept:
            least = torch.maximum(boxes[kept, :2], boxes[index, :2])
            common = (torch.minimum(boxes[kept, 2:], boxes[index, 2:]) - least).clamp(min=0).prod(1)
            if bool((common / (areas[kept] + areas[index] - common) > most).any()):
                continue
        kept.append(index)
    return kept


def load(path: Path) -> RetinaFace:
    """The network with a checkpoint's weights, its sizes read from them. Raises weights.WeightsError."""
    state = weights.read(path)
    w = weights.require(state, "body.conv1.weight", path).shape[0]
    width = weights.require(state, "fpn.merge1.0.weight", path).shape[0]
    return weights.fill(lambda: RetinaFace(w, width), state, path)
