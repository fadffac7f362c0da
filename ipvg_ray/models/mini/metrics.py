"""Miniatures of the networks that the metrics score with: published names, few channels, random weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ipvg_ray.metrics.nets import amt, curricular_face, inception, musiq, raft, resnet_face, retina_face, vi_clip
from ipvg_ray.models.mini.clip_tokenizer import LENGTH, write_clip_tokenizer
from ipvg_ray.models.mini.clip_vision import write_processor
from ipvg_ray.models.mini.qwen3 import CONTEXT, CONTROL_TOKENS, EMBEDDINGS, make_tokenizer
from ipvg_ray.models.mini.qwen3_vl import VISION_TOKENS
from ipvg_ray.models.quiet import no_bars, only_errors

CLIP, GME = "mini-clip", "mini-gme"
_SIDE, _PATCH, _FEATURES = 56, 14, 24


def make(root: Path, seed: int = 0) -> None:
    """Write them below `root`; the same seed gives the same bytes."""
    root.mkdir(parents=True, exist_ok=True)
    vocabulary = _clip(root / CLIP, seed)
    sizes = vi_clip.ViClipSizes(_SIDE, _PATCH, 8, 32, 2, 32, 2, vocabulary, 32, _FEATURES)
    nets: dict[str, Any] = {
        "mini-curricular-face.bin": lambda: curricular_face.CurricularFace(4, 32, (1, 1, 1, 1)),
        "mini-inception.pth": lambda: inception.InceptionV3(1),
        "mini-retina-face.pth": lambda: retina_face.RetinaFace(4, 16),
        "mini-resnet-face.pth": lambda: resnet_face.ResNetFace(4, 16),
        "mini-vi-clip.pth": lambda: vi_clip.ViClip(sizes),
        "mini-aesthetic-head.pth": lambda: nn.Linear(_FEATURES, 1),
        "mini-musiq.pth": lambda: musiq.Musiq(musiq.MusiqSizes(tokens=32, hidden=32, mlp=64, layers=2)),
        "mini-amt.pth": lambda: amt.AmtS(1),
        "mini-raft.pth": lambda: raft.Raft(8),
    }
    for number, (name, build) in enumerate(nets.items()):
        with torch.device("meta"):
            net = build()
        generator = torch.Generator().manual_seed(seed + number)
        state = {key: _value(key, value.shape, generator) for key, value in net.state_dict().items()}
        for key in state:  # RAFT holds the norm of a shortcut under two names
            if ".downsample.1." in key and (other := key.replace(".downsample.1.", ".norm3.")) in state:
                state[other] = state[key]
        torch.save(state, root / name)
    _gme(root / GME, seed)


def _value(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    kind = name.rpartition(".")[2]
    if kind == "num_batches_tracked":
        return torch.zeros((), dtype=torch.long)
    if len(shape) >= 2:
        return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
    return torch.ones(shape) if kind in ("weight", "running_var") else torch.zeros(shape)


def _clip(folder: Path, seed: int) -> int:
    """A whole CLIP, both halves; returns the size of its vocabulary."""
    from transformers import CLIPConfig, CLIPModel

    vocabulary = write_clip_tokenizer(folder, pad="<|endoftext|>")
    both = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    both["projection_dim"] = _FEATURES
    ids = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    config = CLIPConfig(
        text_config={**both, "vocab_size": vocabulary, "max_position_embeddings": LENGTH, **ids},
        vision_config={**both, "image_size": _SIDE, "patch_size": _PATCH},
        projection_dim=_FEATURES,
        logit_scale_init_value=math.log(100),
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config).eval()
    with only_errors():
        model.save_pretrained(folder)
    write_processor(folder, _SIDE)
    return vocabulary


def _gme(folder: Path, seed: int) -> None:
    """A Qwen2-VL, which GME is a fine-tuned one of."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer((*CONTROL_TOKENS, *VISION_TOKENS), "")
    tokenizer.save_pretrained(folder)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in VISION_TOKENS}
    text = {
        "vocab_size": EMBEDDINGS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [2, 3, 3]},
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config={**vision, "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.2},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config).eval()
    with no_bars():
        model.save_pretrained(folder)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 3136,
        "max_pixels": 1003520,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2, sort_keys=True) + "\n")
