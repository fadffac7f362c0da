"""Prompts: two language-model calls per sample turn the user's text into a temporal and a spatial prompt."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipvg_ray.models import prompt_rules as rules
from ipvg_ray.models.chat_engine import Answer, ChatEngine, Message, PromptTooLongError
from ipvg_ray.pipeline.stage import Row, RowError, Stage, StageContext

if TYPE_CHECKING:
    from ipvg_ray.config import PromptsConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One question to the language model."""

    messages: list[Message]
    seed: int


@dataclass(frozen=True)
class Outcome:
    """How one call of a sample ended: its text, `ok`, `retried` or `fallback`, and why its tries were refused."""

    text: str
    status: str
    reasons: tuple[str, ...]


Sample = Generator[Request, Answer | None, Row]
"""A sample under way: yields requests, is sent answers, returns its columns."""


class PromptsStage(Stage):
    """Temporal Prompt Polisher, then Spatial Semantic Parser (arXiv 2507.04705), with checked answers.

    A sample is a generator that yields requests and is sent answers: how its two calls and their repeats follow from
    each other is written once, whatever runs the model. Here the samples of a batch go forward together, those that ask
    again beside those that are a call ahead; an engine that keeps requests in flight can drive each sample on its own.
    """

    name = "prompts"
    grain = "sample"
    needs = ("prompt", "target")

    @property
    def settings(self) -> PromptsConfig:
        return self.config.prompts

    def models(self) -> Mapping[str, Path]:
        return {"model": self.config.models.path(self.settings.model)}

    def fingerprint_settings(self) -> dict[str, Any]:
        return {**super().fingerprint_settings(), "templates": rules.templates_digest()}

    def setup(self, context: StageContext) -> None:
        import torch

        from ipvg_ray.models.chat import ChatModel

        torch.set_num_threads(context.threads)
        self.engine: ChatEngine = ChatModel(self.models()["model"], dtype=self.settings.dtype, device=context.device)

    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        """Rows with `video_prompt`, `image_prompt`, `prompt_status` and `prompt_note`.

        Errors: `empty_prompt` where nothing visible is left of a prompt, `prompt_too_long` where a call exceeds the
        model's context.
        """
        samples = [self._sample(row) for row in rows]
        states = [self._forward(sample, None) for sample in samples]
        while asked := {i: state for i, state in enumerate(states) if isinstance(state, Request)}:
            for i, answer in zip(asked, self._answers(list(asked.values())), strict=True):
                states[i] = self._forward(samples[i], answer)
        return [state for state in states if not isinstance(state, Request)]

    def _forward(self, sample: Sample, answer: Answer | None) -> Request | Row | RowError:
        """Send a sample its answer (None starts it): its next request, or how it ended."""
        try:
            request = sample.send(answer)
            self.engine.check(request.messages, self.settings.max_new_tokens)
            return request
        except StopIteration as end:
            columns: Row = end.value
            return columns
        except PromptTooLongError as error:
            return RowError("prompt_too_long", str(error))
        except RowError as error:
            return error

    def _answers(self, requests: Sequence[Request]) -> list[Answer]:
        return self.engine.generate(
            [request.messages for request in requests],
            [request.seed for request in requests],
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            max_new_tokens=self.settings.max_new_tokens,
        )

    def _sample(self, row: Row) -> Sample:
        """Both calls of one sample; returns the columns."""
        prompt, target, seed = str(row["prompt"]), str(row["target"]), int(row["seed"])
        trigger = self.settings.trigger_words
        if not rules.plain(prompt):
            raise RowError("empty_prompt", "the prompt holds no visible character; write what the person does")
        temporal = yield from self._ask(
            "polisher",
            prompt,
            target,
            seed,
            check=rules.check_polished,
            fallback=rules.fallback_polished,
        )
        source = temporal.text if self.settings.spatial_source == "refined" else prompt
        spatial = yield from self._ask(
            "parser",
            source,
            target,
            seed,
            check=partial(rules.check_spatial, trigger_words=trigger),
            fallback=partial(rules.fallback_spatial, trigger_words=trigger),
        )
        return _columns(temporal, spatial)

    def _ask(
        self,
        call: rules.Call,
        text: str,
        target: str,
        seed: int,
        *,
        check: Callable[..., rules.Checked],
        fallback: Callable[[str, str], str],
    ) -> Generator[Request, Answer | None, Outcome]:
        """One call: ask, and ask again with another seed while the answer is invalid and tries are left."""
        messages = rules.conversation(call, text, target)
        # Without randomness another seed gives the same answer.
        tries = 1 + (self.settings.retries if self.settings.temperature > 0 else 0)
        reasons: list[str] = []
        for attempt in range(tries):
            answer = yield Request(messages, call_seed(seed, call, attempt))
            assert answer is not None  # only the start of a generator is sent None
            checked = check(answer.text, target, finished=answer.finished)
            log.debug("%s, try %d: mended %s, invalid %s", call, attempt + 1, checked.mended, checked.invalid)
            if not checked.invalid:
                return Outcome(checked.text, "retried" if attempt else "ok", tuple(reasons))
            reasons.append(f"try {attempt + 1} {', '.join(checked.invalid)}")
        return Outcome(fallback(text, target), "fallback", (*reasons, "the input stands in"))


def call_seed(seed: int, call: str, attempt: int) -> int:
    """Seed in [0, 2^63) of one try of one call, from the row's seed."""
    digest = hashlib.blake2b(f"{seed}/{call}/{attempt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _columns(temporal: Outcome, spatial: Outcome) -> Row:
    statuses = {temporal.status, spatial.status}
    notes = [
        f"{call}: {'; '.join(outcome.reasons)}"
        for call, outcome in (("polisher", temporal), ("parser", spatial))
        if outcome.reasons
    ]
    return {
        "video_prompt": temporal.text,
        "image_prompt": spatial.text,
        "prompt_status": next(s for s in ("fallback", "retried", "ok") if s in statuses),
        "prompt_note": " | ".join(notes) or None,
    }
