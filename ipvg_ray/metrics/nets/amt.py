"""AMT-S (Li et al., arXiv 2304.09790): the frame halfway between two frames, under the key names of `amt-s.pth`.

Written from the paper and the published shapes. The published weights are CC BY-NC 4.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipvg_ray.metrics.nets import weights
from ipvg_ray.metrics.nets.sampling import CorrelationPyramid, pixel_grid

_LEVELS, _RADIUS, _FLOWS, _HALF = 4, 3, 3, 0.5
FULL = 4


def _scaled(x: Tensor, factor: float) -> Tensor:
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def _warped(pictures: Tensor, flow: Tensor) -> Tensor:
    """Pictures read at every pixel's place plus flow; beyond the border, its nearest pixel."""
    places = (pixel_grid(flow) + flow).permute(0, 2, 3, 1)
    height, width = flow.shape[2:]
    span = places.new_tensor([max(width - 1, 1), max(height - 1, 1)])
    return F.grid_sample(pictures, 2 * places / span - 1, padding_mode="border", align_corners=True)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.PReLU(outputs))


class BottleneckBlock(nn.Module):
    """1×1, 3×3, 1×1, each behind an instance norm without weights."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = outputs // 4
        self.conv1 = nn.Conv2d(inputs, inner, 1)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1)
        self.conv3 = nn.Conv2d(inner, outputs, 1)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride)) if stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in (self.conv1, self.conv2, self.conv3):
            y = F.relu(F.instance_norm(layer(y)))
        return F.relu((x if self.downsample is None else F.instance_norm(self.downsample(x))) + y)


class SmallEncoder(nn.Module):
    """Features for the correlations: (N, 3, H, W) to (N, 21 · w, H/8, W/8)."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8 * w, 7, 2, 3)
        self.layer1 = nn.Sequential(BottleneckBlock(8 * w, 8 * w, 1), BottleneckBlock(8 * w, 8 * w, 1))
        self.layer2 = nn.Sequential(BottleneckBlock(8 * w, 16 * w, 2), BottleneckBlock(16 * w, 16 * w, 1))
        self.layer3 = nn.Sequential(BottleneckBlock(16 * w, 24 * w, 2), BottleneckBlock(24 * w, 24 * w, 1))
        self.conv2 = nn.Conv2d(24 * w, 21 * w, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.instance_norm(self.conv1(x)))
        return cast(Tensor, self.conv2(self.layer3(self.layer2(self.layer1(x)))))


class PyramidEncoder(nn.Module):
    """Features at half, quarter, eighth and sixteenth of the size."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        inputs = 3
        for number, outputs in enumerate(channels, 1):
            self.add_module(f"pyramid{number}", nn.Sequential(_conv(inputs, outputs, 2), _conv(outputs, outputs)))
            inputs = outputs

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for stage in self.children():
            x = stage(x)
            found.append(x)
        return found


class ResBlock(nn.Module):
    """A residual block in which the last `side` channels pass further convolutions of their own."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.conv1, self.conv3 = _conv(channels, channels), _conv(channels, channels)
        self.conv2, self.conv4 = _conv(side, side), _conv(side, side)
        self.conv5 = nn.Conv2d(channels, channels, 3, padding=1)
        self.prelu = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(self._aside(self.conv1(x), self.conv2))
        return cast(Tensor, self.prelu(x + self.conv5(self._aside(y, self.conv4))))

    def _aside(self, x: Tensor, layer: nn.Module) -> Tensor:
        return torch.cat([x[:, : -self.side], layer(x[:, -self.side :])], 1)


class Decoder(nn.Module):
    """What all decoders are made of; the output is twice as large."""

    def __init__(self, inputs: int, inner: int, side: int, outputs: int) -> None:
        super().__init__()
        up = nn.ConvTranspose2d(inner, outputs, 4, 2, 1)
        self.convblock = nn.Sequential(_conv(inputs, inner), ResBlock(inner, side), up)

    def forward(self, *parts: Tensor) -> Tensor:
        return cast(Tensor, self.convblock(torch.cat(parts, 1)))


