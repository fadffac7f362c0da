"""Prompts: language-model calls per sample turn the user's text into a temporal and a spatial prompt."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ipvg_ray.media import images
from ipvg_ray.models import prompt_rules as rules
from ipvg_ray.models.chat_engine import (
    Answer,
    ChatEngine,
    Dialogue,
    EndpointError,
    EngineDiedError,
    PromptTooLongError,
    Question,
    Sampling,
)
from ipvg_ray.models.chat_load import load_engine
from ipvg_ray.models.prompt_patterns import pattern
from ipvg_ray.models.prompt_templates import Call, conversation, digest, load_templates
from ipvg_ray.models.prompt_text import plain
from ipvg_ray.pipeline.stage import Row, RowError, Stage, StageContext, WorkerBrokenError, derived_seed

if TYPE_CHECKING:
    from ipvg_ray.config import Config, PromptsConfig

log = logging.getLogger(__name__)

CALLS: dict[str, tuple[Call, ...]] = {
    "ipvg_std": ("polisher", "parser"),
    "raw": ("parser",),
    "tpige": ("face_aware", "appearance"),
}
"""The calls of each method, in the order in which a sample makes them."""


@dataclass(frozen=True)
class Outcome:
    """How one call of a sample ended: its text, `ok`, `retried` or `fallback`, and why its tries were refused."""

    call: Call
    text: str
    status: str
    reasons: tuple[str, ...]


class PromptsStage(Stage):
    """The prompts of IPVG-STD (arXiv 2507.04705) or TPIGE (arXiv 2509.01362), with checked answers.

    `ipvg_std`: Temporal Prompt Polisher, then Spatial Semantic Parser. `raw`: the parser alone, the user's own text for
    the video. `tpige`: a vision-language model weaves the face of the reference picture into the text, and says in one
    sentence how the person looks.

    A sample is a dialogue (`chat_engine`): how its calls and their repeats follow from each other is written once,
    whatever runs the model. `process` may be called from several threads at a time.
    """

    name = "prompts"
    grain = "sample"
    needs: ClassVar[tuple[str, ...]] = ("prompt", "target")
    version = 2

    def __init__(self, config: Config) -> None:
        """Read the instructions now: every worker of a run gets those that its fingerprint was made from."""
        super().__init__(config)
        self.templates = load_templates(CALLS[self.settings.method], self.settings.templates)
        if self.settings.method == "tpige":
            self.needs = (*type(self).needs, "image", "image_sha256")  # type: ignore[misc] # of this configuration

    @property
    def settings(self) -> PromptsConfig:
        return self.config.prompts

    def models(self) -> Mapping[str, Path]:
        if self.settings.engine == "openai":
            return {}  # the endpoint has it
        field = self.settings.model_field
        return {field: self.config.models.path(getattr(self.settings, field))}

    def fingerprint_settings(self) -> dict[str, Any]:
        settings = super().fingerprint_settings()
        dropped = {
            "ipvg_std": ("vision_model", "picture_side"),
            "raw": ("vision_model", "picture_side", "spatial_source"),
            "tpige": ("model", "spatial_source"),
        }
        for field in (*dropped[self.settings.method], "vllm", "endpoint"):
            settings.pop(field, None)
        if self.settings.engine == "vllm":  # what decides memory and speed alone is left out
            settings["vllm"] = self.settings.vllm.model_dump(include={"quantization", "extra"})
        if self.settings.engine == "openai":
            settings["endpoint"] = self.settings.endpoint.model_dump(include={"extra_body"})
        return settings | {"templates": digest(self.templates)}

    def setup(self, context: StageContext) -> None:
        self.engine: ChatEngine = load_engine(
            self.settings, self.models(), device=context.device, threads=context.threads
        )

    def teardown(self) -> None:
        self.engine.close()

    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        """Rows with `video_prompt`, `image_prompt`, `reference_prompt`, `prompt_status` and `prompt_note`.

        Errors: `empty_prompt` where nothing visible is left of a prompt, `prompt_too_long` where a call exceeds the
        model's context, `endpoint_refused` and `endpoint_busy` where an endpoint gives no answer, and the kinds of
        `images.ImageError` where the method looks at the reference picture.
        """
        results: list[Row | RowError | None] = [None] * len(rows)
        dialogues: dict[int, Dialogue[Row]] = {}
        for i, row in enumerate(rows):
            try:
                dialogues[i] = self._begun(row)
            except RowError as error:
                results[i] = error
        try:
            ends = self.engine.converse(list(dialogues.values()), self._sampling())
        except EngineDiedError as error:
            raise WorkerBrokenError("the language model's engine has died") from error
        for i, end in zip(dialogues, ends, strict=True):
            results[i] = _judged(end)
        return [result for result in results if result is not None]

    def _sampling(self) -> Sampling:
        return Sampling(self.settings.temperature, self.settings.top_p, self.settings.max_new_tokens)

    def _begun(self, row: Row) -> Dialogue[Row]:
        """The dialogue of a row. What takes long is done here, in the calling thread, and not on the engine's loop."""
        if not plain(str(row["prompt"])):
            raise RowError("empty_prompt", "the prompt holds no visible character; write what the person does")
        picture = _picture(row, self.config) if self.settings.method == "tpige" else None
        dialogue: Dialogue[Row] = getattr(self, f"_{self.settings.method}")(row, picture)
        return dialogue

    # -- the methods ------------------------------------------------------------------------------------------------

    def _ipvg_std(self, row: Row, picture: bytes | None) -> Dialogue[Row]:
        prompt, target = str(row["prompt"]), self._target(row)
        temporal = yield from self._polished(prompt, target, int(row["seed"]))
        source = temporal.text if self.settings.spatial_source == "refined" else prompt
        spatial = yield from self._parsed(source, target, int(row["seed"]))
        return _columns((temporal, spatial), temporal.text, spatial.text)

    def _raw(self, row: Row, picture: bytes | None) -> Dialogue[Row]:
        """The paper's ablation: the video gets the user's own words; the first frame needs phrases all the same."""
        prompt = str(row["prompt"])
        spatial = yield from self._parsed(prompt, self._target(row), int(row["seed"]))
        return _columns((spatial,), plain(prompt), spatial.text)

    def _tpige(self, row: Row, picture: bytes | None) -> Dialogue[Row]:
        prompt, target, seed = str(row["prompt"]), self._target(row), int(row["seed"])
        language = self.settings.language
        temporal = yield from self._ask(
            "face_aware",
            prompt,
            target,
            seed,
            check=lambda text, done: rules.check_face_aware(text, prompt, finished=done, language=language),
            fallback=plain(prompt),
            picture=picture,
        )
        looks = yield from self._ask(
            "appearance",
            prompt,
            target,
            seed,
            check=lambda text, done: rules.check_appearance(text, target, finished=done, language=language),
            fallback=rules.fallback_polished(prompt, target),
        )
        spatial = rules.spatial_from(looks.text, self.settings.trigger_words)
        return _columns((temporal, looks), temporal.text, spatial, looks.text)

    def _target(self, row: Row) -> str:
        return str(row["target"]) if self.settings.target == "gender" else "A person"

    # -- the calls --------------------------------------------------------------------------------------------------

    def _polished(self, text: str, target: str, seed: int) -> Dialogue[Outcome]:
        language = self.settings.language
        return self._ask(
            "polisher",
            text,
            target,
            seed,
            check=lambda answer, done: rules.check_polished(answer, target, finished=done, language=language),
            fallback=rules.fallback_polished(text, target),
        )

    def _parsed(self, text: str, target: str, seed: int) -> Dialogue[Outcome]:
        check = partial(
            rules.check_spatial,
            target=target,
            trigger_words=self.settings.trigger_words,
            language=self.settings.language,
        )
        return self._ask(
            "parser",
            text,
            target,
            seed,
            check=lambda answer, done: check(answer, finished=done),
            fallback=rules.fallback_spatial(text, target, self.settings.trigger_words),
        )

    def _ask(
        self,
        call: Call,
        text: str,
        target: str,
        seed: int,
        *,
        check: Callable[[str, bool], rules.Checked],
        fallback: str,
        picture: bytes | None = None,
    ) -> Generator[Question, Answer, Outcome]:
        """One call: ask, and ask again with another seed while the answer is invalid and tries are left.

        Args:
            text: the sample's text, which the instruction is applied to.
            check: (answer, whether it ended by itself) to what the rules make of it.
            fallback: what stands in where no answer is valid.
        """
        messages = conversation(self.templates[call], text, target)
        enforced = pattern(call, target, self.settings.language) if self.settings.constrain else None
        # Without randomness another seed gives the same answer.
        tries = 1 + (self.settings.retries if self.settings.temperature > 0 else 0)
        reasons: list[str] = []
        for attempt in range(tries):
            answer = yield Question(messages, derived_seed(seed, call, attempt), picture, enforced)
            checked = check(answer.text, answer.finished)
            log.debug("%s, try %d: mended %s, invalid %s", call, attempt + 1, checked.mended, checked.invalid)
            if not checked.invalid:
                return Outcome(call, checked.text, "retried" if attempt else "ok", tuple(reasons))
            reasons.append(f"try {attempt + 1} {', '.join(checked.invalid)}")
        return Outcome(call, fallback, "fallback", (*reasons, "the input stands in"))


