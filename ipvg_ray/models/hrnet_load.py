"""Checkpoints of HRNetV2 segmentation networks, read as they were published; shapes and names say which network it is.

Three layouts are known, told apart by their keys:

- HRNet-Semantic-Segmentation with the plain head (`hrnet_lip_5583_torch04.pth`), keys as in `hrnet`;
- the same with the OCR head (`hrnet_ocr_lip_5648_torch04.pth`);
- FCN-HRNet of MMSegmentation (`fcn_hr48_512x512_40k_voc12aug_….pth`): body in `backbone.`, head in `decode_head.`.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ipvg_ray.models.hrnet import HRNet, HRNetConfig

_MMSEG_HEAD = {
    "convs.0.conv.": "last_layer.0.",
    "convs.0.bn.": "last_layer.1.",
    "conv_seg.": "last_layer.3.",
}
_M = TypeVar("_M", bound=nn.Module)

_COUNTER = ".num_batches_tracked"
_ABN_EPSILON = 1e-5

_PLAIN_ALIGNED = frozenset({150, 171})
"""Classes (ADE20K, COCO-Stuff) whose plain configurations leave `ALIGN_CORNERS` at its default, which is True."""


class HRNetError(ValueError):
    """A file that is no HRNetV2 segmentation checkpoint."""


def load(path: Path, device: str = "cpu", *, align_corners: bool | None = None) -> HRNet:
    """Read a checkpoint, in evaluation mode and float32; the network's kind and size come from its tensors.

    Args:
        path: `.safetensors`, or a pickle of torch (read with `weights_only`, so nothing in it is run), bare or below
            `state_dict`. The training code's prefixes `module.` and `model.` are taken off, its `loss.` entries left.
        align_corners: of every interpolation; None for what the published checkpoint of these classes and this layout
            was trained with.

    Raises:
        HRNetError: where the file cannot be read, or is none of the three layouts; the message names the tensors.
    """
    return from_state(read_state(path), path, device, align_corners=align_corners)


def from_state(
    state: Mapping[str, Tensor], path: Path, device: str = "cpu", *, align_corners: bool | None = None
) -> HRNet:
    """`load` for a state dict that `read_state` has read; `path` is for the messages."""
    state, mmseg = _original_names(state, path)
    config = infer_config(state, path, mmseg=mmseg, align_corners=align_corners)
    with torch.device("meta"):
        model = HRNet(config)
    check_state(state, model.state_dict(), path, "HRNetV2 segmentation checkpoint", HRNetError)
    if not any(key.endswith(_COUNTER) for key in state):
        state = _plain_batch_norm(state, model)
    return materialise(model, state, device)


def infer_config(
    state: Mapping[str, Tensor], path: Path, *, mmseg: bool = False, align_corners: bool | None = None
) -> HRNetConfig:
    """The configuration that a state dict, under the original's names, was saved from.

    Raises:
        HRNetError: where the tensors that tell it are missing.
    """
    ocr = "cls_head.weight" in state
    classes = "cls_head.weight" if ocr else "last_layer.3.weight"
    attention = "ocr_distri_head.object_context_block.f_down.0.weight"
    _require(state, [classes, attention] if ocr else [classes], path)
    body, count = infer_body(state, path), state[classes].shape[0]
    if align_corners is None:
        align_corners = not mmseg and (ocr or count in _PLAIN_ALIGNED)
    config = replace(body, classes=count, align_corners=align_corners)
    if not ocr:
        return config
    keys, width = state[attention].shape[:2]
    return replace(config, head="ocr", ocr_width=width, ocr_keys=keys)


def infer_body(state: Mapping[str, Tensor], path: Path) -> HRNetConfig:
    """The size of the body that a state dict holds; head, classes and `align_corners` stay at their defaults.

    Raises:
        HRNetError: where the tensors that tell it are missing.
    """
    stem, branch = "layer1.0.conv1.weight", "stage4.0.branches.0.0.conv1.weight"
    _require(state, [stem, branch], path)
    m2, m3, m4 = (_count(state, rf"stage{n}\.(\d+)\.") for n in (2, 3, 4))
    return HRNetConfig(
        stem_width=state[stem].shape[0],
        stem_blocks=_count(state, r"layer1\.(\d+)\."),
        modules=(m2, m3, m4),
        blocks=_count(state, r"stage4\.0\.branches\.0\.(\d+)\."),
        width=state[branch].shape[0],
    )


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, without the training code's prefixes and losses.

    Raises:
        HRNetError: where the file cannot be read.
    """
    try:
        tree: object = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except FileNotFoundError:
        raise HRNetError(f"there is no HRNet checkpoint {path}") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        raise HRNetError(f"{path} cannot be read as a checkpoint; fetch it again: {error}") from error
    entries = tree.get("state_dict", tree) if isinstance(tree, dict) else {}
    tensors = {
        re.sub(r"^(module\.|model\.)+", "", str(key)): value
        for key, value in (entries.items() if isinstance(entries, dict) else ())
        if isinstance(value, Tensor)
    }
    return {key: value for key, value in tensors.items() if not key.startswith("loss.")}


