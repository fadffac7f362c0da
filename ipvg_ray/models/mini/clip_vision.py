"""A miniature CLIP vision model with the published preprocessing, for pictures of 56×56: 17 tokens of 32 channels."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ipvg_ray.models.quiet import only_errors

NAME = "mini-clip-vision"

_SIDE = 56


def make(root: Path, seed: int = 0) -> None:
    """Write `<root>/mini-clip-vision`, a transformers CLIPVisionModel folder; the same seed gives the same bytes."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=_SIDE,
        patch_size=14,
        initializer_factor=4.0,  # at 1 a random network sees hardly a difference between two faces
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPVisionModel(config).eval()
    with only_errors():
        model.save_pretrained(root / NAME)
    write_processor(root / NAME, _SIDE)


def write_processor(folder: Path, side: int) -> None:
    """Write CLIP's preprocessing for pictures of side×side as published folders have it: plain sizes, 3 for bicubic."""
    processor = {
        "crop_size": side,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": side,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
