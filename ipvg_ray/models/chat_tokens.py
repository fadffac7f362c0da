"""Conversations as token ids, in which the text of a message can never become a control token.

A chat template puts messages between control tokens such as `<|im_end|>`. Tokenizing the rendered text would read such
words inside a message as control tokens too, and `split_special_tokens` does not cover `<think>`, which Qwen3 adds as
an ordinary token. So control tokens come from the template alone, and a tokenizer that has none encodes all other text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ipvg_ray.models.chat_engine import ChatFolderError, Message, PromptTooLongError, Question, Sampling


class ChatTokenizer:
    """Tokenizer and chat template of a model folder in the Hugging Face format.

    Args:
        folder: with `tokenizer.json` and a chat template.

    Raises:
        ChatFolderError: where one of them is missing.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer
        from transformers import AutoTokenizer

        if not (folder / "tokenizer.json").is_file():
            raise ChatFolderError(f"{folder} holds no tokenizer.json; give the folder of a Qwen3 model")
        self.folder = folder
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if not self.tokenizer.chat_template:
            raise ChatFolderError(f"{folder} holds no chat template; use an instruction-tuned model")
        description = json.loads(self.tokenizer.backend_tokenizer.to_str())
        self._control: dict[str, int] = {
            str(token["content"]): int(token["id"]) for token in description["added_tokens"]
        }
        description.update(added_tokens=[], truncation=None, padding=None, post_processor=None)
        self._text_only = Tokenizer.from_str(json.dumps(description))
        self._render = cache(self._render_uncached)

    def __len__(self) -> int:
        """Tokens that have a text; the model's embedding may have more rows."""
        return len(self.tokenizer)

    def encode(self, conversation: Sequence[Message], *, picture: bool = False) -> list[int]:
        """Ids of the conversation up to where the answer begins, thinking switched off.

        The same as tokenizing the rendered template, save that control tokens in a message's text stay text.

        Args:
            picture: whether a picture stands before the last message's text; the template's control tokens for one are
                put there.
        """
        # Lone surrogates, which no tokenizer takes, become question marks.
        contents = [message["content"].encode("utf-8", "replace").decode() for message in conversation]
        ids: list[int] = []
        for piece in self._render(tuple(message["role"] for message in conversation), picture):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                text = _SLOT.sub(lambda slot: contents[int(slot[1])], piece)
                ids += self._text_only.encode(text, add_special_tokens=False).ids
        return ids

    def encode_within(self, question: Question, sampling: Sampling, context: int) -> list[int]:
        """Ids of a question that leaves room for its answer in `context` tokens; a picture counts as one.

        Raises:
            PromptTooLongError: where it does not.
        """
        ids = self.encode(question.messages, picture=question.picture is not None)
        limit = context - sampling.max_new_tokens
        if len(ids) > limit:
            raise PromptTooLongError(len(ids), limit, context)
        return ids

    def end_ids(self) -> list[int]:
        """Ids that end an answer: those the folder's generation config names, and the tokenizer's."""
        file = self.folder / "generation_config.json"
        named = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        ids = [named] if isinstance(named, int) else list(named or ())
        if (own := self.tokenizer.eos_token_id) is not None and own not in ids:
            ids.append(own)
        if not ids:
            raise ChatFolderError(f"{self.folder} names no token that ends an answer (eos_token_id)")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer, without control tokens; bytes that are no UTF-8 become U+FFFD."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _render_uncached(self, roles: tuple[str, ...], picture: bool) -> list[str | int]:
        """The template for these roles: control ids, and texts with a slot for each message's content."""
        messages: list[dict[str, Any]] = [
            {"role": role, "content": f"{_OPEN}{i}{_CLOSE}"} for i, role in enumerate(roles)
        ]
        if picture:
            messages[-1]["content"] = [{"type": "image"}, {"type": "text", "text": messages[-1]["content"]}]
        rendered = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        if sorted(int(i) for i in _SLOT.findall(rendered)) != list(range(len(roles))):
            raise ChatFolderError(f"the chat template of {self.folder} leaves out or repeats a message of {roles}")
        words = sorted(self._control, key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, words))})", rendered)
        return [self._control.get(piece, piece) for piece in pieces if piece]


_OPEN, _CLOSE = "\ue000", "\ue001"  # private-use characters, which no template holds
_SLOT = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
