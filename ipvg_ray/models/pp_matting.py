"""PP-Matting (arXiv 2204.09433) and MODNet (arXiv 2011.11961) on an HRNet body, as PaddleSeg trained them for people.

Both give alpha itself. Architecture and names as in `Matting/ppmatting/models` of github.com/PaddlePaddle/PaddleSeg
(Apache-2.0), except that the body has the names of `hrnet`; `paddle_files` turns the published files into this layout.
Paddle pads convolutions of stride 2 only after the last pixel, where PyTorch's pads on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipvg_ray.errors import UserError
from ipvg_ray.models import hrnet_load
from ipvg_ray.models.hrnet import HRNetBody, HRNetConfig

_STEM = 64


class PPMattingError(UserError, ValueError):
    """A file that is neither a PP-Matting nor a MODNet with an HRNet body."""


class PPMatting(nn.Module):
    """What is person, background or transition, from the coarse branch; alpha of the transition, from the fine ones."""

    def __init__(self, config: HRNetConfig) -> None:
        super().__init__()
        self.backbone = HRNetBody(config)
        _pad_as_paddle(self.backbone)
        widths = config.widths(4)
        self.scb = SemanticContext(widths[3])
        self.hrdb = Details(_STEM + widths[0])

    def forward(self, x: Tensor) -> Tensor:
        """RGB of mean and deviation 0.5, (B, 3, H, W), sides multiples of 32, to alpha (B, 1, H, W)."""
        size = x.shape[-2:]
        first, branches = self.backbone.branches(x)
        context = self.scb(branches[3])
        fine = torch.cat([_to_size(first, size), _to_size(branches[0], size)], dim=1)
        detail = self.hrdb(fine, context).sigmoid()
        kind = context[-1].argmax(dim=1, keepdim=True)  # 0 person, 1 transition, 2 background
        alpha: Tensor = torch.where(kind == 1, detail, (kind == 0).to(detail.dtype))
        return alpha


class ConvNormReLU(nn.Module):
    """Convolution, batch normalisation, ReLU; the size stays."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 3, dilation: int = 1) -> None:
        super().__init__()
        self._conv = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2 * dilation, dilation=dilation)
        self._batch_norm = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self._batch_norm(self._conv(x)))


class SemanticContext(nn.Module):
    """The semantic context branch: from the coarsest map up to three classes at the input's size.

    Takes (B, C, h, w); gives six maps of 256, 128, 64, 64, 64 and 3 channels at 2, 4, 8, 16, 32 and 32 times the size.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inputs = (512 + channels, 512, 256, 128, 128, 64)
        middles = (512, 256, 128, 128, 64, 64)
        outputs = (256, 128, 64, 64, 64, 3)
        self.psp_module = PyramidPooling(channels, 512)
        self.psps = nn.ModuleList(
            nn.Sequential(ConvNormReLU(512, outputs[i]), _Enlarge(2 << i)) for i in range(len(inputs) - 2)
        )
        stages = [
            nn.Sequential(
                ConvNormReLU(inputs[i], middles[i]),
                ConvNormReLU(middles[i], middles[i], dilation=2 if i == 0 else 1),
                ConvNormReLU(middles[i], outputs[i], dilation=2 if i == 0 else 1),
                _Enlarge(2),
            )
            for i in range(len(inputs) - 1)
        ]
        last = nn.Sequential(
            ConvNormReLU(inputs[-1], middles[-1]),
            ConvNormReLU(middles[-1], middles[-1]),
            nn.Conv2d(middles[-1], outputs[-1], 3, padding=1),
        )
        self.scb_stages = nn.ModuleList([*stages, last])

    def forward(self, x: Tensor) -> list[Tensor]:
        pooled = self.psp_module(x)
        beside = [pooled, *(psp(pooled) for psp in self.psps)]
        maps: list[Tensor] = []
        for i, stage in enumerate(self.scb_stages):
            x = stage(torch.cat([beside[i], x], dim=1) if i < len(beside) else x)
            maps.append(x)
        return maps


class PyramidPooling(nn.Module):
    """Means over grids of 1x1, 3x3 and 5x5 cells joined to each pixel, (B, C, H, W) to (B, C_out, H, W)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(cells), ConvNormReLU(channels_in, channels_in, kernel=1))
            for cells in (1, 3, 5)
        )
        self.conv_bn_relu2 = ConvNormReLU(4 * channels_in, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        means = [_to_size(stage(x), x.shape[-2:]) for stage in self.stages]
        joined: Tensor = self.conv_bn_relu2(torch.cat([x, *reversed(means)], dim=1))
        return joined


class Details(nn.Module):
    """The high-resolution detail branch: fine maps (B, C, H, W), gated by the context, to logits (B, 1, H, W)."""

    _WIDTHS = (64, 32, 16, 8)
    _GUIDES = ((0, 256), (2, 64), (4, 64))  # maps of the context, and their channels

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = self._WIDTHS
        self.gf_list = nn.ModuleList(nn.Conv2d(width, 1, 1) for _, width in self._GUIDES)
        self.res_list = nn.ModuleList(
            [Residual(channels, widths[0]), Residual(widths[1], widths[1]), Residual(widths[2], widths[2])]
        )
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairwise(widths))
        self.gates = nn.ModuleList(Gate(width) for width in widths[1:])
        self.detail_conv = nn.Conv2d(widths[-1], 1, 1, bias=False)

    def forward(self, x: Tensor, context: Sequence[Tensor]) -> Tensor:
        for (index, _), guide, residual, conv, gate in zip(
            self._GUIDES, self.gf_list, self.res_list, self.convs, self.gates, strict=True
        ):
            x = conv(residual(x))
            x = gate(x, _to_size(guide(context[index]), x.shape[-2:]))
        logits: Tensor = self.detail_conv(x)
        return logits


