"""What makes a transformer faster: attention kernels, compiled blocks, weights in 8 bits.

Attention kernels and compilation change results by rounding only. 8-bit storage loses precision of the weights.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

logger = logging.getLogger(__name__)


def best_attention(capability: tuple[int, int] | None, installed: Callable[[str], bool] | None = None) -> str:
    """diffusers' name of the fastest exact attention for a card with what is installed.

    FlashAttention-3 is for Hopper (9.0); elsewhere FlashAttention-2 from Ampere (8.0) on; else torch's own, which takes
    cuDNN's or its own flash kernels by itself. Sage is not exact and never chosen.

    Args:
        capability: the card's CUDA compute capability; None on a CPU.
        installed: whether a module can be imported.
    """
    there = installed or (lambda name: importlib.util.find_spec(name) is not None)
    if capability is None:
        return "native"
    if capability[0] == 9 and there("flash_attn_interface"):
        return "_flash_3"
    if capability >= (8, 0) and there("flash_attn"):
        return "flash"
    return "native"


def speed_up(
    transformers: Sequence[Any],
    *,
    attention: str = "auto",
    compiled: bool = False,
    storage: Literal["dtype", "fp8"] = "dtype",
) -> None:
    """Make transformers faster, in place.

    Args:
        attention: diffusers' name of a backend, or `auto` for `best_attention`.
        compiled: compile the repeated blocks; the first step of each size then takes a minute or more.
        storage: `fp8` keeps the weights of all but embeddings and norms as float8_e4m3fn, in half of bfloat16's memory,
            and casts them layer by layer when they are used.

    Raises:
        ValueError: for a backend that diffusers does not know.
        RuntimeError, ImportError: for one whose package or card is not there.
    """
    for transformer in transformers:
        if storage == "fp8":
            transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=transformer.dtype)
        backend = attention
        if attention == "auto":
            on_card = transformer.device.type == "cuda"
            backend = best_attention(torch.cuda.get_device_capability(transformer.device) if on_card else None)
        if (attention, backend) != ("auto", "native"):  # what it has already
            transformer.set_attention_backend(backend)
        if compiled:
            transformer.compile_repeated_blocks(fullgraph=True)
    logger.info("attention %s, compiled %s, storage %s", attention, compiled, storage)
