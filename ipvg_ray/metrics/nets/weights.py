"""Read published checkpoints of the scoring networks: no code runs from them, no key is missing or left over."""

from __future__ import annotations

import io
import pickle
import types
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Net = TypeVar("Net", bound=nn.Module)


class WeightsError(ValueError):
    """A file that holds no weights of the network wanted; the message names the file and what does not fit."""


def read(path: Path, inside: Iterable[str] = ("state_dict", "model"), prefix: str = "module.") -> dict[str, Tensor]:
    """A checkpoint's state dict on the CPU.

    Args:
        path: a torch file or, by its ending, a safetensors file.
        inside: keys below which the state dict may lie.
        prefix: taken off where all keys carry it (torch's data-parallel wrappers leave `module.`).

    Raises:
        WeightsError: where the file cannot be read as one.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: object = load_file(path)
        else:
            loaded = _loaded(path)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{path} cannot be read as weights: {error}") from error
    for key in inside:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded:
        raise WeightsError(f"{path} holds no state dict")
    state = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if state and all(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


class _Inert(dict[Any, Any]):
    """Stands for an object of a class that is none of a tensor's: takes everything, does nothing."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...


class _TensorsOnly(pickle.Unpickler):
    """Makes tensors and plain containers; nothing else that a file names is looked up, so none of its code runs."""

    _KNOWN = frozenset(
        {
            ("collections", "OrderedDict"),
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch._utils", "_rebuild_parameter"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if (module, name) in self._KNOWN else _Inert


def _tensors_only(file: Any, **how: Any) -> Any:
    """What torch calls in place of `pickle.load`, for the heads of files in its old format."""
    return _TensorsOnly(file, **how).load()


def _loaded(path: Path) -> object:
    """A torch file. Some checkpoints carry settings of their training, which torch's own safe loading refuses whole."""
    try:
        return torch.load(_opened(path), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        shim = types.SimpleNamespace(Unpickler=_TensorsOnly, load=_tensors_only, __name__="tensors_only")
        return torch.load(_opened(path), map_location="cpu", weights_only=False, pickle_module=shim)


def _opened(path: Path) -> Path | io.BytesIO:
    """The checkpoint itself, also where it is the one file in a zip archive."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if len(archive.namelist()) == 1:  # torch's own format is a zip archive of several
                return io.BytesIO(archive.read(archive.namelist()[0]))
    return path


def fill(make: Callable[[], Net], state: Mapping[str, Tensor], path: Path, spare: Iterable[str] = ()) -> Net:
    """Make the network and give it exactly these weights; returned in eval mode, without gradients, float32.

    Args:
        make: builds it; called on the meta device, so that no random weights are drawn first.
        spare: prefixes of keys that the checkpoint may hold and the network does not use.

    Raises:
        WeightsError: where names or shapes do not fit.
    """
    with torch.device("meta"):
        net = make()
    wanted = {key: value.shape for key, value in net.state_dict().items()}
    given = {key: value for key, value in state.items() if not key.startswith(tuple(spare))}
    optional = {key for key in wanted if key.endswith("num_batches_tracked")}
    missing = sorted(set(wanted) - set(given) - optional)
    strange = sorted(set(given) - set(wanted))
    unlike = sorted(key for key in set(given) & set(wanted) if given[key].shape != wanted[key])
    if missing or strange or unlike:
        parts = {"missing": missing, "not known": strange, "of another shape": unlike}
        told = "; ".join(f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in parts.items() if keys)
        raise WeightsError(f"{path} does not hold the weights of {type(net).__name__}: {told}")
    full = {key: given[key] if key in given else torch.zeros((), dtype=torch.long) for key in wanted}
    net.load_state_dict(full, assign=True)
    return net.float().eval().requires_grad_(False)


def require(state: Mapping[str, Tensor], key: str, path: Path) -> Tensor:
    """The tensor of a name that the network's sizes are read from. Raises WeightsError where there is none."""
    if key not in state:
        raise WeightsError(f"{path} holds no {key!r}, by which this network's weights are known")
    return state[key]
