"""Prompts for SDXL as ComfyUI reads them: any length, in chunks of 75 tokens, and words that weigh more or less.

`(red dress:1.3)` gives words a weight, `(red dress)` one of 1.1; inside, the same again. A bracket that is meant as
such is written `\\(`. Weights are applied as AUTOMATIC1111's web UI does, after the "length+mean" normalisation of the
ComfyUI node that the method was released with (BlenderNeko/ComfyUI_ADV_CLIP_emb).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

_LONG_WORD = 8
"""Tokens from which a word may be cut at a chunk's end; shorter ones move to the next chunk whole."""

_BRACKET_WEIGHT = 1.1
_ESCAPED = {"\\(": "\ue000", "\\)": "\ue001"}  # private characters: no text has a use for them


class TextStates(NamedTuple):
    """What the UNet reads of a text: states (1, 77·chunks, channels) of both encoders, and pooled (1, projection)."""

    states: torch.Tensor
    pooled: torch.Tensor


class Word(NamedTuple):
    """A word of a prompt: its tokens, and the weight that it was given."""

    tokens: tuple[int, ...]
    weight: float


class Chunks(NamedTuple):
    """A tokenized prompt.

    Attributes:
        ids: token ids, (chunks, 77), each row between a beginning and an end mark and padded as the tokenizer pads.
        weights: float32 (chunks, 77), of each token; 1 for marks and padding.
    """

    ids: torch.Tensor
    weights: torch.Tensor


def weighted_parts(text: str) -> list[tuple[str, float]]:
    """The prompt's parts and their weights; the brackets and numbers are taken off.

    An explicit number counts alone, as in ComfyUI: in `(a (b:1.2):1.5)`, b weighs 1.2. Brackets that are never closed
    or never opened are text.
    """
    for escaped, private in _ESCAPED.items():
        text = text.replace(escaped, private)
    parts = _parts(text, 1.0)
    backwards = {ord(private): escaped[1] for escaped, private in _ESCAPED.items()}
    return [(part.translate(backwards), weight) for part, weight in parts if part]


def _parts(text: str, weight: float) -> list[tuple[str, float]]:
    result: list[tuple[str, float]] = []
    rest = text
    while span := _outermost(rest):
        start, end = span
        inner, number = _number(rest[start + 1 : end])
        result.append((rest[:start], weight))
        result += _parts(inner, weight * _BRACKET_WEIGHT if number is None else number)
        rest = rest[end + 1 :]
    return [*result, (rest, weight)]


def _outermost(text: str) -> tuple[int, int] | None:
    """Places of the first opening bracket that is closed, and of its closing one."""
    opened: list[int] = []
    pairs = []
    for place, letter in enumerate(text):
        if letter == "(":
            opened.append(place)
        elif letter == ")" and opened:
            pairs.append((opened.pop(), place))
    return min(pairs, default=None)


def _number(inner: str) -> tuple[str, float | None]:
    match = re.fullmatch(r"(.*):\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*", inner, re.DOTALL)
    return (match[1], float(match[2])) if match else (inner, None)


def chunks(tokenizer: Any, text: str) -> Chunks:
    """Tokens of a text of any length, at least one chunk, with their normalised weights."""
    words = [
        Word(tuple(tokenizer(word, add_special_tokens=False, verbose=False).input_ids), weight)
        for part, weight in weighted_parts(text)
        for word in part.split()
    ]
    room = tokenizer.model_max_length - 2
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    normalised = _normalised(words)
    rows = list(_packed(words, room))
    ids = [[begin, *(t for t, _ in row), end, *[pad] * (room - len(row))] for row in rows]
    weights = [[1.0, *(normalised[w] for _, w in row), 1.0, *[1.0] * (room - len(row))] for row in rows]
    return Chunks(torch.tensor(ids), torch.tensor(weights, dtype=torch.float32))


def _packed(words: Sequence[Word], room: int) -> Iterator[list[tuple[int, int]]]:
    """The chunks' tokens, each with the number of its word."""
    row: list[tuple[int, int]] = []
    for number, word in enumerate(words):
        tokens = [(token, number) for token in word.tokens]
        while len(row) + len(tokens) > room:
            cut = room - len(row) if len(word.tokens) >= _LONG_WORD else 0
            yield row + tokens[:cut]
            row, tokens = [], tokens[cut:]
        row = row + tokens
    yield row


def _normalised(words: Sequence[Word]) -> list[float]:
    """One weight per word. "length": a word of n tokens moves each by 1/√n of its distance from 1, so that long words
    do not count for more; "mean": all are shifted until the tokens' mean is 1, so that emphasis is relative."""
    moved = [1 + (word.weight - 1) / max(len(word.tokens), 1) ** 0.5 for word in words]
    total = sum(len(word.tokens) for word in words)
    if not total:
        return moved
    mean = sum(weight * len(word.tokens) for weight, word in zip(moved, words, strict=True)) / total
    return [weight + 1 - mean for weight in moved]


class TextEncoder:
    """SDXL's two text encoders with their tokenizers.

    Args:
        pipeline: a loaded `StableDiffusionXLPipeline`.
        device: where the encoders compute.
        clip_skip: which layer's states are read, counted from the last, 1; SDXL was trained on 2.
    """

    def __init__(self, pipeline: Any, device: str, clip_skip: int = 2) -> None:
        self.pipeline = pipeline
        self.device = device
        self.clip_skip = clip_skip

    @torch.no_grad()
    def __call__(self, text: str) -> TextStates:
        """Encode a text of any length: the chunks' states one after another; pooled is the first chunk's, unweighted.

        Raises:
            ValueError: where the two tokenizers cut it into different numbers of chunks.
        """
        one, two = (chunks(t, text) for t in (self.pipeline.tokenizer, self.pipeline.tokenizer_2))
        if one.ids.shape != two.ids.shape:
            raise ValueError("the checkpoint's two tokenizers do not belong together: they cut a prompt differently")
        first, _ = self._states(self.pipeline.text_encoder, one)
        second, output = self._states(self.pipeline.text_encoder_2, two)
        return TextStates(torch.cat([first, second], dim=-1), output.text_embeds[:1])

    def _states(self, encoder: Any, text: Chunks) -> tuple[torch.Tensor, Any]:
        output = encoder(text.ids.to(self.device), output_hidden_states=True)
        plain = output.hidden_states[-self.clip_skip].flatten(0, 1)[None]
        if bool((text.weights == 1).all()):
            return plain, output
        # In float32: the mean of numbers that nearly cancel out would be noise in half precision.
        base = plain.float()
        weighted = base * text.weights.to(self.device).flatten()[None, :, None]
        return (weighted * (base.mean() / weighted.mean())).to(plain.dtype), output
