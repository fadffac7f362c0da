"""RAFT (Teed & Deng, arXiv 2003.12039), the large variant, under the key names of `raft-things.pth`.

torchvision's `raft_large` holds the same network under other names; its files are read too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipvg_ray.metrics.nets import weights
from ipvg_ray.metrics.nets.sampling import CorrelationPyramid, pixel_grid

_LEVELS, _RADIUS = 4, 4
FULL = 64


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions; `norm3` is the shortcut's norm, which the published weights hold under two names."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norm1, self.norm2 = norm(outputs), norm(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1:
            self.norm3 = norm(outputs)
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), self.norm3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        return F.relu((x if self.downsample is None else self.downsample(x)) + y)


class Encoder(nn.Module):
    """(N, 3, H, W) to (N, `outputs`, H/8, W/8)."""

    def __init__(self, w: int, outputs: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, w, 7, 2, 3)
        self.norm1 = norm(w)
        wide, wider = w * 3 // 2, 2 * w
        self.layer1 = nn.Sequential(ResidualBlock(w, w, 1, norm), ResidualBlock(w, w, 1, norm))
        self.layer2 = nn.Sequential(ResidualBlock(w, wide, 2, norm), ResidualBlock(wide, wide, 1, norm))
        self.layer3 = nn.Sequential(ResidualBlock(wide, wider, 2, norm), ResidualBlock(wider, wider, 1, norm))
        self.conv2 = nn.Conv2d(wider, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return cast(Tensor, self.conv2(self.layer3(self.layer2(self.layer1(x)))))


class MotionEncoder(nn.Module):
    """Correlations and flow to 2 · `w` channels, the flow itself among them."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.convc1 = nn.Conv2d(_LEVELS * (2 * _RADIUS + 1) ** 2, 4 * w, 1)
        self.convc2 = nn.Conv2d(4 * w, 3 * w, 3, padding=1)
        self.convf1 = nn.Conv2d(2, 2 * w, 7, padding=3)
        self.convf2 = nn.Conv2d(2 * w, w, 3, padding=1)
        self.conv = nn.Conv2d(4 * w, 2 * w - 2, 3, padding=1)

    def forward(self, flow: Tensor, correlation: Tensor) -> Tensor:
        seen = F.relu(self.convc2(F.relu(self.convc1(correlation))))
        moved = F.relu(self.convf2(F.relu(self.convf1(flow))))
        return torch.cat([F.relu(self.conv(torch.cat([seen, moved], 1))), flow], 1)


class SepConvGru(nn.Module):
    """A gated recurrent unit of 1×5 and then of 5×1 convolutions."""

    def __init__(self, hidden: int, inputs: int) -> None:
        super().__init__()
        for number, (kernel, pad) in enumerate((((1, 5), (0, 2)), ((5, 1), (2, 0))), 1):
            for gate in "zrq":
                self.add_module(f"conv{gate}{number}", nn.Conv2d(hidden + inputs, hidden, kernel, padding=pad))

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        for number in (1, 2):
            z, r, q = (getattr(self, f"conv{gate}{number}") for gate in "zrq")
            hx = torch.cat([h, x], 1)
            update, reset = torch.sigmoid(z(hx)), torch.sigmoid(r(hx))
            h = (1 - update) * h + update * torch.tanh(q(torch.cat([reset * h, x], 1)))
        return h


class FlowHead(nn.Module):
    """Hidden state to a change of the flow, (N, 2, h, w)."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv2(F.relu(self.conv1(x))))


class UpdateBlock(nn.Module):
    """One step of the iteration."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.encoder = MotionEncoder(w)
        self.gru = SepConvGru(2 * w, 4 * w)
        self.flow_head = FlowHead(2 * w, 4 * w)
        self.mask = nn.Sequential(nn.Conv2d(2 * w, 4 * w, 3, padding=1), nn.ReLU(), nn.Conv2d(4 * w, 64 * 9, 1))

    def forward(self, net: Tensor, context: Tensor, correlation: Tensor, flow: Tensor) -> Tensor:
        return cast(Tensor, self.gru(net, torch.cat([context, self.encoder(flow, correlation)], 1)))


