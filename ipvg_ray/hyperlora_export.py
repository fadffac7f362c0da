"""One identity's LoRA as a file, for ComfyUI and diffusers: the stages faces and matting, then HyperLoRA."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ipvg_ray.errors import UserError

if TYPE_CHECKING:
    from ipvg_ray.config import Config


class ExportError(UserError):
    """A picture that no LoRA can be made of, or a model that is missing."""


class _NoMedia:
    """Neither stage publishes files."""

    def publish(self, folder: str, identity_id: str, name: str, suffix: str, data: bytes) -> str:
        raise NotImplementedError("an export publishes no media")


def export_lora(settings: Config, pictures: Sequence[Path], target: Path, name: str, device: str = "cpu") -> int:
    """Write the LoRA of the person on some pictures.

    The pictures are prepared as in a run with this configuration. Load the file with the weight of
    `first_frame.weight` and begin prompts with HyperLoRA's trigger words.

    Args:
        settings: names the models.
        pictures: one or more of one person; what is common to them is kept.
        target: the .safetensors file.
        name: the title in the file.
        device: `cpu` or `cuda`.

    Returns:
        The LoRA's rank.

    Raises:
        ExportError: where a model is missing, a picture cannot be read or shows no face.
    """
    from ipvg_ray.media import images
    from ipvg_ray.models.clip_vision import ClipVision
    from ipvg_ray.models.hyperlora import HyperLora, save_lora
    from ipvg_ray.models.lora import LoraPair
    from ipvg_ray.models.painter import Identity, identity_lora

    section, place = settings.first_frame, settings.models.path
    rows = _prepared(settings, pictures, device)
    try:
        hyperlora = HyperLora.load(place(section.hyperlora), device=device)
        clip = ClipVision.load(place(section.clip_vision), device=device)
        seen = tuple(images.decode(row["id_picture"]["bytes"]) for row in rows)
        person = Identity(name, seen, np.array([row["id_embedding"] for row in rows], np.float32))
        pairs = identity_lora(hyperlora, clip, person)
    except ValueError as error:
        raise ExportError(str(error)) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    save_lora(target, {key: LoraPair(pair.down.half(), pair.up.half()) for key, pair in pairs.items()}, name)
    return hyperlora.rank


def _prepared(settings: Config, pictures: Sequence[Path], device: str) -> list[dict[str, Any]]:
    """Rows of the pictures with the columns of faces and matting."""
    from ipvg_ray.pipeline.stage import RowError, StageContext
    from ipvg_ray.stages import make_stages

    rows: list[dict[str, Any]] = []
    for number, path in enumerate(pictures):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ExportError(f"cannot read {path}: {error.strerror}") from error
        digest = hashlib.sha256(data).hexdigest()
        rows.append({"identity_id": str(number), "image": {"bytes": data, "path": str(path)}, "image_sha256": digest})
    for stage in make_stages(settings, until="matting"):
        try:
            stage.setup(StageContext(device, 1, _NoMedia(), ""))
        except (FileNotFoundError, ValueError) as error:
            raise ExportError(f"{stage.name}: {error}") from error
        for path, row, result in zip(pictures, rows, stage.process(rows), strict=True):
            if isinstance(result, RowError):
                raise ExportError(f"{path}: {result.message}")
            row.update(result)
        stage.teardown()
    return rows
