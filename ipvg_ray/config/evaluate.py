"""Section of the stage evaluate."""

from __future__ import annotations

from pydantic import Field, field_validator

from ipvg_ray.config.base import StageSection, Unit, nearest
from ipvg_ray.metrics.catalogue import NAMES


class EvaluateConfig(StageSection):
    """The paper's metrics, the challenge's and TPIGE's. See docs/evaluate.md.

    A metric whose model is not there, or is under non-commercial terms that `accept_licence` does not accept, is
    skipped, and each row says why. `frames` are those whose faces are compared; `det_size` is the challenge's. `batch`
    frames, or pairs of frames, go through a network at once, whichever of the `pool.batch_size` videos they are of.
    """

    pack: str = "insightface/models/buffalo_l"
    det_size: int = Field(320, ge=32, multiple_of=32)
    det_threshold: Unit = 0.5
    frames: int = Field(16, ge=1)
    metrics: tuple[str, ...] = NAMES
    accept_licence: bool = False
    curricular_face: str = "glint360k_curricular_face_r101_backbone.bin"
    inception: str = "inception_v3_google-0cc3c7bd.pth"
    retina_face: str = "retinaface_resnet50_2020-07-20-f168fae3c.zip"
    resnet_face: str = "resnet18_110.pth"
    vi_clip: str = "ViClip-InternVid-10M-FLT.pth"
    clip_b32: str = "clip-vit-base-patch32"
    clip_b16: str = "clip-vit-base-patch16"
    clip_l14: str = "clip-vit-large-patch14"
    aesthetic_head: str = "sa_0_4_vit_l_14_linear.pth"
    musiq: str = "musiq_spaq_ckpt-358bb6af.pth"
    amt: str = "amt-s.pth"
    raft: str = "raft_large_C_T_V1-22a6c225.pth"
    gme: str = "gme-Qwen2-VL-2B-Instruct"
    clip_swapped: bool = True
    detector_side: int = Field(2048, ge=64, multiple_of=32)
    flow_iterations: int = Field(20, ge=1)
    gme_tokens: tuple[int, int] = (256, 1280)
    batch: int = Field(2, ge=1)

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in NAMES:
                raise ValueError(f"metrics names {name!r}, which is none of {', '.join(NAMES)}{nearest(name, NAMES)}")
        return tuple(name for name in NAMES if name in value)
