"""Sections of the stages text_states and video."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ipvg_ray.config.base import DType, Section, StageSection, Unit, multiple
from ipvg_ray.config.group import GroupConfig

TaskName = Literal["vace-i2v", "vace-r2v", "vace-i2v+ref", "ti2v-5B", "i2v-A14B"]

_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""`sample_neg_prompt` of the code of Wan 2.1, Wan 2.2 and VACE: garish, overexposed, static, blurred, subtitles, worst
quality, badly drawn hands and faces, fused fingers, three legs, walking backwards and the like."""
_VACE = {
    "model": "Wan2.1-VACE-14B-diffusers", "width": 832, "height": 480, "frames": 81, "fps": 16, "steps": 50,
    "shift": 16.0, "guidance": 5.0, "negative_prompt": _NEGATIVE,
}  # fmt: skip
OFFICIAL: dict[str, dict[str, Any]] = {
    "vace-i2v": _VACE,
    "vace-r2v": _VACE,
    "vace-i2v+ref": _VACE,
    "ti2v-5B": {
        "model": "Wan2.2-TI2V-5B-Diffusers", "width": 1280, "height": 704, "frames": 121, "fps": 24, "steps": 50,
        "shift": 5.0, "guidance": 5.0, "negative_prompt": _NEGATIVE,
    },
    "i2v-A14B": {
        "model": "Wan2.2-I2V-A14B-Diffusers", "width": 832, "height": 480, "frames": 81, "fps": 16, "steps": 40,
        "shift": 5.0, "guidance": 3.5, "guidance_low": 3.5, "boundary": 0.9, "negative_prompt": _NEGATIVE,
    },
}  # fmt: skip
"""What each task's authors use. Converted checkpoints carry other shifts (VACE's 3): those are never used."""


class TextStatesConfig(StageSection):
    """UMT5 apart from the video model. `model` is the checkpoint whose text encoder is used, `video.model`'s unless
    given."""

    model: str | None = None
    dtype: DType = "bfloat16"


class TpigeConfig(Section):
    """Identity-aware guidance (arXiv 2509.01362), read where `video.guide` is tpige.

    Mode release is what its authors' code does, paper what their figure prints; `skip` lists the blocks that the weak
    branch leaves out, `start` and `end` the part of the steps in which it works.
    """

    mode: Literal["release", "paper"] = "release"
    scale: float = 0.5
    skip: tuple[int, ...] = (2,)
    start: Unit = 0.0
    end: Unit = 1.0


class CacheConfig(Section):
    """Step caches: LOSSY. Off unless asked for.

    first_block: a step whose first block changes by less than `threshold` (relative) repeats the rest of the last whole
    one, at most `max_skips` times in a row, never in the first `start` steps. taylorseer (arXiv 2503.06923): every
    `interval`-th step is computed, the others are extrapolated.
    """

    kind: Literal["none", "first_block", "taylorseer"] = "none"
    threshold: float = Field(0.08, gt=0)
    start: int = Field(5, ge=1)
    max_skips: int = Field(3, ge=1)
    interval: int = Field(4, ge=2)


class LoraConfig(Section):
    """A LoRA file that is added to the transformer's weights when they are loaded, times `scale`: LOSSY where it
    distils steps. Of i2v-A14B `expert` says to which transformer: high or low noise, or both.
    """

    path: str
    scale: float = 1.0
    expert: Literal["both", "high", "low"] = "both"


