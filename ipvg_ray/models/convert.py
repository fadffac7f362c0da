"""Copies of models in the precision in which they are run: half the bytes of float32, and nothing to cast at each load.

A copy is a whole model folder under a name of its own. What a loader keeps in float32 whatever is asked for (norms and
time embedding of Wan) stays so, as do autoencoders, which the stages load in float32; so a stage computes the same from
the copy as from the original. Loaders map the copy's tensors from the file instead of making them anew.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ipvg_ray import files
from ipvg_ray.errors import UserError

_WEIGHTS = "*.safetensors"
_INDEX = ".safetensors.index.json"
_DTYPE_KEYS = ("dtype", "torch_dtype")


class ConvertError(UserError, ValueError):
    """A model that cannot be copied in another precision."""


def convert(source: Path, target: Path, dtype: torch.dtype, report: Callable[[str], object] = print) -> None:
    """Write a copy of a model whose networks are stored in `dtype`, whole or not at all; one file in memory at a time.

    Args:
        source: a folder in diffusers' layout or a transformers model, with safetensors weights.
        target: a new folder.
        dtype: bfloat16 or float16. Tensors that are not floating-point, or shorter already, stay as they are.

    Raises:
        ConvertError: where `source` is no such folder, `target` exists, or the disk has no room.
    """
    kept = {folder: _kept(folder, dtype) for folder in _networks(source)}
    if target.exists():
        raise ConvertError(f"{target} is there already; remove it, or name a new folder")
    made = target.with_name(f".{target.name}.part")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    try:
        _ask_disk(source, made)
        for file in files.files_below(source):
            place = made / file.relative_to(source)
            if any(part.startswith(".") for part in file.relative_to(source).parts):
                continue  # notes of download tools, which do not hold for the copy
            place.parent.mkdir(parents=True, exist_ok=True)
            if file.parent not in kept:
                shutil.copyfile(file, place)
            elif file.match(_WEIGHTS):
                _cast(file, place, dtype, kept[file.parent])
                report(
                    f"{file.relative_to(source)}: {file.stat().st_size / 1e9:.2f} GB, now "
                    f"{place.stat().st_size / 1e9:.2f}"
                )
            elif file.name == "config.json":
                place.write_text(json.dumps(_told(json.loads(file.read_text()), dtype), indent=2) + "\n")
            else:
                shutil.copyfile(file, place)
        for folder in kept:
            _count(made / folder.relative_to(source))
        os.replace(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _networks(source: Path) -> list[Path]:
    """The folders of a model whose weights are cast."""
    configs = [folder / "config.json" for folder in (source, *sorted(p for p in source.glob("*") if p.is_dir()))]
    folders = [config.parent for config in configs if config.is_file() and _class_of(config.parent)]
    if not folders:
        raise ConvertError(
            f"{source} is neither in diffusers' layout nor a transformers model; of a model in its authors' own layout "
            "pull the diffusers conversion"
        )
    found = [folder for folder in folders if not _class_of(folder).startswith("Autoencoder")]
    for folder in found:
        if not any(folder.glob(_WEIGHTS)):
            raise ConvertError(f"{folder} holds no safetensors weights")
        if (files.read_json(folder / "config.json") or {}).get("quantization_config"):
            raise ConvertError(f"{folder} is quantised; its scales must stay as they are")
    return found


def _class_of(folder: Path) -> str:
    """The class that a folder's configuration names; nothing where it names none."""
    config = files.read_json(folder / "config.json") or {}
    return str(config.get("_class_name") or next(iter(config.get("architectures") or []), ""))


def _kept(folder: Path, dtype: torch.dtype) -> set[str]:
    """Parts of names of what the folder's loader keeps in float32, at least; it may cast what is kept too much."""
    import diffusers
    import transformers

    name = _class_of(folder)
    kind: Any = getattr(diffusers, name, None) or getattr(transformers, name, None)
    if kind is None:
        raise ConvertError(f"{folder} holds a {name}, which neither diffusers nor transformers know")
    strict = set(getattr(kind, "_keep_in_fp32_modules_strict", None) or ())
    # transformers takes the others for float16 alone; diffusers has no strict ones, and keeps these always.
    plain = set(getattr(kind, "_keep_in_fp32_modules", None) or ())
    return strict | plain if hasattr(diffusers, name) or dtype is torch.float16 else strict


def _cast(source: Path, target: Path, dtype: torch.dtype, kept: set[str]) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = {}
    with safe_open(source, "pt") as opened:  # mapped, so that only what is cast takes memory
        for name in opened.keys():  # noqa: SIM118 - it is no mapping
            tensor = opened.get_tensor(name)
            longer = tensor.is_floating_point() and tensor.element_size() > dtype.itemsize
            tensors[name] = tensor.to(dtype) if longer and not any(part in name for part in kept) else tensor
        save_file(tensors, target, opened.metadata())
    target.chmod(0o644)  # safetensors writes for the owner alone; workers may be other users


def _told(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A network's configuration, with the copy's precision where it tells one."""
    return config | {key: str(dtype).removeprefix("torch.") for key in _DTYPE_KEYS if config.get(key)}


def _count(folder: Path) -> None:
    """Put the copy's size into the lists of what lies in which file."""
    from safetensors import safe_open

    for index in folder.glob(f"*{_INDEX}"):
        listed = json.loads(index.read_text())
        total = 0
        for name in sorted(set(listed["weight_map"].values())):
            with safe_open(folder / name, "pt") as opened:
                total += sum(opened.get_tensor(key).nbytes for key in opened.keys())  # noqa: SIM118
        listed.setdefault("metadata", {})["total_size"] = total
        index.write_text(json.dumps(listed, indent=2) + "\n")


def _ask_disk(source: Path, made: Path) -> None:
    """Half the original's size is needed where it is float32, and more where it is not."""
    need = sum(file.stat().st_size for file in files.files_below(source)) / 2
    free = shutil.disk_usage(made).free
    if need > free:
        raise ConvertError(
            f"a copy of {source} needs at least {need / 1e9:.1f} GB and {made.parent} has {free / 1e9:.1f}"
        )
