"""The two ways to run dialogues, without a model: independence of the samples, threads, and an engine that is lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from ipvg_ray.models.chat_engine import (
    Answer,
    AsyncEngine,
    BatchEngine,
    Dialogue,
    EngineDiedError,
    PromptTooLongError,
    Question,
    Sampling,
)

SAMPLING = Sampling(0.0, 1.0, 8)


def _calls(name: str, count: int) -> Dialogue[str]:
    texts = []
    for i in range(count):
        answer = yield Question([{"role": "user", "content": f"{name}{i}"}], i)
        texts.append(answer.text)
    return " ".join(texts)


def _patient(name: str) -> Dialogue[str]:
    """Asks something shorter where its question is too long."""
    try:
        answer = yield Question([{"role": "user", "content": f"{name} too long"}], 0)
    except PromptTooLongError:
        answer = yield Question([{"role": "user", "content": name}], 0)
    return answer.text


class Echo(BatchEngine):
    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.inside = 0

    def check(self, question: Question, sampling: Sampling) -> int:
        if "too long" in question.messages[0]["content"]:
            raise PromptTooLongError(9, 8, 16)
        return 1

    def generate(self, questions: Sequence[Question], sampling: Sampling) -> list[Answer]:
        self.inside += 1
        assert self.inside == 1  # calls take turns
        self.batches.append(len(questions))
        answers = [Answer(question.messages[0]["content"].upper(), True, 1, 1) for question in questions]
        self.inside -= 1
        return answers


class Gated(AsyncEngine):
    """Answers a question that begins with `slow` only once `gate` is open."""

    def __init__(self) -> None:
        super().__init__("gated")
        self.gate = asyncio.Event()
        self.asked: list[str] = []

    async def answer(self, question: Question, sampling: Sampling) -> Answer:
        text = question.messages[0]["content"]
        self.asked.append(text)
        if "too long" in text:
            raise PromptTooLongError(9, 8, 16)
        if text.startswith("slow"):
            await self.gate.wait()
        if text == "open1":
            self.gate.set()
        if text.startswith("broken"):
            raise KeyError(text)
        if text.startswith("die"):
            self._lose("gone")
            await asyncio.Event().wait()  # as an engine that never tells
        return Answer(text.upper(), True, 1, 1)


@pytest.mark.parametrize("kind", [Echo, Gated])
def test_ends_come_in_order_and_errors_stay_where_they_arose(kind: type[BatchEngine] | type[AsyncEngine]) -> None:
    def refuses() -> Dialogue[str]:
        raise ValueError("before its first question")
        yield  # a generator

    engine = kind()
    ends = engine.converse(
        [_calls("a", 3), _calls("b", 0), refuses(), _patient("c"), _calls("x too long", 2)], SAMPLING
    )
    engine.close()
    assert ends[0] == "A0 A1 A2"
    assert ends[1] == ""
    assert isinstance(ends[2], ValueError)
    assert ends[3] == "C"
    assert isinstance(ends[4], PromptTooLongError)


def test_in_step_repeats_share_a_batch_with_later_calls() -> None:
    engine = Echo()
    engine.converse([_calls("a", 1), _calls("b", 3), _calls("c", 2)], SAMPLING)
    assert engine.batches == [3, 2, 1]
    with ThreadPoolExecutor(8) as pool:
        ends = list(pool.map(lambda i: engine.converse([_calls(f"t{i}-", 2)], SAMPLING), range(50)))
    assert ends == [[f"T{i}-0 T{i}-1"] for i in range(50)]


def test_a_slow_sample_holds_up_no_other() -> None:
    engine = Gated()
    # The slow one gets its first answer only when the other has had both of its: in step this would never end.
    ends = engine.converse([_calls("slow", 2), _calls("open", 2)], SAMPLING)
    assert ends == ["SLOW0 SLOW1", "OPEN0 OPEN1"]
    assert engine.asked.index("open1") < engine.asked.index("slow1")
    engine.close()


def test_batches_of_several_threads_are_under_way_together() -> None:
    engine = Gated()
    ends: list[object] = []
    waiting = threading.Thread(target=lambda: ends.extend(engine.converse([_calls("slow", 1)], SAMPLING)))
    waiting.start()
    assert engine.converse([_calls("open", 2)], SAMPLING) == ["OPEN0 OPEN1"]  # lets the other thread's sample go on
    waiting.join(timeout=10)
    assert ends == ["SLOW0"]
    engine.close()


def test_unexpected_errors_are_ends_too() -> None:
    engine = Gated()
    (end, fine) = engine.converse([_calls("broken", 1), _calls("a", 1)], SAMPLING)
    assert isinstance(end, KeyError)
    assert fine == "A0"
    engine.close()


def test_a_lost_engine_ends_everything_that_waits_for_it() -> None:
    engine = Gated()
    with pytest.raises(EngineDiedError, match="gone"):
        engine.converse([_calls("slow", 1), _calls("die", 1)], SAMPLING)
    with pytest.raises(EngineDiedError, match="gone"):
        engine.converse([_calls("a", 1)], SAMPLING)
    engine.close()
