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
    """How the person is cut out. `landmarks` is what the released IPVG-STD code does.

    All but `method` and `cutout` are read by method hrnet alone:

    - `model`: an HRNet for segmentation, or a PP-Matting or MODNet with an HRNet body; the file says which.
    - `input_size`: edge of the square, or shorter side, that the network sees; None for what its authors test with.
    - `refine`: bring a segmentation's mask to the picture's own edges.
    - `feather`: last blur of the matte, as a share of the picture's longer side.
    - `network_batch`: pictures that go through the network together at most; changes speed and memory, not results.
    - `cutout`: also keep the id picture with transparency (RGBA).
    """

    method: Literal["hrnet", "landmarks", "none"] = "hrnet"
    model: str = "hrnet_lip_5583_torch04.pth"
    input_size: int | None = Field(None, ge=32)
    refine: bool = True
    feather: float = Field(0.0005, ge=0, le=0.05)
    network_batch: int = Field(8, ge=1)
    cutout: bool = True