class Raft(nn.Module):
    """Optical flow from one picture to the next.

    Args:
        w: channels of the first convolution; 64 in the published weights, which fixes all others.
    """

    def __init__(self, w: int = FULL) -> None:
        super().__init__()
        self.hidden = 2 * w
        self.fnet = Encoder(w, 4 * w, nn.InstanceNorm2d)
        self.cnet = Encoder(w, 4 * w, nn.BatchNorm2d)
        self.update_block = UpdateBlock(w)

    def forward(self, first: Tensor, second: Tensor, iterations: int = 20) -> Tensor:
        """Flow in pixels, (N, 2, H, W), x before y.

        Args:
            first, second: RGB, 0 to 255, (N, 3, H, W), H and W multiples of 8.
        """
        first, second = (2 * (picture / 255.0) - 1.0 for picture in (first, second))
        features = self.fnet(torch.cat([first, second]))
        correlations = CorrelationPyramid(*features.chunk(2), levels=_LEVELS, radius=_RADIUS)
        net, context = self.cnet(first).split([self.hidden, self.hidden], dim=1)
        net, context = torch.tanh(net), torch.relu(context)
        start = pixel_grid(net)
        target = start
        for _ in range(iterations):
            net = self.update_block(net, context, correlations(target), target - start)
            target = target + self.update_block.flow_head(net)
        return _upsampled(target - start, 0.25 * self.update_block.mask(net))


def _upsampled(flow: Tensor, mask: Tensor) -> Tensor:
    """Eight times the size: each fine value is a convex combination of the 3×3 coarse ones around it."""
    n, _, h, w = flow.shape
    shares = mask.view(n, 1, 9, 8, 8, h, w).softmax(dim=2)
    around = F.unfold(8 * flow, 3, padding=1).view(n, 2, 9, 1, 1, h, w)
    return (shares * around).sum(dim=2).permute(0, 1, 4, 2, 5, 3).reshape(n, 2, 8 * h, 8 * w)


_TORCHVISION = (
    (r"^feature_encoder\.", "fnet."),
    (r"^context_encoder\.", "cnet."),
    (r"^((?:f|c)net)\.convnormrelu\.0\.", r"\1.conv1."),
    (r"^((?:f|c)net)\.convnormrelu\.1\.", r"\1.norm1."),
    (r"^((?:f|c)net)\.conv\.", r"\1.conv2."),
    (r"\.convnormrelu([12])\.0\.", r".conv\1."),
    (r"\.convnormrelu([12])\.1\.", r".norm\1."),
    (r"\.motion_encoder\.convcorr([12])\.0\.", r".encoder.convc\1."),
    (r"\.motion_encoder\.convflow([12])\.0\.", r".encoder.convf\1."),
    (r"\.motion_encoder\.conv\.0\.", ".encoder.conv."),
    (r"\.recurrent_block\.convgru([12])\.conv([zrq])\.", r".gru.conv\2\1."),
    (r"^mask_predictor\.convrelu\.0\.", "update_block.mask.0."),
    (r"^mask_predictor\.conv\.", "update_block.mask.2."),
)


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of torchvision's `raft_large` under the original names."""
    result = {}
    for key, value in state.items():
        for pattern, name in _TORCHVISION:
            key = re.sub(pattern, name, key)
        result[key] = value
        if ".downsample.1." in key:
            result[key.replace(".downsample.1.", ".norm3.")] = value
    return result


def load(path: Path) -> Raft:
    """The network with a checkpoint's weights, original or torchvision's. Raises weights.WeightsError."""
    state = weights.read(path)
    if any(key.startswith("feature_encoder.") for key in state):
        state = from_torchvision(state)
    w = weights.require(state, "fnet.conv1.weight", path).shape[0]
    return weights.fill(lambda: Raft(w), state, path)
