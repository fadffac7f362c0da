"""Which chat engine runs, from the configuration of the prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ipvg_ray.models.chat_engine import ChatEngine

if TYPE_CHECKING:
    from ipvg_ray.config import PromptsConfig


def load_engine(settings: PromptsConfig, models: Mapping[str, Path], *, device: str, threads: int) -> ChatEngine:
    """The engine of `prompts.engine` with its model loaded; imports only what it needs.

    Args:
        models: field of the section that names the model, to its folder; empty for an endpoint.
        device: `cpu` or `cuda`.
        threads: that torch may use.
    """
    if settings.engine == "openai":
        from ipvg_ray.models.chat_openai import OpenAIChat

        return OpenAIChat(model=getattr(settings, settings.model_field), **settings.endpoint.model_dump())
    (folder,) = models.values()
    if settings.engine == "vllm":
        from ipvg_ray.models.chat_vllm import VllmChat

        options = settings.vllm.model_dump()
        cards = settings.pool.gpus
        if options["gpu_memory"] is None:
            options["gpu_memory"] = 0.9 * min(1.0, cards or 1.0)
        return VllmChat(
            folder,
            dtype=settings.dtype,
            tensor_parallel=max(1, int(cards)),
            pictures=settings.method == "tpige",
            **options,
        )
    import torch

    torch.set_num_threads(threads)
    if settings.method == "tpige":
        from ipvg_ray.models.chat_vision import VisionChatModel

        return VisionChatModel(folder, dtype=settings.dtype, device=device)
    from ipvg_ray.models.chat import ChatModel

    return ChatModel(folder, dtype=settings.dtype, device=device)
