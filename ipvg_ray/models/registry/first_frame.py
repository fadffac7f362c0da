"""Models of the first frame: SDXL, HyperLoRA and its face encoders."""

from __future__ import annotations

from ipvg_ray.models.registry.rows import APACHE, CLIP, HYPERLORA, OPENRAIL, HubSource, Licence, Model

_SDXL_CONFIGS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "unet/config.json",
    "vae/config.json",
)
_HYPERLORA_FILES = (
    "hyper_lora_modules.json",
    "hyper_lora_modules.safetensors",
    "id_projector.safetensors",
    "resampler.safetensors",
)
_MIT = Licence(
    "MIT",
    "everyone, commercially too",
    True,
    "https://huggingface.co/madebyollin/sdxl-vae-fp16-fix/blob/main/README.md",
)

MODELS: tuple[Model, ...] = (
    Model(
        name="RealVisXL_V4.0.safetensors",
        used_by=("first_frame.checkpoint",),
        purpose="the SDXL checkpoint that draws the first frame: one file, VAE included",
        source=HubSource(
            "SG161222/RealVisXL_V4.0", ("RealVisXL_V4.0.safetensors",), subpath="RealVisXL_V4.0.safetensors"
        ),
        approx_bytes=6_940_000_000,
        licence=OPENRAIL,
        needs=(),
        verified="repository, file name, size and licence tag as its page lists them",
    ),
    Model(
        name="stable-diffusion-xl-base-1.0",
        used_by=("first_frame.checkpoint_config",),
        purpose="SDXL's configurations and its two tokenizers, without which a single file cannot be loaded offline",
        source=HubSource(
            "stabilityai/stable-diffusion-xl-base-1.0",
            (*_SDXL_CONFIGS, "tokenizer/*", "tokenizer_2/*", "LICENSE.md"),
        ),
        approx_bytes=3_200_000,
        licence=OPENRAIL,
        needs=(*_SDXL_CONFIGS, "tokenizer/vocab.json", "tokenizer_2/vocab.json"),
        verified="repository, folders, tokenizer files and licence tag as its page lists them",
    ),
    Model(
        name="sdxl_hyper_id_lora_v1_fidelity",
        used_by=("first_frame.hyperlora",),
        purpose="HyperLoRA: makes the LoRA weights of one identity from its face",
        source=HubSource(
            "bytedance-research/HyperLoRA",
            ("sdxl_hyper_id_lora_v1_fidelity/*",),
            subpath="sdxl_hyper_id_lora_v1_fidelity",
        ),
        approx_bytes=3_140_000_000,
        licence=HYPERLORA,
        needs=_HYPERLORA_FILES,
        verified="repository and file names as several projects download them; folders, total size of both variants "
        "(6.28 GB) and licence tag as a mirror's page lists them",
        unverified="the original repository's own page",
    ),
    Model(
        name="clip-vit-large-patch14",
        used_by=("first_frame.clip_vision", "evaluate.clip_l14"),
        purpose="CLIP ViT-L/14: face features for HyperLoRA, and aesthetic_quality; only the vision half is loaded",
        source=HubSource(
            "openai/clip-vit-large-patch14", ("config.json", "preprocessor_config.json", "model.safetensors")
        ),
        approx_bytes=1_710_000_000,
        licence=CLIP,
        needs=("config.json", "preprocessor_config.json", "model.safetensors"),
        verified="repository and file names as several projects download them; size as a copy's page lists it",
        unverified="a licence on the weights' own page: the card names none, the code's repository says MIT",
    ),
    Model(
        name="sdxl_hyper_id_lora_v1_edit",
        used_by=(),
        purpose="HyperLoRA's other variant: follows the prompt more and the face less; set first_frame.hyperlora to it",
        source=HubSource(
            "bytedance-research/HyperLoRA", ("sdxl_hyper_id_lora_v1_edit/*",), subpath="sdxl_hyper_id_lora_v1_edit"
        ),
        approx_bytes=3_140_000_000,
        licence=HYPERLORA,
        needs=_HYPERLORA_FILES,
        verified="total size of both variants (6.28 GB) and licence tag as a mirror's page lists them",
        unverified="the original repository's own page",
    ),
    Model(
        name="sdxl-vae-fp16-fix",
        used_by=(),
        purpose="SDXL's VAE for float16: first_frame.vae, with first_frame.vae_dtype=float16, halves the VAE's memory",
        source=HubSource("madebyollin/sdxl-vae-fp16-fix", ("config.json", "diffusion_pytorch_model.safetensors")),
        approx_bytes=335_000_000,
        licence=_MIT,
        needs=("config.json", "diffusion_pytorch_model.safetensors"),
        verified="repository and licence tag as its card lists them",
        unverified="its file names and size",
    ),
    Model(
        name="nsfw_image_detection",
        used_by=(),
        purpose="picture classifier with the labels normal and nsfw, for first_frame.safety_model",
        source=HubSource(
            "Falconsai/nsfw_image_detection", ("config.json", "preprocessor_config.json", "model.safetensors")
        ),
        approx_bytes=343_000_000,
        licence=APACHE,
        needs=("config.json", "preprocessor_config.json", "model.safetensors"),
        verified="repository, labels and licence as several pages list them",
        unverified="its own page, file names and size",
    ),
)
