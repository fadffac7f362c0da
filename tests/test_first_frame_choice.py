"""Which attempt is taken, the face detail pass, safety, reference pictures, ControlNets: on the miniatures."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from first_frame_stage import found, picture, row, started, toward
from PIL import Image
from sdxl_minis import embedding, make_minis, words

from ipvg_ray import config
from ipvg_ray.config import ConfigError
from ipvg_ray.media import images, provenance
from ipvg_ray.models.faces import Face
from ipvg_ray.models.mini import sdxl as mini_sdxl
from ipvg_ray.models.safety import SafetyCheck, SafetyError
from ipvg_ray.models.sdxl_load import SdxlError
from ipvg_ray.pipeline.stage import RowError, derived_seed
from ipvg_ray.stages.first_frame import FirstFrameStage

REFERENCE = embedding(1001).numpy()  # of identity 1
BOX = (30.0, 20.0, 50.0, 44.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return make_minis(tmp_path_factory.mktemp("minis"))


class Script:
    """Finds, on the n-th picture looked at, a face of the n-th cosine (None: no face)."""

    def __init__(self, *cosines: float | None) -> None:
        self.cosines = list(cosines)
        self.seen: list[np.ndarray] = []

    def __call__(self, rgb: np.ndarray) -> list[Face]:
        cosine = self.cosines[len(self.seen) % len(self.cosines)]
        self.seen.append(rgb)
        return [] if cosine is None else [found(BOX, toward(REFERENCE, cosine))]


@pytest.fixture
def stage_with(models, monkeypatch) -> Callable[..., FirstFrameStage]:
    def make(find: Callable[[np.ndarray], list[Face]] | None = None, **section: Any) -> FirstFrameStage:
        stage = started(models, monkeypatch, **section)
        if find is not None:
            stage._faces.find = find
        return stage

    return make


# -- the best of N -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cosines", "tried", "taken", "reason"),
    [
        ((0.6, 0.9, 0.9), 1, 1, "similar"),
        ((0.3, 0.7, 0.9), 2, 2, "similar"),
        ((0.3, 0.45, 0.2), 3, 2, "best"),
        ((0.4, 0.4, 0.1), 3, 1, "best"),
        ((None, 0.1, None), 3, 2, "best"),
        ((None, -0.2, None), 3, 2, "best"),
        ((None, None, None), 3, 1, "no_face"),
        ((0.5, 0.2, 0.51), 3, 3, "similar"),  # the threshold has to be exceeded
    ],
)
def test_the_first_similar_attempt_wins_else_the_best(stage_with, cosines, tried, taken, reason):
    script = Script(*(0.4999 if c == 0.5 else c for c in cosines))
    stage = stage_with(script, attempts=3, detail={"enabled": False})
    (result,) = stage.process([row(1)])
    assert (result["first_frame_attempt"], result["first_frame_reason"]) == (taken, reason)
    assert len(result["first_frame_similarities"]) == tried
    assert result["first_frame_similarities"] == pytest.approx([*script.cosines[:tried]], abs=1e-5)
    assert result["first_frame_similarity"] == pytest.approx(script.cosines[taken - 1], abs=1e-5)
    assert np.array_equal(picture(result), script.seen[taken - 1])
    assert result["first_frame_refused"] is None
    assert result["first_frame_seed"] == (101 if taken == 1 else derived_seed(101, taken - 1))


def test_attempts_differ_and_follow_from_the_rows_seed(stage_with):
    script = Script(None)
    stage = stage_with(script, attempts=3, detail={"enabled": False})
    stage.process([row(1)])
    stage.process([row(1)])
    first, second, third, *again = script.seen
    assert min(np.abs(a.astype(int) - b).mean() for a, b in ((first, second), (second, third), (first, third))) > 1
    assert all(np.array_equal(a, b) for a, b in zip((first, second, third), again, strict=True))


def test_the_largest_face_is_compared(stage_with):
    small, large = found((0, 0, 9, 9), toward(REFERENCE, 0.9)), found(BOX, toward(REFERENCE, 0.2))
    (result,) = stage_with(lambda rgb: [small, large], detail={"enabled": False}).process([row(1)])
    assert result["first_frame_similarity"] == pytest.approx(0.2, abs=1e-5)


def test_a_stubborn_row_is_drawn_beside_others(stage_with):
    """Of four rows two need three attempts: theirs share batches, so that six calls become three."""
    stage = stage_with(attempts=3, detail={"enabled": False})
    sizes, paint = [], stage._painter.paint
    stage._painter.paint = lambda jobs, how: sizes.append([j.identity.key for j in jobs]) or paint(jobs, how)
    easy = embedding(1003).numpy(), embedding(1004).numpy()
    stage._faces.find = lambda rgb: [found(BOX, 3 * sum(easy))]  # like identities 3 and 4, unlike 1 and 2
    results = stage.process([row(i) for i in (1, 2, 3, 4)])
    assert sizes == [["id001", "id002", "id003", "id004"], ["id001", "id002"], ["id001", "id002"]]
    assert [r["first_frame_reason"] for r in results] == ["best", "best", "similar", "similar"]
    assert [len(r["first_frame_similarities"]) for r in results] == [3, 3, 1, 1]


# -- the face detail pass ----------------------------------------------------------------------------------------------


def test_faces_are_drawn_anew_and_nothing_else_changes(stage_with):
    boxes = [BOX, (60.0, 10.0, 80.0, 34.0)]
    plain = picture(stage_with(detail={"enabled": False}).process([row(1)])[0])
    stage = stage_with(
        lambda rgb: [found(box, toward(REFERENCE, 0.9)) for box in boxes], detail={"grow": 2, "feather": 3}
    )
    sizes, paint = [], stage._painter.paint
    stage._painter.paint = lambda jobs, how: sizes.append(len(jobs)) or paint(jobs, how)
    (result,) = stage.process([row(1)])
    assert (result["first_frame_detail"], result["first_frame_faces"]) == ("done", 2)
    assert sizes == [1, 2]  # both faces in one batch
    made, reach = picture(result), 2 + 3
    outside = np.ones(made.shape[:2], bool)
    for x0, y0, x1, y1 in boxes:
        outside[int(y0) - reach : int(y1) + reach, int(x0) - reach : int(x1) + reach] = False
        inside = slice(int(y0), int(y1)), slice(int(x0), int(x1))
        assert np.abs(made[inside].astype(int) - plain[inside]).mean() > 1
    assert outside.mean() > 0.5
    assert np.array_equal(made[outside], plain[outside])


def test_similarity_is_measured_after_the_detail_pass(stage_with):
    script = Script(0.1, 0.8)
    (result,) = stage_with(script).process([row(1)])
    assert result["first_frame_similarities"] == pytest.approx([0.8], abs=1e-5)
    assert np.array_equal(picture(result), script.seen[1])


@pytest.mark.parametrize(
    ("boxes", "enabled", "expected"),
    [([], True, "no_face"), ([(5, 5, 12, 30)], True, "too_small"), ([BOX], False, "off")],
)
def test_why_no_face_was_drawn_anew(stage_with, boxes, enabled, expected):
    stage = stage_with(lambda rgb: [found(box, REFERENCE) for box in boxes], detail={"enabled": enabled})
    (result,) = stage.process([row(1)])
    assert (result["first_frame_detail"], result["first_frame_faces"]) == (expected, 0)


# -- safety and marks --------------------------------------------------------------------------------------------------


PROCESSOR = {"do_resize": True, "size": {"height": 32, "width": 32}, "do_normalize": True, "do_rescale": True}
PROCESSOR |= {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.fixture
def classifier(models: Path) -> str:
    """A miniature ViT with the labels of a published NSFW classifier."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    labels = {0: "normal", 1: "nsfw"}
    settings = ViTConfig(**sizes, image_size=32, patch_size=16, id2label=labels, label2id={"normal": 0, "nsfw": 1})
    model = ViTForImageClassification(settings)
    model.save_pretrained(models / "mini-nsfw")
    (models / "mini-nsfw" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return "mini-nsfw"


def test_unsafe_attempts_are_not_taken(stage_with, classifier):
    stage = stage_with(Script(0.9), attempts=3, safety_model=classifier, detail={"enabled": False})
    assert 0 < stage._safety.scores([np.zeros((40, 60, 3), np.uint8)])[0] < 1
    given = iter([0.97, 0.2])
    stage._safety.scores = lambda pictures: [next(given) for _ in pictures]
    (result,) = stage.process([row(1)])
    assert result["first_frame_attempt"] == 2
    assert result["first_frame_refused"] == "1 unsafe (0.97)"
    assert result["first_frame_similarities"] == pytest.approx([None, 0.9], abs=1e-5)
    stage._safety.scores = lambda pictures: [0.8] * len(pictures)
    (result,) = stage.process([row(1)])
    assert isinstance(result, RowError)
    assert result.kind == "unsafe"
    assert "attempt 3: unsafe (0.80)" in result.message


def test_the_labels_of_the_safety_model_are_checked(stage_with, classifier, models):
    with pytest.raises(SafetyError, match="normal, nsfw"):
        stage_with(safety_model=classifier, safety={"labels": ["violence"]})
    (models / "empty").mkdir(exist_ok=True)
    with pytest.raises(SafetyError, match="empty holds no"):
        stage_with(safety_model="empty")


def test_the_safety_score_is_what_all_unsafe_labels_share(models):
    """A classifier that gives every picture the same known probabilities."""
    from transformers import ViTConfig, ViTForImageClassification

    names, shares = ("normal", "porn", "Hentai", "drawing"), torch.tensor([0.5, 0.2, 0.1, 0.2])
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=16, **labels))
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = shares.log()
    model.save_pretrained(models / "four-labels")
    (models / "four-labels/preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    pictures = [np.zeros((40, 60, 3), np.uint8), np.full((50, 30, 3), 200, np.uint8)]
    for unsafe, expected in ((("PORN",), 0.2), (("porn", "hentai", "nsfw"), 0.3), (names, 1.0)):
        scores = SafetyCheck.load(models / "four-labels", unsafe).scores(pictures)
        assert scores == pytest.approx([expected] * 2, abs=1e-6)


@pytest.mark.parametrize("kind", ["png", "jpeg"])
@pytest.mark.parametrize("mark", [True, False])
def test_pictures_say_which_row_of_which_run_they_are(stage_with, mark, kind):
    """The frame and the enhanced reference, to people and to machines."""
    enhance = {"enhance": "hyperlora", "width": 64, "height": 64}
    (result,) = stage_with(mark=mark, format=kind, reference=enhance).process([row(1, 2, reference_prompt=None)])
    for column, seed in (("first_frame", 102), ("reference_picture", derived_seed(102, "reference"))):
        with Image.open(io.BytesIO(result[column]["bytes"])) as image:
            image.load()
            words = image.text.get("Description", "") if kind == "png" else image.getexif().get(0x010E, "")
            xmp = image.info.get("xmp", b"")
        assert words.startswith("AI-generated, synthetic") == mark
        assert words.endswith(f"in run run-7, row id001/prompt2, seed {seed}") == mark
        assert (provenance.SYNTHETIC.encode() in xmp) == mark


# -- reference pictures ------------------------------------------------------------------------------------------------


def test_a_reference_picture_is_drawn_from_the_appearance_sentence(stage_with):
    stage = stage_with(reference={"enhance": "hyperlora", "width": 64, "height": 72})
    assert "reference_prompt" in stage.needs
    prompts, paint = [], stage._painter.paint
    stage._painter.paint = lambda jobs, how: prompts.extend(j.prompt for j in jobs) or paint(jobs, how)
    tpige, std = stage.process([row(1, reference_prompt="A woman in a red coat."), row(2, reference_prompt=None)])
    suffix = "upper body portrait, looking at the camera, plain background"
    assert prompts[2:] == [
        f"fcsks fxhks fhyks, A woman in a red coat, {suffix}",
        f"fcsks fxhks fhyks, a woman in a red dress, {suffix}",
    ]
    for result in (tpige, std):
        assert images.decode(result["reference_picture"]["bytes"]).shape == (72, 64, 3)
        assert picture(result).shape == (64, 88, 3)
        assert result["reference_similarity"] is None
    (without,) = stage_with().process([row(1)])
    assert without["reference_picture"] is None
    assert np.abs(picture(without).astype(int) - picture(tpige)).max() <= 1


# -- a ControlNet ------------------------------------------------------------------------------------------------------


@pytest.fixture
def controlnet(models: Path) -> str:
    """A miniature ControlNet for the miniature SDXL; fresh ones say nothing, so its last layers are given weights."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    settings = json.loads((models / mini_sdxl.CONFIG_NAME / "unet" / "config.json").read_text())
    torch.manual_seed(0)
    net: Any = ControlNetModel.from_unet(UNet2DConditionModel.from_config(settings))
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(layer.weight, std=0.2)
    net.save_pretrained(models / "mini-controlnet")
    return "mini-controlnet"


def pose(shift: float = 0.0) -> dict[str, Any]:
    landmarks = np.array([[40, 40], [60, 40], [50 + shift, 55], [42, 70], [58, 70]], np.float32)
    return {"landmarks_5": landmarks.ravel().tolist(), "face_box": [30.0, 20.0, 70.0, 80.0]}


def test_a_controlnet_sees_how_the_reference_face_is_turned(stage_with, controlnet):
    plain, straight, turned, weak = (
        picture(stage_with(**section).process([row(1, **pose(shift))])[0]).astype(int)
        for section, shift in (
            ({}, 0),
            ({"controlnet": controlnet}, 0),
            ({"controlnet": controlnet}, 12),
            ({"controlnet": controlnet, "control": {"scale": 0.01}}, 0),
        )
    )
    assert np.abs(straight - plain).mean() > 1
    assert not np.array_equal(straight, turned)  # both alone in their batch: rounding is the same
    assert np.abs(weak - plain).mean() < np.abs(straight - plain).mean() / 5


def test_a_long_neighbour_changes_no_controlled_picture(stage_with, controlnet):
    """The ControlNet takes no mask: what fills a short prompt up must not be heard."""
    settings = {"controlnet": controlnet, "runtime": {"batch": 3}, "control": {"scale": 1.0}, "attempts": 1}
    stage = stage_with(**settings)
    (alone,) = stage.process([row(1, **pose())])
    rows = [row(2, image_prompt=words(160), **pose()), row(1, **pose()), row(3, image_prompt=words(230), **pose())]
    beside = stage.process(rows)[1]
    assert np.abs(picture(alone).astype(int) - picture(beside)).max() <= 1


def test_control_is_asked_only_between_start_and_end(stage_with, controlnet):
    stage = stage_with(controlnet=controlnet, steps=4, control={"end": 0.5})
    assert {"landmarks_5", "face_box"} <= set(stage.needs)
    calls = []
    stage._painter.sdxl.controlnet.register_forward_pre_hook(lambda *_: calls.append(1))
    stage.process([row(1, **pose())])
    assert len(calls) == 2


def test_a_controlnet_may_be_shown_one_picture_for_all_rows(stage_with, controlnet, models):
    data = images.encode(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))["bytes"]
    (models / "pose.png").write_bytes(data)
    section = {"controlnet": controlnet, "control": {"source": "picture"}, "control_picture": "pose.png"}
    stage = stage_with(**section)
    assert stage.models()["control_picture"] == models / "pose.png"
    assert "landmarks_5" not in stage.needs
    shown = picture(stage.process([row(1)])[0]).astype(int)
    assert np.abs(shown - picture(stage_with().process([row(1)])[0])).mean() > 1


def test_what_is_no_sdxl_controlnet_is_refused(stage_with, models):
    with pytest.raises(SdxlError, match="cannot load a ControlNet"):
        stage_with(controlnet="mini-sdxl-config")
    with pytest.raises(ConfigError, match="control_picture is null"):
        config.load("cpu-mini", values={"first_frame": {"controlnet": "x", "control": {"source": "picture"}}})
