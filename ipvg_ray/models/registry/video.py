"""Video models."""

from __future__ import annotations

from ipvg_ray.models.registry.rows import APACHE, HubSource, Model

_WAN_PARTS = ("model_index.json", "scheduler/*", "text_encoder/*", "tokenizer/*", "transformer/*", "vae/*", "LICENSE*")
_WAN_NEEDS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/*.safetensors",
    "tokenizer/tokenizer_config.json",
    "transformer/*.safetensors",
    "vae/*.safetensors",
)

MODELS: tuple[Model, ...] = (
    Model(
        name="Wan2.1-VACE-14B-diffusers",
        used_by=("video.model",),
        purpose="first frame, mask and prompt to video",
        source=HubSource("Wan-AI/Wan2.1-VACE-14B-diffusers", _WAN_PARTS),
        approx_bytes=81_200_000_000,
        licence=APACHE,
        needs=_WAN_NEEDS,
        verified="repository as the diffusers documentation names it; size as a mirror's page lists it (the "
        "transformer is stored in float32)",
        unverified="the original repository's own page",
    ),
    Model(
        name="Wan2.1-VACE-1.3B-diffusers",
        used_by=(),
        purpose="the small VACE, for `--set video.model=Wan2.1-VACE-1.3B-diffusers` and the paper's ablation",
        source=HubSource("Wan-AI/Wan2.1-VACE-1.3B-diffusers", _WAN_PARTS),
        approx_bytes=19_040_000_000,
        licence=APACHE,
        needs=_WAN_NEEDS,
        verified="repository as the diffusers documentation names it; file names and size as a project that pins them "
        "lists them",
        unverified="the original repository's own page",
    ),
    Model(
        name="Wan2.2-TI2V-5B-Diffusers",
        used_by=(),
        purpose="first frame and prompt to video at 1280×704, for `--set video.task=ti2v-5B`",
        source=HubSource("Wan-AI/Wan2.2-TI2V-5B-Diffusers", _WAN_PARTS),
        approx_bytes=34_200_000_000,
        licence=APACHE,
        needs=_WAN_NEEDS,
        verified="repository as the diffusers documentation names it",
        unverified="the repository's own page; size computed from the parameters, the transformer in float32",
    ),
    Model(
        name="Wan2.2-I2V-A14B-Diffusers",
        used_by=(),
        purpose="first frame and prompt to video with two experts, for `--set video.task=i2v-A14B`",
        source=HubSource("Wan-AI/Wan2.2-I2V-A14B-Diffusers", (*_WAN_PARTS, "transformer_2/*")),
        approx_bytes=126_200_000_000,
        licence=APACHE,
        needs=(*_WAN_NEEDS, "transformer_2/*.safetensors"),
        verified="repository as the diffusers documentation names it",
        unverified="the repository's own page; size computed from the parameters, both transformers in float32",
    ),
    Model(
        name="wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors",
        used_by=(),
        purpose="VACE-14B in 4 steps without guidance, for profile fast (`video.loras`); lossy",
        source=HubSource(
            "lightx2v/Wan2.1-Distill-Loras",
            ("wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors",),
            subpath="wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors",
        ),
        approx_bytes=631_000_000,
        licence=APACHE,
        needs=(),
        verified="repository, file name and size as its page lists them",
        unverified="the licence: the page of its sister for Wan2.2 says Apache-2.0",
    ),
)
