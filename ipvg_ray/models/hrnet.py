"""HRNetV2 for segmentation, with the key names of HRNet-Semantic-Segmentation, so its checkpoints load as they are.

Sun et al., "High-Resolution Representations for Labeling Pixels and Regions" (arXiv 1904.04514); architecture and
names as in `seg_hrnet.py` of github.com/HRNet/HRNet-Semantic-Segmentation (MIT). Several branches of decreasing
resolution run side by side and exchange what they know ("fuse") after each group of blocks; coarse branches are brought
to the fine ones by bilinear interpolation. timm's HRNet has the same body with nearest-neighbour interpolation, which
gives other numbers.
"""

from __future__ import annotations

import functools
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB, 0 to 1; all checkpoints of this family use them
_STD = (0.229, 0.224, 0.225)
_STEM = 64

PERSON_CLASSES: dict[int, tuple[int, ...]] = {
    2: (1,),  # background and person
    20: tuple(range(1, 20)),  # LIP: hat, hair, face, clothes, limbs: all but background are parts of a person
    21: (15,),  # PASCAL VOC
}
"""Number of a head's classes to those that are a person."""


class HRNetError(ValueError):
    """A file that is no HRNetV2 segmentation checkpoint."""


@dataclass(frozen=True)
class HRNetConfig:
    """What distinguishes the networks of the family.

    Attributes:
        stem_width, stem_blocks: channels and number of the bottleneck blocks before the branches part.
        modules: exchange modules in stages 2, 3 and 4, which have 2, 3 and 4 branches.
        blocks: residual blocks per branch and module.
        width: channels of the finest branch; each coarser one has twice as many.
        classes: of the head.
        align_corners: of every interpolation; False for plain heads (LIP, Cityscapes, PASCAL-Context), True for OCR.
    """

    stem_width: int = 64
    stem_blocks: int = 4
    modules: tuple[int, int, int] = (1, 4, 3)
    blocks: int = 4
    width: int = 48
    classes: int = 20
    align_corners: bool = False

    def widths(self, branches: int) -> list[int]:
        """Channels of the first `branches` branches."""
        return [self.width << i for i in range(branches)]


