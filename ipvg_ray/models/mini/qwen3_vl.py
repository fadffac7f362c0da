"""A miniature random Qwen3-VL: architecture, picture preparation, tokenizer and chat template as in the real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ipvg_ray.models.mini.qwen3 import CONTEXT, CONTROL_TOKENS, EMBEDDINGS, make_tokenizer
from ipvg_ray.models.quiet import no_bars

NAME = "mini-qwen3-vl"

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'text' %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""ChatML with pictures in place. Qwen3-VL-Instruct does not think, so nothing switches it off."""


def make(root: Path, seed: int = 0) -> None:
    """Write `<root>/mini-qwen3-vl`: a Qwen3VLForConditionalGeneration folder. Same seed, same bytes.

    Args:
        root: the models' folder; made where it is missing.
        seed: of the random weights; the tokenizer does not depend on it.
    """
    folder = Path(root) / NAME
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer((*CONTROL_TOKENS, *VISION_TOKENS), CHAT_TEMPLATE)
    tokenizer.save_pretrained(folder)
    with no_bars():
        _model(tokenizer, seed).save_pretrained(folder)
    for name, kind in (
        ("preprocessor_config", "image_processor_type"),
        ("video_preprocessor_config", "video_processor_type"),
    ):
        described = {
            kind: "Qwen2VLImageProcessorFast" if kind.startswith("image") else "Qwen3VLVideoProcessor",
            "processor_class": "Qwen3VLProcessor",
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "size": {"shortest_edge": 32 * 32, "longest_edge": 256 * 256},
        }
        (folder / f"{name}.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")


def _model(tokenizer: Any, seed: int) -> Any:
    import torch
    from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in VISION_TOKENS}
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    text = {
        "vocab_size": EMBEDDINGS,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        # Three axes of a picture's tokens (time, height, width) share the 16 frequencies.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5_000_000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "bos_token_id": pad,
        "eos_token_id": end,
        "pad_token_id": pad,
        "dtype": "float32",
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
        "initializer_range": 0.2,
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.8,
        top_k=20,
        bos_token_id=pad,
        eos_token_id=[end, pad],
        pad_token_id=pad,
    )
    return model
