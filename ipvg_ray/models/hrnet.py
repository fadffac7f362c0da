"""HRNetV2 for segmentation, with the key names of HRNet-Semantic-Segmentation; `hrnet_load` reads its checkpoints.

Sun et al., "High-Resolution Representations for Labeling Pixels and Regions" (arXiv 1904.04514); architecture and
names as in `seg_hrnet.py` and `seg_hrnet_ocr.py` of github.com/HRNet/HRNet-Semantic-Segmentation (MIT). Several
branches of decreasing resolution run side by side and exchange what they know ("fuse") after each group of blocks;
coarse branches are brought to the fine ones by bilinear interpolation. timm's HRNet has the same body with
nearest-neighbour interpolation, which gives other numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STEM = 64


@dataclass(frozen=True)
class HRNetConfig:
    """What distinguishes the networks of the family.

    Attributes:
        stem_width, stem_blocks: channels and number of the bottleneck blocks before the branches part.
        modules: exchange modules in stages 2, 3 and 4, which have 2, 3 and 4 branches.
        blocks: residual blocks per branch and module.
        width: channels of the finest branch; each coarser one has twice as many.
        classes: of the head.
        head: `plain`, two 1x1 convolutions; `ocr`, object-contextual representations (arXiv 1909.11065).
        ocr_width, ocr_keys: channels of the OCR head and of its attention; the plain head reads neither.
        align_corners: of every interpolation. What a checkpoint was trained with is told by `hrnet_load`.
    """

    stem_width: int = 64
    stem_blocks: int = 4
    modules: tuple[int, int, int] = (1, 4, 3)
    blocks: int = 4
    width: int = 48
    classes: int = 20
    head: Literal["plain", "ocr"] = "plain"
    ocr_width: int = 512
    ocr_keys: int = 256
    align_corners: bool = False

    def widths(self, branches: int) -> list[int]:
        """Channels of the first `branches` branches."""
        return [self.width << i for i in range(branches)]


class HRNetBody(nn.Module):
    """The stem, the branches and their exchanges, as every HRNet has them.

    Args:
        config: its head and classes are not read.
    """

    def __init__(self, config: HRNetConfig) -> None:
        super().__init__()
        align = config.align_corners
        self.conv1 = _conv(3, _STEM, stride=2)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.conv2 = _conv(_STEM, _STEM, stride=2)
        self.bn2 = nn.BatchNorm2d(_STEM)
        stem = config.stem_width * Bottleneck.expansion
        self.layer1 = nn.Sequential(
            *(Bottleneck(_STEM if i == 0 else stem, config.stem_width) for i in range(config.stem_blocks))
        )
        w2, w3, w4 = (config.widths(n) for n in (2, 3, 4))
        m2, m3, m4 = config.modules
        self.transition1 = _transition([stem], w2)
        self.stage2 = nn.Sequential(*(ExchangeModule(w2, config.blocks, align) for _ in range(m2)))
        self.transition2 = _transition(w2, w3)
        self.stage3 = nn.Sequential(*(ExchangeModule(w3, config.blocks, align) for _ in range(m3)))
        self.transition3 = _transition(w3, w4)
        self.stage4 = nn.Sequential(*(ExchangeModule(w4, config.blocks, align) for _ in range(m4)))

    def branches(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pictures (B, 3, H, W) to the stem's first map at 1/2 of their size and the branches at 1/4, 1/8, 1/16, 1/32.

        Sizes are rounded up; channels are 64 and the branches' widths.
        """
        first = F.relu(self.bn1(self.conv1(x)))
        branches = [self.layer1(F.relu(self.bn2(self.conv2(first))))]
        for transition, stage in (
            (self.transition1, self.stage2),
            (self.transition2, self.stage3),
            (self.transition3, self.stage4),
        ):
            # A new branch starts from the coarsest one so far, at half its resolution.
            last = len(branches) - 1
            branches = stage([step(branches[min(i, last)]) for i, step in enumerate(transition)])
        return first, branches