class HRNet(nn.Module):
    """Pictures to class logits at a quarter of their size.

    Attributes:
        config: what it was built from.
    """

    def __init__(self, config: HRNetConfig) -> None:
        super().__init__()
        self.config = config
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
        total = sum(w4)
        self.last_layer = nn.Sequential(
            nn.Conv2d(total, total, 1), nn.BatchNorm2d(total), nn.ReLU(), nn.Conv2d(total, config.classes, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Class logits.

        Args:
            x: RGB normalised with ImageNet's mean and deviation, (B, 3, H, W).

        Returns:
            (B, classes, ceil(H / 4), ceil(W / 4)).
        """
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        branches = [self.layer1(x)]
        for transition, stage in (
            (self.transition1, self.stage2),
            (self.transition2, self.stage3),
            (self.transition3, self.stage4),
        ):
            # A new branch starts from the coarsest one so far, at half its resolution.
            last = len(branches) - 1
            branches = stage([step(branches[min(i, last)]) for i, step in enumerate(transition)])
        size = branches[0].shape[-2:]
        merged = torch.cat([_resize(branch, size, self.config.align_corners) for branch in branches], dim=1)
        logits: Tensor = self.last_layer(merged)
        return logits


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


def load(path: Path, device: str = "cpu", *, align_corners: bool = False) -> HRNet:
    """Read a checkpoint, in evaluation mode and float32; depth, widths and classes come from its tensors' shapes.

    Args:
        path: `.safetensors`, or a pickle of torch (read with `weights_only`, so nothing in it is run), bare or below
            `state_dict`. The training code's prefixes `module.` and `model.` are taken off, its `loss.` entries left.
        align_corners: see `HRNetConfig`; nothing in a file says it.

    Raises:
        HRNetError: where the file cannot be read, or lacks tensors of the plain HRNetV2; the message names them.
    """
    state = _bare(_read(path))
    config = infer_config(state, path, align_corners)
    with torch.device("meta"):
        model = HRNet(config)
    _check(state, model.state_dict(), path)
    model.to_empty(device="cpu")
    # Checkpoints of PyTorch 0.4 lack the batch counters, which inference does not read.
    model.load_state_dict({**_counters(model), **state}, strict=True)
    return model.float().eval().requires_grad_(False).to(device)


def infer_config(state: Mapping[str, Tensor], path: Path, align_corners: bool = False) -> HRNetConfig:
    """The configuration that a state dict was saved from.

    Raises:
        HRNetError: where the tensors that tell it are missing.
    """
    telling = ("layer1.0.conv1.weight", "stage4.0.branches.0.0.conv1.weight", "last_layer.3.weight")
    if missing := [key for key in telling if key not in state]:
        hint = (
            "; its head is of the OCR kind, use a checkpoint with the plain head" if "cls_head.weight" in state else ""
        )
        raise HRNetError(f"{path} is no plain HRNetV2 segmentation checkpoint: it lacks {', '.join(missing)}{hint}")
    m2, m3, m4 = (_count(state, rf"stage{n}\.(\d+)\.") for n in (2, 3, 4))
    stem, branch, head = (state[key].shape[0] for key in telling)
    return HRNetConfig(
        stem_width=stem,
        stem_blocks=_count(state, r"layer1\.(\d+)\."),
        modules=(m2, m3, m4),
        blocks=_count(state, r"stage4\.0\.branches\.0\.(\d+)\."),
        width=branch,
        classes=head,
        align_corners=align_corners,
    )


@torch.inference_mode()
def person_probability(model: HRNet, rgb: np.ndarray, input_size: int = 473) -> np.ndarray:
    """How likely each pixel is a person's, float32 (H, W), 0 to 1.

    The picture is squeezed into a square as LIP's own evaluation does; the probabilities come back by bilinear
    interpolation.

    Args:
        rgb: uint8 (H, W, 3).
        input_size: edge of the square.

    Raises:
        ValueError: for a head whose number of classes is not in `PERSON_CLASSES`.
    """
    people = PERSON_CLASSES.get(model.config.classes)
    if people is None:
        raise ValueError(
            f"which of {model.config.classes} classes are a person is known for {sorted(PERSON_CLASSES)} only"
        )
    device = next(model.parameters()).device
    x = torch.tensor(rgb, device=device).permute(2, 0, 1)[None].float() / 255
    x = F.interpolate(x, (input_size, input_size), mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (_MEAN, _STD))
    classes = model((x - mean) / std).softmax(dim=1)
    person = classes[:, list(people)].sum(dim=1, keepdim=True).clamp(0, 1)
    full = F.interpolate(person, rgb.shape[:2], mode="bilinear", align_corners=False)
    result: np.ndarray = full[0, 0].cpu().numpy()
    return result


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


def _resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    if x.shape[-2:] == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise HRNetError(f"there is no HRNet checkpoint {path}") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        raise HRNetError(f"{path} cannot be read as a checkpoint; fetch it again: {error}") from error
    tree = tree.get("state_dict", tree) if isinstance(tree, dict) else {}
    return {str(key): value for key, value in tree.items() if isinstance(value, Tensor)}


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {re.sub(r"^(module\.|model\.)+", "", key): value for key, value in state.items()}
    return {key: value for key, value in named.items() if not key.startswith("loss.")}


def _check(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    missing = [key for key in wanted if key not in state and not key.endswith(".num_batches_tracked")]
    surplus = [key for key in state if key not in wanted]
    other = [
        f"{key} {tuple(state[key].shape)} for {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    for keys, fault in ((missing, "lacks"), (other, "has other shapes:"), (surplus, "also holds")):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise HRNetError(
                f"{path} is no plain HRNetV2 segmentation checkpoint: it {fault} {', '.join(keys[:3])}{more}"
            )


def _counters(model: nn.Module) -> dict[str, Tensor]:
    return {k: torch.zeros((), dtype=torch.long) for k in model.state_dict() if k.endswith(".num_batches_tracked")}


def _count(state: Iterable[str], pattern: str) -> int:
    return len({match[1] for key in state if (match := re.match(pattern, key))})


CONFIGS: dict[str, HRNetConfig] = {
    "w48": HRNetConfig(),
    "w18": HRNetConfig(width=18),
    "w18_small": HRNetConfig(stem_width=32, stem_blocks=1, modules=(1, 1, 1), blocks=2, width=16),  # the original's v1
    "mini": HRNetConfig(stem_width=8, stem_blocks=1, modules=(1, 1, 1), blocks=1, width=8),
}
"""Named after the original's configuration files; `mini` is ours, for tests and demonstrations."""
