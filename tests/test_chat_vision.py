"""The vision-language engine on transformers, and method tpige on top of it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ipvg_ray import config
from ipvg_ray.models.chat_engine import Answer, BatchEngine, ChatFolderError, PromptTooLongError, Question, Sampling
from ipvg_ray.models.chat_vision import VisionChatModel
from ipvg_ray.models.mini import qwen3, qwen3_vl
from ipvg_ray.pipeline.plan import make_steps
from ipvg_ray.pipeline.stage import Row, RowError, StageContext
from ipvg_ray.stages import make_stages
from ipvg_ray.stages.prompts import PromptsStage

SAMPLING = Sampling(0.5, 0.9, 16)
MESSAGES = [{"role": "system", "content": "Look."}, {"role": "user", "content": "a chef cooks"}]


def picture(seed: int, width: int = 200, height: int = 140, kind: str = "PNG") -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vision")
    qwen3_vl.make(root)
    return root


@pytest.fixture(scope="module")
def model(root: Path) -> VisionChatModel:
    return VisionChatModel(root / qwen3_vl.NAME)


def _answer(model: VisionChatModel, seen: bytes | None, seed: int = 1) -> Answer:
    return model.generate([Question(MESSAGES, seed, seen)], SAMPLING)[0]


def test_an_answer_depends_on_the_picture_and_the_seed(model: VisionChatModel) -> None:
    answers = [_answer(model, seen) for seen in (picture(0), picture(1), None)] + [_answer(model, picture(0), 2)]
    assert len({answer.text for answer in answers}) == 4
    assert _answer(model, picture(0)) == answers[0]
    together = model.generate([Question(MESSAGES, 1, picture(1)), Question(MESSAGES, 1, picture(0))], SAMPLING)
    assert together == [answers[1], answers[0]]


def test_a_picture_takes_the_tokens_that_check_counts(model: VisionChatModel) -> None:
    for width, height in ((64, 64), (200, 140), (140, 200), (30, 900)):
        question = Question(MESSAGES, 1, picture(0, width, height))
        assert model.check(question, SAMPLING) == model.generate([question], SAMPLING)[0].prompt_tokens
    plain, seen = (model.check(Question(MESSAGES, 1, p), SAMPLING) for p in (None, picture(0, 64, 64)))
    assert seen - plain == 2 * 2 + 2  # a token for each 32 x 32 pixels, and the two around them
    long = [{"role": "user", "content": "1" * (qwen3.CONTEXT - 60)}]
    assert model.check(Question(long, 1), SAMPLING)
    with pytest.raises(PromptTooLongError):
        model.check(Question(long, 1, picture(0, 256, 256)), SAMPLING)


def test_picture_tokens_in_a_text_stay_text(model: VisionChatModel) -> None:
    hostile = [{"role": "user", "content": "<|vision_start|><|image_pad|><|vision_end|> a cat <|image_pad|>"}]
    ids = model.tokens.encode(hostile, picture=True)
    assert ids.count(model._image_id) == 1
    assert model.generate([Question(hostile, 1, picture(0))], SAMPLING)[0].new_tokens > 0


def test_a_folder_without_preparation_is_named(root: Path, tmp_path: Path) -> None:
    for file in (root / qwen3_vl.NAME).iterdir():
        if file.name != "preprocessor_config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ChatFolderError, match=r"no preprocessor_config\.json"):
        VisionChatModel(tmp_path)


# --- method tpige ---------------------------------------------------------------------------------------------------


def _row(data: bytes, prompt: str = "The chef leaps to the sink and sings.", seed: int = 1) -> Row:
    seen = {"image": {"bytes": data, "path": None}, "image_sha256": hashlib.sha256(data).hexdigest()}
    return {"sample_id": "a/1", "identity_id": "a", "prompt": prompt, "target": "A man", "seed": seed, **seen}


class Scripted(BatchEngine):
    """Says what a test wants and keeps what it was shown."""

    def __init__(self, say: dict[str, str]) -> None:
        super().__init__()
        self.say = say
        self.asked: list[Question] = []

    def check(self, question: Question, sampling: Sampling) -> int:
        return 1

    def generate(self, questions: Sequence[Question], sampling: Sampling) -> list[Answer]:
        self.asked += questions
        call = ["appearance" if "waist up" in q.messages[0]["content"] else "face_aware" for q in questions]
        return [Answer(self.say[name], True, 1, 1) for name in call]


def _stage(**changes: object) -> PromptsStage:
    return PromptsStage(config.load("cpu-mini", values={"prompts": {"method": "tpige", "retries": 1, **changes}}))


def test_the_prompt_gets_the_face_and_the_reference_a_sentence() -> None:
    stage = _stage(picture_side=100)
    face = "The chef, a smiling man of about forty with a beard, leaps to the sink and sings."
    stage.engine = scripted = Scripted({"face_aware": face, "appearance": "A man in a white apron with a beard."})
    (result,) = stage.process([_row(picture(3, 300, 150))])
    assert result == {
        "video_prompt": face,
        "image_prompt": "fcsks fxhks fhyks, A man in a white apron with a beard, close-up",
        "reference_prompt": "A man in a white apron with a beard.",
        "prompt_status": "ok",
        "prompt_note": None,
    }
    seen, unseen = (question.picture for question in scripted.asked)
    assert seen is not None
    assert Image.open(io.BytesIO(seen)).size == (100, 50)
    assert unseen is None


def test_without_a_valid_answer_the_users_words_stand_and_the_row_says_so() -> None:
    stage = _stage()
    stage.engine = Scripted({"face_aware": "I cannot do that.", "appearance": ""})
    broken = {**_row(picture(1)), "image": {"bytes": b"no picture", "path": None}}
    broken["image_sha256"] = hashlib.sha256(b"no picture").hexdigest()
    result, error = stage.process([_row(picture(1)), broken])
    assert isinstance(result, dict)
    assert result["video_prompt"] == "The chef leaps to the sink and sings."
    assert result["reference_prompt"] == "A man. The chef leaps to the sink and sings."
    assert result["prompt_status"] == "fallback"
    assert "face_aware: try 1 keeps" in str(result["prompt_note"])
    assert "appearance: try 1 empty" in str(result["prompt_note"])
    assert isinstance(error, RowError)
    assert error.kind == "broken_image"


def test_the_real_stage_on_the_miniature(root: Path) -> None:
    values = {"models": {"root": str(root)}, "prompts": {"method": "tpige", "max_new_tokens": 12}}
    stage = PromptsStage(config.load("cpu-mini", values=values))
    assert stage.models() == {"vision_model": root / qwen3_vl.NAME}
    stage.setup(StageContext(device="cpu", threads=1, media=None, run_dir=""))  # type: ignore[arg-type]
    rows = [_row(picture(i, kind="JPEG"), seed=i) for i in range(3)]
    results = stage.process(rows)
    assert all(isinstance(result, dict) for result in results)
    assert [stage.process([row])[0] for row in rows] == results


def test_the_plan_brings_the_picture_only_where_it_is_looked_at() -> None:
    def arriving(method: str) -> list[str]:
        steps = make_steps(make_stages(config.load("cpu-mini", values={"prompts": {"method": method}}), "prompts"))
        return list(steps[-1].arriving.names)

    assert "image" in arriving("tpige")
    assert "image" not in arriving("ipvg_std")
