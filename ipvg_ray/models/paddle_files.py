"""PaddlePaddle's `.pdparams` of the matting networks, read and converted without Paddle.

Such a file is a pickle of a dictionary of numpy arrays (`paddle.save`). A pickle can run code, so this one is read with
a list of the few names that arrays are rebuilt from, and nothing else is looked up.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ipvg_ray.errors import UserError

_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),  # how protocol 2 writes bytes
    ("collections", "OrderedDict"),
    ("builtins", "tuple"),  # a parameter with its name
    ("__builtin__", "tuple"),
}
_NAME_TABLE = "StructuredToParameterName@@"  # structured to internal names, which nothing here needs
_TRAINING_ONLY = ("blurer.", "head.lr_branch.conv_lr.", "head.hr_branch.conv_hr.")
_STATISTICS = {"_mean": "running_mean", "_variance": "running_var"}


class PaddleFileError(UserError, ValueError):
    """A file that is no `.pdparams` of a network known here."""


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which arrays of numbers do not need")
        return super().find_class(module, name)


def read(path: Path) -> dict[str, np.ndarray]:
    """Name to array of a `.pdparams` file; nothing in the file is run.

    Raises:
        PaddleFileError: where it cannot be read, or holds anything but arrays of numbers.
    """
    try:
        with path.open("rb") as stream:
            tree = _ArrayUnpickler(stream, encoding="latin1").load()
    except FileNotFoundError:
        raise PaddleFileError(f"there is no file {path}") from None
    except Exception as error:  # a damaged pickle raises almost any kind
        raise PaddleFileError(f"{path} cannot be read as .pdparams; fetch it again: {error}") from error
    if not isinstance(tree, dict):
        raise PaddleFileError(f"{path} holds a {type(tree).__name__}, not a dictionary of arrays")
    arrays = {str(key): _array(value) for key, value in tree.items() if key != _NAME_TABLE}
    if wrong := [key for key, value in arrays.items() if value.dtype.kind not in "fiu"]:
        raise PaddleFileError(f"{path}: {wrong[0]} is no array of numbers")
    return arrays


def state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a PP-Matting or MODNet file under the names of `pp_matting`, float32.

    Raises:
        PaddleFileError: as `read`; or where a name of the body is not HRNet's.
    """
    arrays = read(path)
    kept = {key: value for key, value in arrays.items() if not key.startswith(_TRAINING_ONLY)}
    return {_renamed(key, path): torch.from_numpy(np.array(value, np.float32)) for key, value in kept.items()}


def convert(source: Path, target: Path) -> int:
    """Write a `.pdparams` file's network as `.safetensors`, whole or not at all; returns the number of tensors.

    Raises:
        PaddleFileError: as `state_dict`; or where `target` has another ending.
        PPMattingError: where the file lacks tensors of the network, or holds others.
    """
    from ipvg_ray.models import pp_matting

    if target.suffix != ".safetensors":
        raise PaddleFileError(f"{target} must end in .safetensors")
    state = state_dict(source)
    pp_matting.from_state(state, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    save_file(state, temporary)
    temporary.chmod(0o644)  # safetensors writes for the owner alone; workers may be other users
    temporary.replace(target)
    return len(state)


def _array(value: Any) -> np.ndarray:
    """An entry's array; newer files store (name, array)."""
    return np.asarray(value[1] if isinstance(value, tuple) and len(value) == 2 else value)


def _renamed(key: str, path: Path) -> str:
    layer, _, last = key.rpartition(".")
    last = _STATISTICS.get(last, last)
    if layer.endswith(".inorm") and last == "scale":
        last = "weight"
    if not layer.startswith("backbone."):
        return f"{layer}.{last}"
    place, _, kind = layer.removeprefix("backbone.").rpartition(".")
    name = _body_layer(place, norm=kind == "_batch_norm")
    if name is None:
        raise PaddleFileError(f"{path} is no PP-Matting or MODNet with an HRNet body: it holds {key}")
    return f"backbone.{name}.{last}"


def _body_layer(place: str, norm: bool) -> str | None:
    """Where `hrnet` has a convolution of Paddle's HRNet, or its normalisation; Paddle counts from 1, `hrnet` from 0."""
    kind, position = ("bn", 1) if norm else ("conv", 0)
    if match := re.fullmatch(r"conv_layer1_(\d)", place):
        return f"{kind}{match[1]}"
    if match := re.fullmatch(r"la1\.bb_layer2_(\d+)\.conv(\d|_down)", place):
        inner = f"downsample.{position}" if match[2] == "_down" else f"{kind}{match[2]}"
        return f"layer1.{int(match[1]) - 1}.{inner}"
    if match := re.fullmatch(r"tr(\d)\.transition_tr\d_layer_(\d)", place):
        number, branch = int(match[1]), int(match[2])
        step = ".0" if branch == number + 1 else ""  # a new branch is a sequence of steps down
        return f"transition{number}.{branch - 1}{step}.{position}"
    if match := re.fullmatch(r"st(\d)\.stage_st\d_(\d+)\.(.+)", place):
        inner_name = _module_layer(match[3], kind, position)
        return inner_name and f"stage{match[1]}.{int(match[2]) - 1}.{inner_name}"
    return None


def _module_layer(place: str, kind: str, position: int) -> str | None:
    """The same within an exchange module."""
    if match := re.fullmatch(r"branches_func\.bb_st\d_\d+_branch_layer_(\d+)_(\d+)\.conv(\d)", place):
        return f"branches.{int(match[1]) - 1}.{int(match[2]) - 1}.{kind}{match[3]}"
    if match := re.fullmatch(r"fuse_func\.residual_st\d_\d+_layer_(\d+)_(\d+)(?:_(\d+))?", place):
        path = ".".join(str(int(number) - 1) for number in match.groups() if number)
        return f"fuse_layers.{path}.{position}"
    return None
