"""Wan's original checkpoint folders, as the authors publish them, read into diffusers' and transformers' classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ipvg_ray.models.wan.tasks import Task


def is_original(folder: Path) -> bool:
    return False


def load_transformers(folder: Path, task: Task, dtype: torch.dtype) -> list[Any]:
    raise NotImplementedError


def load_vae(folder: Path) -> Any:
    raise NotImplementedError


def load_text(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    raise NotImplementedError
