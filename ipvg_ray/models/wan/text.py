"""UMT5's states of prompts, apart from the video model: encoded once, kept without their padding."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_TOKENS = 512
"""What Wan was trained with: longer prompts are cut, shorter ones padded with zero states."""


class TextEncoder:
    """UMT5 with its tokenizer. The states of the last `kept` different texts are remembered.

    One text at a time is encoded, padded as in training, so that no result depends on what else is in a batch.

    Args:
        tokenizer, model: of transformers.
        kept: how many texts; the negative prompt and those that several faces share are encoded once.
    """

    def __init__(self, tokenizer: Any, model: Any, kept: int = 256) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._size = kept

    def states(self, text: str) -> Tensor:
        """States of a text, (tokens, channels), in the model's dtype, on the CPU."""
        if text not in self._kept:
            self._kept[text] = self._encode(text)
            if len(self._kept) > self._size:
                self._kept.popitem(last=False)
        self._kept.move_to_end(text)
        return self._kept[text]

    @torch.no_grad()
    def _encode(self, text: str) -> Tensor:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        text = prompt_clean(text)
        count = len(self.tokenizer(text).input_ids)
        if count > MAX_TOKENS:
            logger.warning("a prompt of %d tokens is cut to %d: %.60s…", count, MAX_TOKENS, text)
        tokens = self.tokenizer(
            [text], padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        ).to(self.model.device)
        states = self.model(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return states[0, : int(tokens.attention_mask.sum())].cpu()


def padded(states: Tensor) -> Tensor:
    """What the network wants of (tokens, channels): (512, channels), zero behind the text's end."""
    return torch.cat([states, states.new_zeros(MAX_TOKENS - len(states), states.shape[1])])


def pack(states: Tensor) -> bytes:
    """States as safetensors bytes, dtype and shape kept."""
    return save({"states": states.contiguous()})


def unpack(data: bytes) -> Tensor:
    """What `pack` was given."""
    return load(data)["states"]