class VideoConfig(StageSection):
    """First frame or reference picture and prompt to video.

    Fields that are not given take the task's official value (`OFFICIAL`). `guidance_low` and `boundary` belong to the
    second expert of i2v-A14B. `reference` says which picture the tasks with a reference take: the identity's own,
    the person cut from it, or the one that `first_frame.reference.enhance` draws. `branches` together computes
    branches of guidance in one forward, `together` so many videos: both cost memory. `save_every` steps a video's state
    is kept beside the run, for another worker to go on from (0: never). `text_in_worker` loads UMT5 into the video
    workers, in place of the stage text_states. `storage` fp8, fp8_scaled and fp8_matmul keep weights in 8 bits, the
    last multiplies in 8 bits too: LOSSY, and the last two want the package torchao. `loras` are added to the
    weights, in their order. `solver` euler is first order, as step-distilled LoRAs want it.
    """

    task: TaskName = "vace-i2v"
    model: str
    width: int = Field(ge=16)
    height: int = Field(ge=16)
    frames: int = Field(ge=5)
    fps: int = Field(ge=1)
    steps: int = Field(ge=1)
    shift: float = Field(gt=0)
    solver: Literal["unipc", "euler"] = "unipc"
    loras: tuple[LoraConfig, ...] = ()
    guide: Literal["cfg", "tpige"] = "cfg"
    guidance: float = Field(ge=0)
    guidance_low: float | None = Field(None, ge=0)
    guidance_start: Unit = 0.0
    guidance_end: Unit = 1.0
    boundary: Unit | None = None
    tpige: TpigeConfig = TpigeConfig()
    conditioning_scale: float = 1.0
    reference: Literal["image", "id_picture", "reference_picture"] = "image"
    text_in_worker: bool = False
    save_every: int = Field(10, ge=0)
    together: int = Field(1, ge=1)
    branches: Literal["in_turn", "together"] = "in_turn"
    dtype: DType = "bfloat16"
    storage: Literal["dtype", "fp8", "fp8_scaled", "fp8_matmul"] = "dtype"
    attention: str = "auto"
    compile: bool = False
    cache: CacheConfig = CacheConfig()
    group: GroupConfig = GroupConfig()
    crf: int = Field(18, ge=0, le=51)
    encoder: Literal["x264", "nvenc", "auto"] = "x264"
    negative_prompt: str

    @model_validator(mode="before")
    @classmethod
    def _official(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {**OFFICIAL.get(given.get("task", "vace-i2v"), _VACE), **given}

    @model_validator(mode="after")
    def _latent_grid(self) -> VideoConfig:
        if self.frames % 4 != 1:
            raise ValueError(f"frames is {self.frames}; Wan needs 4·n + 1, such as {self.frames // 4 * 4 + 1}")
        multiple(self, 32 if self.task == "ti2v-5B" else 16)
        return self

    @model_validator(mode="after")
    def _fits_the_task(self) -> VideoConfig:
        if self.guide == "tpige" and not self.task.startswith("vace"):
            raise ValueError(f"guide tpige weakens VACE's hints; task {self.task} has none: use guide cfg")
        if self.task == "i2v-A14B" and self.boundary is None:
            raise ValueError("task i2v-A14B has two experts and needs boundary, such as 0.9")
        if self.storage == "fp8_matmul" and self.dtype != "bfloat16":
            raise ValueError(f"storage fp8_matmul gives bfloat16, and dtype is {self.dtype}: use dtype bfloat16")
        if self.task != "i2v-A14B" and any(lora.expert != "both" for lora in self.loras):
            raise ValueError(f"loras name an expert, and task {self.task} has one transformer: leave expert out")
        if self.cache.kind != "none" and self.compile:
            raise ValueError("compile and cache exclude each other: a block that is compiled whole asks no cache")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> VideoConfig:
        if self.together > self.pool.batch_size:
            raise ValueError(
                f"together is {self.together}, and a worker is given pool.batch_size {self.pool.batch_size} rows at a "
                f"time; set pool.batch_size to a multiple of {self.together}"
            )
        if self.together > 1 and self.cache.kind == "first_block":
            raise ValueError(
                "cache first_block decides for all videos of a forward at once, so that a row's video would depend on "
                "its neighbours; set together to 1, or cache.kind to taylorseer"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_group(self) -> VideoConfig:
        group, cards = self.group, self.pool.gpus
        if group.gpus > 1 and cards not in (0, 1, group.gpus):
            raise ValueError(f"pool.gpus is {cards:g} and group.gpus {group.gpus}; leave pool.gpus at 1: it follows")
        if group.cfg > self.most_branches:
            raise ValueError(f"group.cfg is {group.cfg}, and a step has {self.most_branches} branches at most")
        if group.ring * group.ulysses > 1 and self.guide == "tpige" and 0 in self.tpige.skip:
            raise ValueError("tpige.skip leaves out block 0, where ring and ulysses ranks part the tokens")
        if group.ring > 1 and self.compile:
            raise ValueError("compile cannot follow keys and values around a ring: use ulysses, or compile: false")
        return self

    @model_validator(mode="after")
    def _fits_the_weights(self) -> VideoConfig:
        """Weights that come and go are fetched by hooks on each block, and these settings replace or pass them by."""
        where = self.group.weights
        if where == "whole":
            return self
        for field, chosen, mend in (
            (f"storage {self.storage}", self.storage != "dtype", "storage: dtype"),
            ("cache.kind first_block", self.cache.kind == "first_block", "cache.kind: taylorseer or none"),
            ("compile", self.compile, "compile: false"),
        ):
            if chosen:
                raise ValueError(f"{field} and group.weights {where} exclude each other; use {mend}, or weights: whole")
        return self

    @property
    def most_branches(self) -> int:
        """Evaluations of the network that a step needs at most."""
        return (2 if max(self.guidance, self.guidance_low or 0) > 1 else 1) + (self.guide == "tpige")

    @property
    def lossy(self) -> list[str]:
        """The settings that trade quality for speed or memory."""
        chosen = {
            "loras": bool(self.loras),
            f"storage {self.storage}": self.storage != "dtype",
            f"cache.kind {self.cache.kind}": self.cache.kind != "none",
            f"attention {self.attention}": "sage" in self.attention,
        }
        return [words for words, there in chosen.items() if there]
