"""Wan and VACE checkpoints from local folders: diffusers' layout, or the original one. Never any network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ipvg_ray.models.quiet import no_bars
from ipvg_ray.models.wan import original
from ipvg_ray.models.wan.errors import WanError
from ipvg_ray.models.wan.tasks import Task
from ipvg_ray.models.wan.text import TextEncoder


@dataclass(frozen=True)
class Parts:
    """A loaded model without its text encoder.

    Attributes:
        transformers: one, or high-noise and low-noise expert.
        vae: float32.
        scheduler: makes a fresh scheduler for each batch.
    """

    transformers: list[Any]
    vae: Any
    scheduler: Callable[[], Any]


def load(
    folder: Path,
    task: Task,
    *,
    dtype: torch.dtype,
    device: str,
    shift: float,
    solver: Literal["unipc", "euler"] = "unipc",
) -> Parts:
    """Load what makes videos; the text encoder stays on disk.

    Args:
        folder: a checkpoint in diffusers' layout, such as Wan2.1-VACE-14B-diffusers, or in the original one, such as
            Wan2.1-VACE-14B.
        task: what it shall do.
        dtype: of the transformers. Rotary tables, time embedder and norms stay float32, as trained.
        device: where all parts go, such as `cuda`.
        shift: the flow-matching schedule's shift, σ' = shift·σ / (1 + (shift − 1)·σ). VACE's own setting is 16; the
            published conversions carry 3, so the checkpoint's value is never used.
        solver: `unipc`, the models' own, or `euler`, with which step-distilled ones are used.

    Raises:
        WanError: where the folder holds no model of the task.
    """
    with no_bars():
        if original.is_original(folder):
            transformers, vae = original.load_transformers(folder, task, dtype), original.load_vae(folder)
            scheduler = _scheduler(None, shift, solver)
        else:
            _require_pipeline(folder, task)
            _look_ahead(folder, task)
            transformers = [
                _component(folder / name, dtype) for name in ("transformer", "transformer_2")[: task.experts]
            ]
            vae = _component(folder / "vae", torch.float32)
            scheduler = _scheduler(folder / "scheduler", shift, solver)
    _require_kind(folder, transformers[0].config, task)
    for part in (*transformers, vae):
        part.to(device).eval().requires_grad_(False)
    return Parts(transformers, vae, scheduler)


def import_ahead() -> None:
    """Import what `load` will, and touch neither files nor cards; seconds of a new process's start."""
    import accelerate  # noqa: F401
    from diffusers import (  # noqa: F401 # diffusers imports a class's module when the class is first named
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanTransformer3DModel,
        WanVACETransformer3DModel,
    )
    from diffusers.loaders import single_file_utils  # noqa: F401

    from ipvg_ray.models.wan import maker  # noqa: F401


def load_text_encoder(folder: Path, *, dtype: torch.dtype, device: str) -> TextEncoder:
    """Load UMT5 and its tokenizer from the same folder.

    Raises:
        WanError: where the folder holds none.
    """
    from transformers import AutoTokenizer, UMT5EncoderModel

    with no_bars():
        if original.is_original(folder):
            tokenizer, model = original.load_text(folder, dtype)
        else:
            for name in ("text_encoder", "tokenizer"):
                if not (folder / name).is_dir():
                    raise WanError(f"{folder} holds no {name}; pull the model's whole repository")
            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            model = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype, local_files_only=True)
    return TextEncoder(tokenizer, model.to(device).eval().requires_grad_(False))


def _component(folder: Path, dtype: torch.dtype) -> Any:
    """A diffusers model of the class that its own config names."""
    import diffusers

    config = folder / "config.json"
    if not config.is_file():
        raise WanError(f"{folder} holds no config.json; pull the model again")
    name = json.loads(config.read_text()).get("_class_name", "")
    if name not in ("WanTransformer3DModel", "WanVACETransformer3DModel", "AutoencoderKLWan"):
        raise WanError(f"{folder} holds a {name or 'model without a class'}, which is no part of Wan")
    return getattr(diffusers, name).from_pretrained(folder, torch_dtype=dtype, local_files_only=True)


def _require_pipeline(folder: Path, task: Task) -> None:
    index = folder / "model_index.json"
    found = json.loads(index.read_text()).get("_class_name") if index.is_file() else None
    if found != task.pipeline:
        raise WanError(
            f"{folder} holds no {task.pipeline}{f' but a {found}' if found else ''}; task {task.name} needs one"
        )


def _look_ahead(folder: Path, task: Task) -> None:
    """Look at the transformer's settings before gigabytes are read."""
    config = folder / "transformer" / "config.json"
    if config.is_file():
        _require_kind(folder, json.loads(config.read_text()), task)


def _require_kind(folder: Path, config: Mapping[str, Any], task: Task) -> None:
    """Tell models of one class apart by what goes into them."""
    wanted = {"vace": 16, "channels": 36, "first_latent": 48}[task.form]
    found = config.get("in_channels")
    if found != wanted:
        raise WanError(f"{folder} has {found} input channels and task {task.name} needs {wanted}: it is another model")
    if config.get("image_dim"):
        raise WanError(f"{folder} is a Wan2.1 image-to-video model, which needs a CLIP vision encoder; use Wan2.2's")


def _scheduler(folder: Path | None, shift: float, solver: str) -> Callable[[], Any]:
    """UniPC on the flow schedule with `shift`, otherwise as the checkpoint has it.

    Of first order and without its corrector UniPC is Euler's method.
    """
    from diffusers import UniPCMultistepScheduler

    if folder is None:
        config: Any = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": 1000}
    else:
        config = UniPCMultistepScheduler.load_config(folder, local_files_only=True)
    if not config.get("use_flow_sigmas"):
        raise WanError(f"{folder} is no flow-matching UniPC schedule; its shift could not be set to {shift}")
    own: dict[str, Any] = {"flow_shift": shift}
    if solver == "euler":
        own |= {"solver_order": 1, "disable_corrector": list(range(config.get("num_train_timesteps", 1000)))}
    return lambda: UniPCMultistepScheduler.from_config(config, **own)
