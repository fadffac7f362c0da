"""The real models: what each is for, where it comes from, how large it is, and who may use it.

One table for the whole program: `ipvg-ray models pull` and `check`, the plan's hints and `docs/models.md` read it.
A model's `name` is its place below `models.root`, the same word that the configuration uses.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from ipvg_ray.errors import UserError
from ipvg_ray.models.registry import faces, first_frame, metrics, prompts, video
from ipvg_ray.models.registry.rows import HubSource, Licence, Model, UrlSource

__all__ = [
    "MODELS",
    "HubSource",
    "Licence",
    "Model",
    "UnknownModelError",
    "UrlSource",
    "at",
    "get",
    "is_miniature",
    "non_commercial",
]


class UnknownModelError(UserError, ValueError):
    """A name that is not in the table; the message gives the nearest one that is."""


MODELS: tuple[Model, ...] = (
    *faces.MODELS,
    *prompts.MODELS,
    *first_frame.MODELS,
    *video.MODELS,
    *metrics.MODELS,
)


def get(name: str) -> Model:
    """The model of that name.

    Raises:
        UnknownModelError: where the table has none, with the nearest name, or with what makes a miniature.
    """
    for model in MODELS:
        if model.name == name:
            return model
    if is_miniature(name):
        raise UnknownModelError(f"{name!r} is a miniature, which is made, not pulled: `ipvg-ray models make-mini`")
    near = difflib.get_close_matches(name, [model.name for model in MODELS], n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UnknownModelError(f"no model {name!r} is known{hint} (a folder or file of your own needs no pulling)")


def at(path: Path) -> tuple[Model, Path] | None:
    """The model whose place `path` is, and the root that it lies below; None for a place the table does not know.

    Only the end of the path counts: `/data/models/Qwen3-8B` is `Qwen3-8B` below `/data/models`.
    """
    for model in MODELS:
        parts = Path(model.name).parts
        if path.parts[-len(parts) :] == parts:
            return model, path.parents[len(parts) - 1]
    return None


def is_miniature(name: str | Path) -> bool:
    """Whether a name or path is one of those that `ipvg-ray models make-mini` makes."""
    return Path(name).name.startswith(("mini-", "mini_"))


def non_commercial(models: Iterable[Model] = MODELS) -> list[Model]:
    """Those whose terms leave out commercial use."""
    return [model for model in models if not model.licence.commercial]