def _columns(outcomes: Sequence[Outcome], video: str, image: str, reference: str | None = None) -> Row:
    statuses = {outcome.status for outcome in outcomes}
    notes = [f"{outcome.call}: {'; '.join(outcome.reasons)}" for outcome in outcomes if outcome.reasons]
    return {
        "video_prompt": video,
        "image_prompt": image,
        "reference_prompt": reference,
        "prompt_status": next(s for s in ("fallback", "retried", "ok") if s in statuses),
        "prompt_note": " | ".join(notes) or None,
    }


def _judged(end: Row | Exception) -> Row | RowError:
    """A dialogue's end as the row's result; what is no fault of the row is raised."""
    if isinstance(end, PromptTooLongError):
        return RowError("prompt_too_long", str(end))
    if isinstance(end, EndpointError):
        return RowError("endpoint_busy" if end.passing else "endpoint_refused", str(end))
    if isinstance(end, Exception) and not isinstance(end, RowError):
        raise end
    return end


def _picture(row: Row, config: Config) -> bytes:
    """The reference picture, upright, no longer than `prompts.picture_side`, as PNG."""
    try:
        rgb = images.decode(images.image_bytes(row["image"], row["image_sha256"]), config.dataset.max_image_pixels)
    except images.ImageError as error:
        raise RowError(error.kind, str(error)) from error
    return bytes(images.encode(images.shrunk(rgb, config.prompts.picture_side))["bytes"])