class UpdateBlock(nn.Module):
    """Corrects both flows and the features by the correlations; `factor` is how much larger those are."""

    def __init__(self, features: int, w: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.convc1 = nn.Conv2d(2 * _LEVELS * (2 * _RADIUS + 1) ** 2, 16 * w, 1)
        self.convf1 = nn.Conv2d(4, 10 * w, 7, padding=3)
        self.convf2 = nn.Conv2d(10 * w, 5 * w, 3, padding=1)
        self.conv = nn.Conv2d(21 * w, 17 * w, 3, padding=1)
        self.gru = _two_convs(17 * w + 4 + features, 19 * w, 19 * w)
        self.feat_head = _two_convs(19 * w, 19 * w, features)
        self.flow_head = _two_convs(19 * w, 19 * w, 4)

    def forward(self, features: Tensor, flow: Tensor, correlation: Tensor) -> tuple[Tensor, Tensor]:
        def active(x: Tensor) -> Tensor:
            return F.leaky_relu(x, 0.1)

        if self.factor != 1:
            features = _scaled(features, 1 / self.factor)
        moved = active(self.convf2(active(self.convf1(flow))))
        seen = active(self.conv(torch.cat([active(self.convc1(correlation)), moved], 1)))
        state = self.gru(torch.cat([seen, flow, features], 1))
        features, flow = self.feat_head(state), self.flow_head(state)
        if self.factor != 1:
            features, flow = _scaled(features, self.factor), self.factor * _scaled(flow, self.factor)
        return features, flow


def _two_convs(inputs: int, inner: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, inner, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(inner, outputs, 3, padding=1)
    )


class AmtS(nn.Module):
    """The frame halfway between two: (N, 3, H, W) RGB in 0 to 1, H and W multiples of 16, to the same.

    Args:
        w: quarter of the channels' common divisor; 4 in the published weights.
    """

    def __init__(self, w: int = FULL) -> None:
        super().__init__()
        channels, side = [5 * w, 8 * w, 11 * w, 14 * w], 5 * w
        c1, c2, c3, c4 = channels
        self.feat_encoder = SmallEncoder(w)
        self.encoder = PyramidEncoder(channels)
        self.decoder4 = Decoder(2 * c4 + 1, 2 * c4, side, c3 + 4)
        self.decoder3 = Decoder(3 * c3 + 4, 3 * c3, side, c2 + 4)
        self.decoder2 = Decoder(3 * c2 + 4, 3 * c2, side, c1 + 4)
        self.decoder1 = Decoder(3 * c1 + 4, 3 * c1, side, 8 * _FLOWS)
        self.update4, self.update3, self.update2 = UpdateBlock(c3, w, 1), UpdateBlock(c2, w, 2), UpdateBlock(c1, w, 4)
        self.comb_block = nn.Sequential(
            nn.Conv2d(3 * _FLOWS, 6 * _FLOWS, 3, 1, 1), nn.PReLU(6 * _FLOWS), nn.Conv2d(6 * _FLOWS, 3, 3, 1, 1)
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        mean = torch.cat([first, second], 2).mean((1, 2, 3), keepdim=True)
        first, second = first - mean, second - mean
        correlations = _BothWays(*self.feat_encoder(torch.cat([first, second])).chunk(2))
        levels = [pair.chunk(2) for pair in self.encoder(torch.cat([first, second]))]
        f0, f1 = levels[3]
        time = torch.full_like(f0[:, :1], _HALF)
        out = self.decoder4(f0, f1, time)
        flow, features = self._corrected(self.update4, out[:, :4], out[:, 4:], correlations, 1)
        for decoder, update, (f0, f1), factor in (
            (self.decoder3, self.update3, levels[2], 2),
            (self.decoder2, self.update2, levels[1], 4),
        ):
            out = decoder(features, _warped(f0, flow[:, :2]), _warped(f1, flow[:, 2:]), flow)
            flow = out[:, :4] + 2.0 * _scaled(flow, 2)
            flow, features = self._corrected(update, flow, out[:, 4:], correlations, factor)
        f0, f1 = levels[0]
        out = self.decoder1(features, _warped(f0, flow[:, :2]), _warped(f1, flow[:, 2:]), flow)
        return self._merged(out, 2.0 * _scaled(flow, 2), first, second, mean)

    def _corrected(
        self, update: UpdateBlock, flow: Tensor, features: Tensor, correlations: _BothWays, factor: int
    ) -> tuple[Tensor, Tensor]:
        coarse = flow if factor == 1 else _scaled(flow, 1 / factor) / factor
        change, moved = update(features, coarse, correlations(coarse))
        return flow + moved, features + change

    def _merged(self, out: Tensor, flow: Tensor, first: Tensor, second: Tensor, mean: Tensor) -> Tensor:
        """Blend what several pairs of flows read from both frames."""
        n, _, height, width = out.shape
        shift0, shift1, mask, rest = out.split([2 * _FLOWS, 2 * _FLOWS, _FLOWS, 3 * _FLOWS], 1)
        mask = torch.sigmoid(mask).reshape(-1, 1, height, width)
        warped = []
        for picture, shift, base in ((first, shift0, flow[:, :2]), (second, shift1, flow[:, 2:])):
            flows = (shift + base.repeat(1, _FLOWS, 1, 1)).reshape(-1, 2, height, width)
            warped.append(_warped(picture.repeat_interleave(_FLOWS, 0), flows))
        blend = mask * warped[0] + (1 - mask) * warped[1] + mean.repeat_interleave(_FLOWS, 0)
        blend = (blend + rest.reshape(-1, 3, height, width)).view(n, _FLOWS, 3, height, width)
        return cast(Tensor, (blend.mean(1) + self.comb_block(blend.flatten(1, 2))).clamp(0, 1))


class _BothWays:
    """Correlations from the first frame into the second and back, looked up along flows from the middle."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self._start = pixel_grid(first)
        self._there = CorrelationPyramid(first, second, levels=_LEVELS, radius=_RADIUS)
        self._back = CorrelationPyramid(second, first, levels=_LEVELS, radius=_RADIUS)

    def __call__(self, flow: Tensor) -> Tensor:
        # Motion is taken to be even, so that the flow from the middle to a frame is half the one from frame to frame.
        to_first, to_second = flow[:, :2] / (1 - _HALF), flow[:, 2:] / _HALF
        return torch.cat([self._there(self._start + to_second), self._back(self._start + to_first)], 1)


def load(path: Path) -> AmtS:
    """The network with a checkpoint's weights, its width read from them. Raises weights.WeightsError."""
    state = weights.read(path)
    w = weights.require(state, "feat_encoder.conv1.weight", path).shape[0] // 8
    return weights.fill(lambda: AmtS(w), state, path)
