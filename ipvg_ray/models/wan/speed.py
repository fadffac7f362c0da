"""What makes a transformer faster: attention kernels, compiled blocks, weights in 8 bits.

Attention kernels and compilation change results by rounding only. 8-bit weights lose precision, 8-bit products more.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from ipvg_ray.models.wan.errors import WanError

Storage = Literal["dtype", "fp8", "fp8_scaled", "fp8_matmul"]
_HEAVY = re.compile(r"(vace_)?blocks\.\d+\.(attn1|attn2|ffn)\.")
"""Nearly all weights and work. Embeddings, modulation, norms and what passes hints on stay as they are."""
_FP8_CARD = (8, 9)
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
    storage: Storage = "dtype",
) -> None:
    """Make transformers faster, in place.

    Args:
        attention: diffusers' name of a backend, or `auto` for `best_attention`.
        compiled: compile the repeated blocks; the first step of each size then takes a minute or more.
        storage: `fp8` keeps the weights of all but embeddings and norms as float8_e4m3fn, in half of bfloat16's memory,
            and casts them layer by layer when they are used. `fp8_scaled` has a scale for each row beside them, which
            loses less; `fp8_matmul` brings the inputs to 8 bits too, and multiplies so. Both are torchao's.

    Raises:
        WanError: for a storage that torchao or the card is missing for.
        ValueError: for a backend that diffusers does not know.
        RuntimeError, ImportError: for one whose package or card is not there.
    """
    for transformer in transformers:
        if storage == "fp8":
            transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=transformer.dtype)
        elif storage != "dtype":
            _quantize(transformer, storage)
        backend = attention
        if attention == "auto":
            on_card = transformer.device.type == "cuda"
            backend = best_attention(torch.cuda.get_device_capability(transformer.device) if on_card else None)
        if (attention, backend) != ("auto", "native"):  # what it has already
            transformer.set_attention_backend(backend)
        if compiled:
            transformer.compile_repeated_blocks(fullgraph=True)
    logger.info("attention %s, compiled %s, storage %s", attention, compiled, storage)


def _quantize(transformer: Any, storage: Storage) -> None:
    """Bring the linear layers of the blocks to 8 bits with torchao."""
    device = transformer.device
    card = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if storage == "fp8_matmul" and (card is None or card < _FP8_CARD):
        found = f"a card of compute capability {card[0]}.{card[1]}" if card else "no NVIDIA card"
        raise WanError(f"storage fp8_matmul needs compute capability 8.9 or more, and here is {found}; use fp8_scaled")
    if importlib.util.find_spec("torchao") is None:
        raise WanError(f"storage {storage} needs the package torchao: pip install 'ipvg-ray[fp8]', or use storage fp8")
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        PerRow,
        quantize_,
    )

    both = storage == "fp8_matmul"
    config = (Float8DynamicActivationFloat8WeightConfig if both else Float8WeightOnlyConfig)(granularity=PerRow())
    quantize_(transformer, config, lambda module, name: isinstance(module, nn.Linear) and bool(_HEAVY.match(name)))
