"""Section of the stage first_frame."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ipvg_ray.config.base import DType, StageSection, multiple


class FirstFrameConfig(StageSection):
    """`checkpoint` is a single SDXL .safetensors file, `checkpoint_config` the diffusers folder with its configs and
    tokenizers."""

    checkpoint: str = "RealVisXL_V4.0.safetensors"
    checkpoint_config: str = "stable-diffusion-xl-base-1.0"
    hyperlora: str = "sdxl_hyper_id_lora_v1_fidelity"
    clip_vision: str = "clip-vit-large-patch14"
    weight: float = 0.85
    width: int = Field(832, ge=64)
    height: int = Field(480, ge=64)
    steps: int = Field(20, ge=1)
    guidance: float = Field(5.0, ge=0)
    dtype: DType = "float16"
    format: Literal["jpeg", "png"] = "jpeg"
    quality: int = Field(95, ge=1, le=100)
    negative_prompt: str = (
        "blurry, out of focus, face hidden, no face, deformed anatomy, extra fingers, extra limbs, text, "
        "watermark, signature, low quality, jpeg artifacts, nudity"
    )

    @model_validator(mode="after")
    def _latent_grid(self) -> FirstFrameConfig:
        return multiple(self, 8)