class Residual(nn.Module):
    """Two 3x3 convolutions with a shortcut, which is a convolution too where the width changes."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv0 = _ConvNorm(channels_in, channels_out, 3)
        self.conv1 = _ConvNorm(channels_out, channels_out, 3)
        self.short = _ConvNorm(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.short is None else self.short(x)
        return F.relu(shortcut + self.conv1(F.relu(self.conv0(x))))


class Gate(nn.Module):
    """Raises features by up to twice where the guide (B, 1, H, W) and they themselves say so, then mixes them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self._gate_conv = nn.Sequential(
            nn.BatchNorm2d(channels + 1),
            nn.Conv2d(channels + 1, channels + 1, 1),
            nn.ReLU(),
            nn.Conv2d(channels + 1, 1, 1),
            nn.BatchNorm2d(1),
            nn.Sigmoid(),
        )
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        gated: Tensor = self.conv(x * (self._gate_conv(torch.cat([x, guide], dim=1)) + 1))
        return gated


class MODNet(nn.Module):
    """A coarse branch for what is the person, a fine one for its edge, and their fusion."""

    def __init__(self, config: HRNetConfig, width: int = 32) -> None:
        super().__init__()
        self.backbone = HRNetBody(config)
        _pad_as_paddle(self.backbone)
        self.head = MODNetHead([_STEM, *config.widths(4)], width)

    def forward(self, x: Tensor) -> Tensor:
        """RGB of mean and deviation 0.5, (B, 3, H, W), sides multiples of 32, to alpha (B, 1, H, W)."""
        first, branches = self.backbone.branches(x)
        alpha: Tensor = self.head(x, [first, *branches])
        return alpha


