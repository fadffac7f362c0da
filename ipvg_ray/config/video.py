"""Section of the stage video."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ipvg_ray.config.base import DType, StageSection, multiple


class VideoConfig(StageSection):
    """VACE from first frame and mask. The converted checkpoints carry shift 3; the official setting is `shift` 16."""

    task: Literal["vace-i2v"] = "vace-i2v"
    model: str = "Wan2.1-VACE-14B-diffusers"
    width: int = Field(832, ge=16)
    height: int = Field(480, ge=16)
    frames: int = Field(81, ge=5)
    fps: int = Field(16, ge=1)
    steps: int = Field(50, ge=1)
    guidance: float = Field(5.0, ge=0)
    shift: float = Field(16.0, gt=0)
    conditioning_scale: float = 1.0
    dtype: DType = "bfloat16"
    crf: int = Field(18, ge=0, le=51)
    negative_prompt: str = (
        "overexposed, static, blurred details, subtitles, painting, still picture, grey cast, worst quality, "
        "low quality, compression artefacts, ugly, mutilated, extra fingers, badly drawn hands, badly drawn face, "
        "deformed limbs, fused fingers, motionless frame, cluttered background, three legs, walking backwards"
    )

    @model_validator(mode="after")
    def _latent_grid(self) -> VideoConfig:
        if self.frames % 4 != 1:
            raise ValueError(f"frames is {self.frames}; Wan needs 4·n + 1, such as {self.frames // 4 * 4 + 1}")
        return multiple(self, 16)
