"""Sections of the stages that read the reference picture: faces and matting."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from ipvg_ray.config.base import Section, StageSection, Unit

Action = Literal["off", "warn", "refuse"]
"""What a quality gate does: nothing, name the flaw in the row, or fail the row."""
Angle = Annotated[float, Field(ge=0, le=180)]


class SmallGate(Section):
    """A face whose box's shorter edge is below `pixels`: ArcFace sees 112 of them, HyperLoRA's encoder 224."""

    action: Action = "warn"
    pixels: float = Field(80, ge=0)


class BlurGate(Section):
    """A face less sharp than this, as `models.face_quality.sharpness` measures it."""

    action: Action = "warn"
    sharpness: float = Field(0.004, ge=0)


class TurnedGate(Section):
    """A face turned by more than these degrees to a side, or up or down."""

    action: Action = "warn"
    yaw: Angle = 45
    pitch: Angle = 35


class OddGate(Section):
    """Of several reference pictures, one whose embedding reaches this cosine with fewer than half of the others."""

    action: Action = "warn"
    cosine: float = Field(0.3, ge=-1, le=1)


class FaceGates(Section):
    """What is asked of the faces on reference pictures."""

    too_small: SmallGate = SmallGate()
    blurred: BlurGate = BlurGate()
    turned_away: TurnedGate = TurnedGate()
    odd_one_out: OddGate = OddGate()


class FacesConfig(StageSection):
    """`pack` scores and describes; `id_pack` makes the embedding that HyperLoRA was trained on.

    `det_sizes` are tried in order until a face is found; 224 alone is quick and enough for portraits. `onnx_provider`
    says what onnxruntime runs on: `auto` is CUDA where a worker is given a GPU, else the CPU. Of several pictures of an
    identity the first `used_references` that pass the gates make its first frames; 1 takes the first picture alone.
    """

    pack: str = "insightface/models/buffalo_l"
    id_pack: str = "insightface/models/antelopev2"
    det_sizes: tuple[int, ...] = (640, 512, 384, 256)
    det_threshold: Unit = 0.5
    choose: Literal["largest", "centre", "confident", "error"] = "largest"
    used_references: int = Field(4, ge=1)
    gates: FaceGates = FaceGates()
    onnx_provider: Literal["auto", "tensorrt", "cuda", "cpu"] = "auto"

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
