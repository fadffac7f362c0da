"""Sections of the stages that read the reference picture: faces and matting."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from ipvg_ray.config.base import StageSection, Unit


class FacesConfig(StageSection):
    """`pack` scores and describes; `id_pack` makes the embedding that HyperLoRA was trained on."""

    pack: str = "insightface/models/buffalo_l"
    id_pack: str = "insightface/models/antelopev2"
    det_sizes: tuple[int, ...] = (640, 512, 384, 256)
    det_threshold: Unit = 0.5
    choose: Literal["largest", "centre", "confident", "error"] = "largest"

    @field_validator("det_sizes")
    @classmethod
    def _multiples_of_32(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or any(size < 32 or size % 32 for size in value):
            raise ValueError(f"det_sizes is {list(value)}; each must be a positive multiple of 32")
        return value


class MattingConfig(StageSection):
    """`model` is read only by method hrnet. `landmarks` is what the released IPVG-STD code does."""

    method: Literal["hrnet", "landmarks", "none"] = "hrnet"
    model: str = "hrnet_lip_5583_torch04.pth"
    input_size: int = Field(473, ge=32)