def check_state(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path, what: str, error: type[ValueError]
) -> None:
    """Raise `error` where a state dict's names or shapes are not those wanted; batch counters may be missing.

    Args:
        what: the kind of file, for the message, which names up to three of the tensors.
    """
    missing = [key for key in wanted if key not in state and not key.endswith(_COUNTER)]
    surplus = [key for key in state if key not in wanted]
    other = [
        f"{key} {tuple(state[key].shape)} for {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    for keys, fault in ((missing, "lacks"), (other, "has other shapes:"), (surplus, "also holds")):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise error(f"{path} is no {what}: it {fault} {', '.join(keys[:3])}{more}")


def materialise(model: _M, state: Mapping[str, Tensor], device: str) -> _M:
    """A module built on the meta device, with a checked state dict's values: float32, evaluation mode, no gradients."""
    model.to_empty(device="cpu")
    counters = {key: torch.zeros((), dtype=torch.long) for key in model.state_dict() if key.endswith(_COUNTER)}
    model.load_state_dict({**counters, **state}, strict=True)
    return model.float().eval().requires_grad_(False).to(device)


def _original_names(state: Mapping[str, Tensor], path: Path) -> tuple[Mapping[str, Tensor], bool]:
    """MMSegmentation's names turned into the original's, and whether they were MMSegmentation's."""
    if not any(key.startswith("backbone.stage4.") for key in state):
        return state, False
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        part, _, name = key.partition(".")
        if part == "decode_head":
            start = next((s for s in _MMSEG_HEAD if name.startswith(s)), None)
            if start is None:
                raise HRNetError(f"{path} is MMSegmentation's, but its head is not FCN's: it holds {key}")
            renamed[_MMSEG_HEAD[start] + name.removeprefix(start)] = value
        elif part == "backbone":
            renamed[name] = value
        elif part != "auxiliary_head":  # used in training only
            renamed[key] = value
    if "last_layer.0.weight" in renamed:
        # Its first convolution has no bias, since batch normalisation follows.
        renamed.setdefault("last_layer.0.bias", torch.zeros(renamed["last_layer.0.weight"].shape[0]))
    return renamed, True


def _plain_batch_norm(state: Mapping[str, Tensor], model: HRNet) -> dict[str, Tensor]:
    """Weights with which ordinary batch normalisation gives what the original's first release computed.

    Files without batch counters come from its PyTorch 0.4 code, whose in-place normalisation scales by |weight| + eps.
    """
    plain = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            plain[f"{name}.weight"] = state[f"{name}.weight"].abs() + _ABN_EPSILON
    return plain


def _require(state: Mapping[str, Tensor], keys: Iterable[str], path: Path) -> None:
    if missing := [key for key in keys if key not in state]:
        raise HRNetError(f"{path} is no HRNetV2 segmentation checkpoint: it lacks {', '.join(missing)}")


def _count(state: Iterable[str], pattern: str) -> int:
    return len({match[1] for key in state if (match := re.match(pattern, key))})
