"""The interface between what asks a chat model and what runs it, and the two ways to run it. Imports nothing heavy.

Who asks writes a *dialogue*: a generator that yields questions, is sent answers and returns what it made of them. How
the calls of one sample follow from each other is thereby written once, whatever runs the model: a `BatchEngine` takes
all dialogues forward in step, an `AsyncEngine` each on its own, so that a slow one holds up no other.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

Message = dict[str, str]
"""A chat message: `role` (`system`, `user`, `assistant`) and `content`."""


@dataclass(frozen=True)
class Question:
    """What a chat model is asked.

    Attributes:
        messages: the conversation so far; the last message is the user's.
        seed: in [0, 2^63). The answer depends on question and seed, not on what is asked beside it.
        picture: an encoded picture (PNG or JPEG) that stands before the last message's text, for models that see.
        pattern: a regular expression that the whole answer has to match. Engines that can do so enforce it while they
            write; the others ignore it, and the answer has to be checked in any case.
    """

    messages: Sequence[Message]
    seed: int
    picture: bytes | None = None
    pattern: str | None = None


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the likeliest token each time.
        top_p: share of the probability, in (0, 1], whose likeliest tokens are drawn from.
        max_new_tokens: the most an answer may have.
    """

    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass(frozen=True)
class Answer:
    """What a chat model wrote.

    Attributes:
        text: without control tokens.
        finished: the model ended it itself; False where `max_new_tokens` did.
        prompt_tokens, new_tokens: lengths; the ending control token counts as new.
        cached_tokens: how many of the prompt's tokens were not computed again, since an earlier question began so.
    """

    text: str
    finished: bool
    prompt_tokens: int
    new_tokens: int
    cached_tokens: int = 0


Result = TypeVar("Result")
Dialogue = Generator[Question, Answer, Result]


class ChatFolderError(ValueError):
    """A folder that does not hold a chat model as transformers saves it."""


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


class EngineDiedError(RuntimeError):
    """The process that runs the model is gone: nothing can be asked any more, and a new engine has to be made."""


class EndpointError(RuntimeError):
    """A question that an endpoint did not answer.

    Args:
        message: what happened and what mends it.
        passing: whether it may be otherwise later (busy, not reachable), rather than a refusal.
    """

    def __init__(self, message: str, *, passing: bool) -> None:
        super().__init__(message)
        self.passing = passing


class ChatEngine(Protocol):
    """What runs dialogues. May be called from several threads at a time."""

    def converse(self, dialogues: Sequence[Dialogue[Result]], sampling: Sampling) -> list[Result | Exception]:
        """Run dialogues to their ends.

        What cannot be asked (`PromptTooLongError`, `EndpointError`) is raised inside the dialogue, where it stands.

        Returns:
            What each dialogue returned, in order, or the exception that it ended with.

        Raises:
            EngineDiedError: all is lost, the dialogues with it.
        """
        ...

    def close(self) -> None:
        """Release the model. Nothing may be asked afterwards."""
        ...


class BatchEngine(ABC):
    """An engine that answers a list of questions at a time: dialogues go forward in step.

    Those that ask again do so beside those that are a call ahead. Calls from several threads take turns.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()

    @abstractmethod
    def generate(self, questions: Sequence[Question], sampling: Sampling) -> list[Answer]:
        """One answer per question, in order.

        Raises:
            PromptTooLongError: where any question fails `check`.
        """

    @abstractmethod
    def check(self, question: Question, sampling: Sampling) -> int:
        """Tokens of the question.

        Raises:
            PromptTooLongError: where it and the answer exceed the model's context.
        """

    def converse(self, dialogues: Sequence[Dialogue[Result]], sampling: Sampling) -> list[Result | Exception]:
        """See `ChatEngine.converse`."""
        ends: dict[int, Result | Exception] = {}
        asked: dict[int, Question] = {}
        answers: dict[int, Answer | None] = dict.fromkeys(range(len(dialogues)))
        while answers:
            asked.clear()
            for i, answer in answers.items():
                try:
                    asked[i] = self._forward(dialogues[i], answer, sampling)
                except StopIteration as end:
                    ends[i] = end.value
                except Exception as error:
                    ends[i] = error
            with self._turn:
                new = self.generate(list(asked.values()), sampling) if asked else []
            answers = dict(zip(asked, new, strict=True))
        return [ends[i] for i in range(len(dialogues))]

    def _forward(self, dialogue: Dialogue[Result], answer: Answer | None, sampling: Sampling) -> Question:
        """Send a dialogue its answer (None starts it) and take its next question, one that can be asked."""
        question = next(dialogue) if answer is None else dialogue.send(answer)
        while True:
            try:
                self.check(question, sampling)
                return question
            except PromptTooLongError as error:
                question = dialogue.throw(error)

    def close(self) -> None:  # noqa: B027 - optional
        """See `ChatEngine.close`."""


class AsyncEngine(ABC):
    """An engine that answers questions one by one, many at a time: each dialogue goes forward on its own.

    All run on one event loop in a thread of its own, whichever threads they came from, so that what keeps requests in
    flight sees those of all batches together.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._lost: asyncio.Future[str] = self._loop.create_future()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @abstractmethod
    async def answer(self, question: Question, sampling: Sampling) -> Answer:
        """The answer to one question.

        Raises:
            PromptTooLongError: where the question and its answer exceed the model's context.
            EndpointError: where no answer can be had.
            EngineDiedError: where the engine is gone.
        """

    def converse(self, dialogues: Sequence[Dialogue[Result]], sampling: Sampling) -> list[Result | Exception]:
        """See `ChatEngine.converse`."""

        async def all_ends() -> list[Result | Exception]:
            ends = asyncio.gather(*(self._one(dialogue, sampling) for dialogue in dialogues))
            either: set[asyncio.Future[Any]] = {ends, self._lost}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._lost.done():
                ends.cancel()
                raise EngineDiedError(self._lost.result())
            return await ends

        return self._run(all_ends())

    def _lose(self, why: str) -> None:
        """End all that is asked and will be asked in `EngineDiedError`; to be called on the engine's loop."""
        if not self._lost.done():
            self._lost.set_result(why)

    async def _one(self, dialogue: Dialogue[Result], sampling: Sampling) -> Result | Exception:
        try:
            question = next(dialogue)
            while True:
                try:
                    answer = await self.answer(question, sampling)
                except (PromptTooLongError, EndpointError) as error:
                    question = dialogue.throw(error)
                else:
                    question = dialogue.send(answer)
        except StopIteration as end:
            result: Result = end.value
            return result
        except EngineDiedError:
            raise
        except Exception as error:
            return error

    def _run(self, work: Any) -> Any:
        """Run a coroutine on the engine's loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """See `ChatEngine.close`."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
