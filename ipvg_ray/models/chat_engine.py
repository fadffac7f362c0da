"""The small interface between what asks a chat model and what runs it. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Message = dict[str, str]
"""A chat message: `role` (`system`, `user`, `assistant`) and `content`."""


class ChatFolderError(ValueError):
    """A folder that does not hold a chat model as transformers saves it."""


@dataclass(frozen=True)
class Answer:
    """What a chat model wrote.

    Attributes:
        text: without control tokens.
        finished: the model ended it itself; False where `max_new_tokens` did.
        prompt_tokens, new_tokens: lengths; the ending control token counts as new.
    """

    text: str
    finished: bool
    prompt_tokens: int
    new_tokens: int


class PromptTooLongError(ValueError):
    """A conversation that leaves no room for its answer.

    Args:
        tokens: length of the conversation.
        limit: the most it may have, which is the context without the answer's `max_new_tokens`.
        context: tokens the model can attend to.
    """

    def __init__(self, tokens: int, limit: int, context: int) -> None:
        super().__init__(
            f"the prompt has {tokens} tokens and may have {limit}: the model's context of {context} tokens must also "
            f"hold the {context - limit} of the answer; shorten the prompt or use a model with a longer context"
        )
        self.tokens = tokens
        self.limit = limit


class ChatEngine(Protocol):
    """What a stage asks of a chat model, whatever runs it."""

    def check(self, conversation: Sequence[Message], max_new_tokens: int) -> int:
        """Tokens of the conversation.

        Raises:
            PromptTooLongError: where it and the answer exceed the model's context.
        """
        ...

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        seeds: Sequence[int],
        *,
        temperature: float,
        top_p: float,
        max_new_tokens: int,
    ) -> list[Answer]:
        """One answer per conversation, in order. An answer depends on its conversation and seed, not on the others.

        Args:
            seeds: one per conversation, in [0, 2^63).
            temperature: 0 takes the likeliest token each time.
            top_p: share of the probability, in (0, 1], whose likeliest tokens are drawn from.

        Raises:
            PromptTooLongError: where any conversation fails `check`.
        """
        ...
