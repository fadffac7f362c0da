"""Language models."""

from __future__ import annotations

from ipvg_ray.models.registry.rows import APACHE, HubSource, Model

MODELS: tuple[Model, ...] = (
    Model(
        name="Qwen3-8B",
        used_by=("prompts.model",),
        purpose="rewrites the prompt for video and derives the one for the first frame",
        source=HubSource("Qwen/Qwen3-8B", ("*.json", "*.txt", "*.safetensors", "LICENSE*")),
        approx_bytes=16_400_000_000,
        licence=APACHE,
        needs=("config.json", "tokenizer_config.json", "*.safetensors"),
        verified="repository, file names and size as its page lists them; licence",
    ),
    Model(
        name="Qwen3-8B-FP8",
        used_by=(),
        purpose="Qwen3-8B quantised to 8 bits, for `--set prompts.model=Qwen3-8B-FP8` with engine vllm",
        source=HubSource("Qwen/Qwen3-8B-FP8", ("*.json", "*.txt", "*.safetensors", "LICENSE*")),
        approx_bytes=9_450_000_000,
        licence=APACHE,
        needs=("config.json", "tokenizer_config.json", "*.safetensors"),
        verified="that the makers name the quantised models of this family so (Qwen3-30B-A3B-FP8)",
        unverified="the repository itself, its files, size (calculated: 8-bit layers, 16-bit embeddings)",
    ),
    Model(
        name="Qwen3-8B-AWQ",
        used_by=(),
        purpose="Qwen3-8B quantised to 4 bits, for `--set prompts.model=Qwen3-8B-AWQ` with engine vllm",
        source=HubSource("Qwen/Qwen3-8B-AWQ", ("*.json", "*.txt", "*.safetensors", "LICENSE*")),
        approx_bytes=6_100_000_000,
        licence=APACHE,
        needs=("config.json", "tokenizer_config.json", "*.safetensors"),
        verified="that the makers name the quantised models of this family so (Qwen3-32B-AWQ)",
        unverified="the repository itself, its files, size (calculated: 4-bit layers, 16-bit embeddings)",
    ),
    Model(
        name="Qwen3-VL-8B-Instruct",
        used_by=("prompts.vision_model",),
        purpose="method tpige alone: sees the reference picture and describes its face within the prompt",
        source=HubSource("Qwen/Qwen3-VL-8B-Instruct", ("*.json", "*.txt", "*.safetensors", "LICENSE*")),
        approx_bytes=17_500_000_000,
        licence=APACHE,
        needs=("config.json", "preprocessor_config.json", "tokenizer_config.json", "*.safetensors"),
        verified="repository, licence and number of parameters (8.8 billion) as copies of its page list them",
        unverified="size (calculated from the parameters at 16 bits), file names",
    ),
)