class HRNet(HRNetBody):
    """Pictures to class logits at a quarter of their size.

    Attributes:
        config: what it was built from.
    """

    def __init__(self, config: HRNetConfig) -> None:
        super().__init__(config)
        self.config = config
        total = sum(config.widths(4))
        if config.head == "plain":
            self.last_layer = _classifier(total, config.classes)
        else:
            self.aux_head = _classifier(total, config.classes)
            self.conv3x3_ocr = nn.Sequential(
                nn.Conv2d(total, config.ocr_width, 3, padding=1), nn.BatchNorm2d(config.ocr_width), nn.ReLU()
            )
            self.ocr_distri_head = ObjectContext(config.ocr_width, config.ocr_keys)
            self.cls_head = nn.Conv2d(config.ocr_width, config.classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits.

        Args:
            x: RGB normalised with ImageNet's mean and deviation, (B, 3, H, W).

        Returns:
            (B, classes, ceil(H / 4), ceil(W / 4)).
        """
        features = self.features(x)
        logits: Tensor
        if self.config.head == "plain":
            logits = self.last_layer(features)
        else:
            rough, pixels = self.aux_head(features), self.conv3x3_ocr(features)
            logits = self.cls_head(self.ocr_distri_head(pixels, _regions(pixels, rough)))
        return logits

    def features(self, x: Tensor) -> Tensor:
        """All branches at the finest one's resolution, (B, sum of widths, ceil(H / 4), ceil(W / 4))."""
        _, branches = self.branches(x)
        size = branches[0].shape[-2:]
        return torch.cat([_resize(branch, size, self.config.align_corners) for branch in branches], dim=1)


class ObjectContext(nn.Module):
    """The OCR head's middle: each pixel attends to the classes' regions and is joined with what it finds there."""

    def __init__(self, width: int, keys: int) -> None:
        super().__init__()
        self.object_context_block = RegionAttention(width, keys)
        # The third layer drops channels while training; it has no weights and does nothing here.
        self.conv_bn_dropout = nn.Sequential(nn.Conv2d(2 * width, width, 1, bias=False), _bn_relu(width))

    def forward(self, pixels: Tensor, regions: Tensor) -> Tensor:
        """(B, C, H, W) and (B, C, K, 1), K regions, to (B, C, H, W)."""
        joined: Tensor = self.conv_bn_dropout(torch.cat([self.object_context_block(pixels, regions), pixels], dim=1))
        return joined


class RegionAttention(nn.Module):
    """Attention of the pixels, as queries, over the regions."""

    def __init__(self, width: int, keys: int) -> None:
        super().__init__()
        self.f_pixel = nn.Sequential(*_pointwise(width, keys), *_pointwise(keys, keys))
        self.f_object = nn.Sequential(*_pointwise(width, keys), *_pointwise(keys, keys))
        self.f_down = nn.Sequential(*_pointwise(width, keys))
        self.f_up = nn.Sequential(*_pointwise(keys, width))

    def forward(self, pixels: Tensor, regions: Tensor) -> Tensor:
        """(B, C, H, W) and (B, C, K, 1), K regions, to (B, C, H, W)."""
        query = self.f_pixel(pixels).flatten(2).transpose(1, 2)
        key = self.f_object(regions).flatten(2)
        value = self.f_down(regions).flatten(2).transpose(1, 2)
        weights = (torch.matmul(query, key) * key.shape[1] ** -0.5).softmax(dim=-1)
        found = torch.matmul(weights, value).transpose(1, 2)
        context: Tensor = self.f_up(found.unflatten(2, pixels.shape[-2:]))
        return context


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection, (B, C, H, W) to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a residual connection, (B, C_in, H, W) to (B, 4 · width, H, W)."""

    expansion = 4

    def __init__(self, channels_in: int, width: int) -> None:
        super().__init__()
        channels_out = width * self.expansion
        self.conv1 = _conv(channels_in, width, kernel=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, channels_out, kernel=1)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.downsample = None
        if channels_in != channels_out:
            self.downsample = nn.Sequential(_conv(channels_in, channels_out, kernel=1), nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn3(self.conv3(y)) + shortcut)


class ExchangeModule(nn.Module):
    """Residual blocks on each branch, then each branch becomes the sum of all, brought to its width and resolution.

    Takes and gives a list of (B, C_i, H_i, W_i), finest first.
    """

    def __init__(self, widths: Sequence[int], blocks: int, align_corners: bool) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(w) for _ in range(blocks))) for w in widths)
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(_fuse_layer(widths, source=j, target=i) for j in range(len(widths)))
            for i in range(len(widths))
        )

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        ys = [branch(x) for branch, x in zip(self.branches, xs, strict=True)]
        return [self._fused(ys, target) for target in range(len(ys))]

    def _fused(self, ys: Sequence[Tensor], target: int) -> Tensor:
        layers = cast(nn.ModuleList, self.fuse_layers[target])
        size = ys[target].shape[-2:]
        parts = [_resize(layer(y), size, self.align_corners) for layer, y in zip(layers, ys, strict=True)]
        return F.relu(functools.reduce(torch.add, parts))


def _conv(channels_in: int, channels_out: int, *, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel, stride=stride, padding=kernel // 2, bias=False)


def _conv_bn(channels_in: int, channels_out: int, *, stride: int = 1, relu: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [_conv(channels_in, channels_out, stride=stride), nn.BatchNorm2d(channels_out)]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


def _transition(before: Sequence[int], after: Sequence[int]) -> nn.ModuleList:
    """One more branch than before, the others changed in width where needed; one that stays as it is has no keys."""
    kept = [nn.Identity() if b == a else _conv_bn(b, a) for b, a in zip(before, after, strict=False)]
    new = nn.Sequential(_conv_bn(before[-1], after[-1], stride=2))
    return nn.ModuleList([*kept, new])


def _fuse_layer(widths: Sequence[int], *, source: int, target: int) -> nn.Module:
    """Brings one branch to another's width and, where that is coarser, to its resolution by strides of 2."""
    if source == target:
        return nn.Identity()
    if source > target:
        return nn.Sequential(_conv(widths[source], widths[target], kernel=1), nn.BatchNorm2d(widths[target]))
    steps = [_conv_bn(widths[source], widths[source], stride=2) for _ in range(target - source - 1)]
    return nn.Sequential(*steps, _conv_bn(widths[source], widths[target], stride=2, relu=False))


def _classifier(channels: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, classes, 1)
    )


def _bn_relu(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


def _pointwise(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 1, bias=False), _bn_relu(channels_out)]


def _regions(pixels: Tensor, logits: Tensor) -> Tensor:
    """The mean pixel of each class, weighted by a softmax of its logits over the picture: (B, C, K, 1)."""
    shares = logits.flatten(2).softmax(dim=2)
    return torch.matmul(pixels.flatten(2), shares.transpose(1, 2)).unsqueeze(3)


def _resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    if x.shape[-2:] == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)


CONFIGS: dict[str, HRNetConfig] = {
    "w48": HRNetConfig(),
    "w48_ocr": HRNetConfig(head="ocr", align_corners=True),
    "w18": HRNetConfig(width=18),
    "w18_small": HRNetConfig(stem_width=32, stem_blocks=1, modules=(1, 1, 1), blocks=2, width=16),
    "w18_small_v2": HRNetConfig(stem_blocks=2, modules=(1, 3, 2), blocks=2, width=18),
    "mini": HRNetConfig(stem_width=8, stem_blocks=1, modules=(1, 1, 1), blocks=1, width=8),
}
"""Named after the original's configurations (`w18_small_v2` is `hr18s` in MMSegmentation); `mini` is ours."""
