"""One identity's LoRA as a file, for ComfyUI and diffusers: the stages faces and matting, then HyperLoRA."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipvg_ray.errors import UserError

if TYPE_CHECKING:
    from ipvg_ray.config import Config


class ExportError(UserError):
    """A picture that no LoRA can be made of, or a model that is missing."""


class _NoMedia:
    """Neither stage publishes files."""

    def publish(self, folder: str, identity_id: str, name: str, suffix: str, data: bytes) -> str:
        raise NotImplementedError("an export publishes no media")


@dataclass(frozen=True)
class Exported:
    """What was written: the LoRA's rank, how many of the pictures it was made from, and why others were left out."""

    rank: int
    used: int
    left_out: list[str]


def export_lora(settings: Config, pictures: Sequence[Path], target: Path, name: str, device: str = "cpu") -> Exported:
    """Write the LoRA of the person on some pictures.

    The pictures are prepared and chosen as in a run with this configuration, but for `faces.used_references`: all that
    pass the gates are used. Load the file with the weight of `first_frame.weight` and begin prompts with HyperLoRA's
    trigger words; a Base LoRA is then in it with `first_frame.base_weight`.

    Args:
        settings: names the models.
        pictures: one or more of one person; what is common to them is kept.
        target: the .safetensors file.
        name: the title in the file.
        device: `cpu` or `cuda`.

    Raises:
        ExportError: where a model is missing, a picture cannot be read, or the first one shows no face.
    """
    from ipvg_ray.models.clip_vision import ClipVision
    from ipvg_ray.models.hyperlora import HyperLora, save_lora
    from ipvg_ray.models.lora import LoraPair, merged
    from ipvg_ray.models.painter import base_lora, identity_lora
    from ipvg_ray.stages.first_frame import person

    section, place = settings.first_frame, settings.models.path
    if section.base_weight and not section.weight:
        raise ExportError("first_frame.weight is 0: a file loaded with it does nothing; set it above 0")
    row = _prepared(settings, pictures, device)
    try:
        hyperlora = HyperLora.load(place(section.hyperlora), device=device)
        clip = ClipVision.load(place(section.clip_vision), device=device)
        identity = person(row, settings)
        pairs = identity_lora(hyperlora, clip, identity)
        if section.base_weight:
            base = base_lora(hyperlora, clip, identity)
            pairs = merged([(pairs, 1.0), (base, section.base_weight / section.weight)])
    except ValueError as error:
        raise ExportError(str(error)) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    save_lora(target, {key: LoraPair(pair.down.half(), pair.up.half()) for key, pair in pairs.items()}, name)
    return Exported(len(next(iter(pairs.values())).down), sum(row["reference_used"]), _left_out(row, pictures))


def _prepared(settings: Config, pictures: Sequence[Path], device: str) -> dict[str, Any]:
    """The row of an identity with these pictures, with the columns of faces and matting."""
    from ipvg_ray.pipeline.stage import RowError, StageContext
    from ipvg_ray.stages import make_stages

    cells, hashes = [], []
    for path in pictures:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ExportError(f"cannot read {path}: {error.strerror}") from error
        cells.append({"bytes": data, "path": str(path)})
        hashes.append(hashlib.sha256(data).hexdigest())
    row: dict[str, Any] = {"identity_id": "exported", "image": cells[0], "image_sha256": hashes[0]}
    row |= {"more_images": cells[1:], "more_images_sha256": hashes[1:]}
    all_used = settings.faces.model_copy(update={"used_references": len(pictures)})
    for stage in make_stages(settings.model_copy(update={"faces": all_used}), until="matting"):
        try:
            stage.setup(StageContext(device, 1, _NoMedia(), ""))
        except (FileNotFoundError, ValueError) as error:
            raise ExportError(f"{stage.name}: {error}") from error
        (result,) = stage.process([row])
        stage.teardown()
        if isinstance(result, RowError):
            about = pictures if result.kind == "odd_reference" else pictures[:1]
            raise ExportError(f"{', '.join(map(str, about))}: {result.message}")
        row |= result
    return row


def _left_out(row: Mapping[str, Any], pictures: Sequence[Path]) -> list[str]:
    """A sentence for each picture that the LoRA was not made from."""
    used = set(compress(row["reference_numbers"], row["reference_used"]))
    notes = dict(note.removeprefix("reference ").split(": ", 1) for note in row["reference_notes"])
    odd = "it does not seem to show the person of the first; faces.gates.odd_one_out.action=off uses it all the same"
    return [f"{path}: {notes.get(str(n), odd)}" for n, path in enumerate(pictures) if n not in used]