class MODNetHead(nn.Module):
    """Pictures and the body's five maps to alpha; without the parts that only training reads."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.lr_branch = nn.ModuleDict(
            {
                "se_block": Excitation(channels[4]),
                "conv_lr16x": _ibn(channels[4], channels[3], 5),
                "conv_lr8x": _ibn(channels[3], channels[2], 5),
            }
        )
        self.hr_branch = nn.ModuleDict(
            {
                "tohr_enc2x": _ibn(channels[0], width, 1),
                "conv_enc2x": _ibn(width + 3, width, 3, stride=2),
                "tohr_enc4x": _ibn(channels[1], width, 1),
                "conv_enc4x": _ibn(2 * width, 2 * width, 3),
                "conv_hr4x": nn.Sequential(
                    _ibn(2 * width + channels[2] + 3, 2 * width, 3),
                    _ibn(2 * width, 2 * width, 3),
                    _ibn(2 * width, width, 3),
                ),
                "conv_hr2x": nn.Sequential(
                    _ibn(2 * width, 2 * width, 3),
                    _ibn(2 * width, width, 3),
                    _ibn(width, width, 3),
                    _ibn(width, width, 3),
                ),
            }
        )
        self.f_branch = nn.ModuleDict(
            {
                "conv_lr4x": _ibn(channels[2], width, 5),
                "conv_f2x": _ibn(2 * width, width, 3),
                "conv_f": nn.Sequential(_ibn(width + 3, width // 2, 3), _Layers(nn.Conv2d(width // 2, 1, 1))),
            }
        )

    def forward(self, x: Tensor, maps: Sequence[Tensor]) -> Tensor:
        low, high, fusion = self.lr_branch, self.hr_branch, self.f_branch
        lr16 = low["conv_lr16x"](_times(low["se_block"](maps[4]), 2))
        lr8 = low["conv_lr8x"](_times(lr16, 2))
        enc2 = high["tohr_enc2x"](maps[0])
        hr4 = high["conv_enc2x"](torch.cat([_times(x, 0.5), enc2], dim=1))
        hr4 = high["conv_enc4x"](torch.cat([hr4, high["tohr_enc4x"](maps[1])], dim=1))
        hr4 = high["conv_hr4x"](torch.cat([hr4, _times(lr8, 2), _times(x, 0.25)], dim=1))
        hr2 = high["conv_hr2x"](torch.cat([_times(hr4, 2), enc2], dim=1))
        lr4 = fusion["conv_lr4x"](_times(lr8, 2))
        f2 = fusion["conv_f2x"](torch.cat([_times(lr4, 2), hr2], dim=1))
        alpha: Tensor = fusion["conv_f"](torch.cat([_times(f2, 2), x], dim=1)).sigmoid()
        return alpha


class Excitation(nn.Module):
    """Squeeze and excitation: each channel weighted by what all channels' means say."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels // 4, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels // 4, channels, 1, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        weights: Tensor = self.conv(x.mean(dim=(2, 3), keepdim=True))
        return weights * x


class HalfNorm(nn.Module):
    """Batch normalisation of the first half of the channels, instance normalisation of the rest."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bnorm = nn.BatchNorm2d(channels // 2)
        self.inorm = nn.InstanceNorm2d(channels - channels // 2, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        half = self.bnorm.num_features
        return torch.cat([self.bnorm(x[:, :half]), self.inorm(x[:, half:])], dim=1)


class _Layers(nn.Module):
    """A sequence below the name `layers`, where the checkpoints have it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


class _ConvNorm(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, kernel: int) -> None:
        super().__init__()
        self._conv = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False)
        self._batch_norm = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self._batch_norm(self._conv(x))
        return result


class _Enlarge(nn.Module):
    def __init__(self, factor: int) -> None:
        super().__init__()
        self._factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return _times(x, self._factor)


def is_matting(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is one of these networks' rather than a segmentation network's."""
    return any(key.startswith(("hrdb.", "head.f_branch.")) for key in state)


def from_state(state: Mapping[str, Tensor], path: Path, device: str = "cpu") -> PPMatting | MODNet:
    """The network whose tensors these are, float32, in evaluation mode; `path` is for the messages.

    Raises:
        PPMattingError: where tensors are missing, surplus or of other shapes.
    """
    network = PPMatting if "hrdb.detail_conv.weight" in state else MODNet
    body = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    try:
        config = hrnet_load.infer_body(body, path)
    except hrnet_load.HRNetError as error:
        raise PPMattingError(f"{path} is no {network.__name__} with an HRNet body: {error}") from None
    with torch.device("meta"):
        model = network(config)
    hrnet_load.check_state(state, model.state_dict(), path, f"{network.__name__} with an HRNet body", PPMattingError)
    return hrnet_load.materialise(model, state, device)


def _pad_as_paddle(body: HRNetBody) -> None:
    """Pad where Paddle's "same" pads for stride 2 and even sizes: after the last pixel alone."""
    for module in body.modules():
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            module.padding = (0, 0)
            module.register_forward_pre_hook(lambda _, inputs: (F.pad(inputs[0], (0, 1, 0, 1)),))


def _ibn(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> _Layers:
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride=stride, padding=kernel // 2)
    return _Layers(conv, HalfNorm(channels_out), nn.ReLU())


def _to_size(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def _times(x: Tensor, factor: float) -> Tensor:
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
