"""A small CLIP tokenizer: byte-level BPE over lower-cased words with an end-of-word mark, in the published files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

LENGTH = 77
"""Tokens that CLIP's text encoders read at a time, beginning and end among them."""

Pair = tuple[str, str]

_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = (
    "a an the man woman person in on at with and of to is he she his her face eyes hair smile smiles looks wearing "
    "fcsks fxhks fhyks close up photo photograph portrait realistic soft light lighting background park street room "
    "shirt dress coat suit hat black white red blue green grey dark warm sharp focus depth field studio outdoor night "
    "blurry deformed anatomy extra fingers limbs text watermark signature low quality jpeg artifacts nudity hidden no"
)


def write_clip_tokenizer(folder: Path, pad: str) -> int:
    """Write vocab.json, merges.txt and the two configuration files, without a tokenizer.json as SDXL has none.

    The vocabulary is CLIP's in small: every byte ("!" is 0), every byte ending a word, merges, then the two special
    tokens, so that any text can be encoded. The merges make a list of words one token each.

    Args:
        folder: made where it is missing.
        pad: the padding token: the end mark in SDXL's first tokenizer, "!" in its second.

    Returns:
        The vocabulary's size.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    folder.mkdir(parents=True, exist_ok=True)
    letters = list(bytes_to_unicode().values())
    merges = list(_merges(_WORDS.split()))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), _BEGIN, _END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    special = {"bos_token": _BEGIN, "eos_token": _END, "unk_token": _END, "pad_token": pad}
    settings = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": LENGTH,
        "tokenizer_class": "CLIPTokenizer",
        **special,
    }
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", settings)
    return len(vocabulary)


def _merges(words: Iterable[str]) -> dict[Pair, int]:
    """Pairs to join and their rank, so that each of the words ends as one token."""
    ranks: dict[Pair, int] = {}
    for word in words:
        while len(parts := _joined(word, ranks)) > 1:
            ranks[parts[0], parts[1]] = len(ranks)
    return ranks


def _joined(word: str, ranks: Mapping[Pair, int]) -> list[str]:
    """What byte-pair encoding makes of a word: the pair of the lowest rank is joined until none is left."""
    parts = [*word[:-1], f"{word[-1]}</w>"]
    while known := [pair for pair in pairwise(parts) if pair in ranks]:
        at = list(pairwise(parts)).index(min(known, key=lambda pair: ranks[pair]))
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    return parts


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
