"""Section of the stage first_frame."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ipvg_ray.config.base import DType, Section, StageSection, Unit, multiple


class DetailConfig(Section):
    """The face detail pass; lengths in pixels, see `ipvg_ray.models.face_detail.Geometry`."""

    enabled: bool = True
    threshold: Unit = 0.5
    smallest: int = Field(10, ge=1)
    grow: int = Field(10, ge=0)
    factor: float = Field(2.0, ge=1)
    guide: int = Field(1024, ge=64)
    longest: int = Field(1024, ge=64)
    grid: int = Field(64, ge=8, multiple_of=8)
    feather: int = Field(5, ge=0)
    most: int = Field(4, ge=1)
    steps: int = Field(10, ge=1)
    denoise: float = Field(0.5, gt=0, lt=1)


class ControlConfig(Section):
    """What `first_frame.controlnet` is shown, and how strongly it holds.

    `keypoints` draws the reference face's five landmarks, `face_height` of the frame high and centred at `face_x`,
    `face_y` of it; `picture` takes `control_picture` for every row.
    """

    source: Literal["keypoints", "picture"] = "keypoints"
    scale: float = Field(0.5, ge=0)
    start: Unit = 0.0
    end: Unit = 1.0
    face_height: float = Field(0.45, gt=0, le=1)
    face_x: Unit = 0.5
    face_y: Unit = 0.42


class SafetyConfig(Section):
    """Pictures to which `safety_model` gives `threshold` or more for these labels together are not taken."""

    labels: tuple[str, ...] = ("nsfw", "porn", "sexy", "hentai", "unsafe")
    threshold: Unit = 0.5


class ReferenceConfig(Section):
    """The reference picture of TPIGE (arXiv 2509.01362): the person's upper body in the clothes the prompt asks for."""

    enhance: Literal["none", "hyperlora"] = "none"
    width: int = Field(832, ge=64)
    height: int = Field(832, ge=64)
    suffix: str = "upper body portrait, looking at the camera, plain background"

    @model_validator(mode="after")
    def _latent_grid(self) -> ReferenceConfig:
        return multiple(self, 8)


class RuntimeConfig(Section):
    """What decides memory and speed; see docs/first_frame.md for what each needs.

    `batch` is how many pictures one call of the UNet draws; rows in work (pool.batch_size times pool.concurrency)
    should be twice as many, so that a batch is full again when the one before is done.
    """

    batch: int = Field(8, ge=1)
    kept_identities: int = Field(32, ge=1)
    offload: bool = False
    vae_slicing: bool = True
    vae_tiling: bool = False
    channels_last: bool = False
    compile: bool = False


class FirstFrameConfig(StageSection):
    """`checkpoint` is a single SDXL .safetensors file, `checkpoint_config` the diffusers folder with its configs and
    tokenizers. `vae` replaces the checkpoint's own, `controlnet` and `safety_model` are off where they are null."""

    checkpoint: str = "RealVisXL_V4.0.safetensors"
    checkpoint_config: str = "stable-diffusion-xl-base-1.0"
    hyperlora: str = "sdxl_hyper_id_lora_v1_fidelity"
    clip_vision: str = "clip-vit-large-patch14"
    vae: str | None = None
    controlnet: str | None = None
    control_picture: str | None = None
    safety_model: str | None = None
    weight: float = 0.85
    base_weight: float = 0.0
    grayscale: bool = False
    width: int = Field(832, ge=64)
    height: int = Field(480, ge=64)
    steps: int = Field(20, ge=1)
    guidance: float = Field(5.0, ge=0)
    sampler: Literal["dpmpp_2m", "euler"] = "dpmpp_2m"
    schedule: Literal["karras", "exponential", "normal"] = "karras"
    clip_skip: int = Field(2, ge=1)
    attempts: int = Field(3, ge=1)
    similarity: float = Field(0.5, ge=-1, le=1)
    detail: DetailConfig = DetailConfig()
    control: ControlConfig = ControlConfig()
    safety: SafetyConfig = SafetyConfig()
    reference: ReferenceConfig = ReferenceConfig()
    dtype: DType = "float16"
    vae_dtype: DType = "float32"
    format: Literal["jpeg", "png"] = "jpeg"
    quality: int = Field(95, ge=1, le=100)
    mark: bool = True
    negative_prompt: str = (
        "blurry, out of focus, face hidden, no face, deformed anatomy, extra fingers, extra limbs, text, "
        "watermark, signature, low quality, jpeg artifacts, nudity"
    )
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _latent_grid(self) -> FirstFrameConfig:
        return multiple(self, 8)

    @model_validator(mode="after")
    def _control_has_a_picture(self) -> FirstFrameConfig:
        if self.controlnet is not None and self.control.source == "picture" and self.control_picture is None:
            raise ValueError(
                "control.source is picture and control_picture is null; name the picture, or use keypoints"
            )
        return self
