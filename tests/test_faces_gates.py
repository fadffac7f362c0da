"""The faces stage's row: quality and its gates, and several reference pictures."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from face_pictures import astronaut, done, refused, row_of, sample_picture
from face_pictures import make_stage as make_any_stage
from PIL import Image

from ipvg_ray.config import FacesConfig
from ipvg_ray.stages.faces import FacesStage


def make_stage(packs: Path, **section: Any) -> FacesStage:
    """A stage that detects at one small size: the miniature detector takes a second at 640."""
    return make_any_stage(packs, **{"det_sizes": [256], **section})


def gated(stage: FacesStage, **gates: Any) -> FacesStage:
    """The stage, its models loaded, with other gates."""
    other = copy.copy(stage)
    other.config = stage.config.model_copy(
        update={"faces": FacesConfig(**{**vars(stage.config.faces), "gates": gates})}
    )
    return other


@pytest.fixture(scope="module")
def stage(packs: Path) -> FacesStage:
    return make_stage(packs)


def portrait() -> np.ndarray:
    """The astronaut's head alone, on which detection is one and quick."""
    return np.ascontiguousarray(astronaut()[10:230, 110:330])


def test_quality_is_in_the_row(stage: FacesStage) -> None:
    sharp = done(stage, row_of(portrait()))
    blurred = done(stage, row_of(cv2.GaussianBlur(portrait(), (0, 0), 2)))
    x0, y0, x1, y1 = sharp["face_box"]
    assert sharp["face_size"] == pytest.approx(min(x1 - x0, y1 - y0))
    assert sharp["sharpness"] > 4 * blurred["sharpness"]
    assert max(abs(sharp[name]) for name in ("yaw", "pitch", "roll")) < 10
    assert (sharp["flaws"], blurred["flaws"]) == ([], ["blurred"])
    assert 0.5 <= sharp["gender_probability"] <= 1
    assert 5 < sharp["embedding_norm"] < 50
    assert 5 < sharp["id_embedding_norm"] < 50


@pytest.mark.parametrize(
    ("gate", "kind"),
    [
        ({"too_small": {"pixels": 500}}, "face_too_small"),
        ({"blurred": {"sharpness": 5}}, "face_blurred"),
        ({"turned_away": {"pitch": 0}}, "face_turned_away"),
    ],
)
def test_a_gate_warns_refuses_or_is_off(stage: FacesStage, gate: dict[str, Any], kind: str) -> None:
    (name, limits), row = next(iter(gate.items())), row_of(portrait())
    assert done(gated(stage, **gate), row)["flaws"] == [name]
    assert done(gated(stage, **{name: {**limits, "action": "off"}}), row)["flaws"] == []
    error = refused(gated(stage, **{name: {**limits, "action": "refuse"}}), row)
    assert error.kind == kind
    assert f"faces.gates.{name}" in error.message


def test_the_provider_is_no_part_of_the_results(packs: Path) -> None:
    other = make_stage(packs, onnx_provider="cpu")
    assert other.fingerprint_settings() == make_stage(packs).fingerprint_settings()
    assert "gates" in other.fingerprint_settings()
    with pytest.raises(ValueError, match="was given no GPU"):
        make_stage(packs, onnx_provider="cuda")


def test_one_small_detection_size_is_an_option(packs: Path) -> None:
    assert done(make_stage(packs, det_sizes=[224]), row_of(portrait()))["face_count"] == 1


# --- several reference pictures ---------------------------------------------------------------------------------------


def test_several_references_of_one_identity(stage: FacesStage) -> None:
    smaller = np.asarray(Image.fromarray(portrait()).resize((400, 400)))
    alone, other = done(stage, row_of(portrait())), done(stage, row_of(smaller))
    both = done(stage, row_of(portrait(), smaller))
    lists = {"reference_numbers", "reference_boxes", "reference_landmarks", "reference_used"}
    shared = set(alone) - {"embeddings", "id_embeddings", "reference_spread", *lists}
    assert {name: both[name] for name in shared} == {name: alone[name] for name in shared}, "the first makes the row"
    assert both["embeddings"] == [alone["embedding"], other["embedding"]]
    assert both["id_embeddings"] == [alone["id_embedding"], other["id_embedding"]]
    assert both["reference_numbers"] == [0, 1]
    assert both["reference_boxes"] == [alone["face_box"], other["face_box"]]
    assert both["reference_landmarks"] == [alone["landmarks_106"], other["landmarks_106"]]
    assert (alone["reference_used"], both["reference_used"]) == ([True], [True, True])
    assert both["reference_spread"] == pytest.approx(1 - np.dot(alone["embedding"], other["embedding"]), abs=1e-6)
    assert (alone["embeddings"], alone["reference_spread"]) == ([alone["embedding"]], None)


def test_only_the_first_references_are_used(packs: Path) -> None:
    one = done(
        make_stage(packs, used_references=1), row_of(portrait(), np.ascontiguousarray(astronaut()[20:220, 120:320]))
    )
    assert one["reference_used"] == [True, False]
    assert len(one["embeddings"]) == 2


def test_an_unusable_further_reference_is_noted(stage: FacesStage) -> None:
    nothing, blurred = np.zeros((64, 64, 3), np.uint8), cv2.GaussianBlur(portrait(), (0, 0), 2)
    result = done(stage, row_of(portrait(), nothing, portrait()))
    assert result["reference_numbers"] == [0, 2]
    assert result["reference_used"] == [True, True]
    (note,) = result["reference_notes"]
    assert note.startswith("reference 1: no_face")
    strict = gated(stage, blurred={"action": "refuse"})
    (note,) = done(strict, row_of(portrait(), blurred))["reference_notes"]
    assert note.startswith("reference 1: face_blurred")


def test_an_odd_one_out_is_flagged_or_refused(stage: FacesStage) -> None:
    someone = np.ascontiguousarray(sample_picture("t1")[200:470, 1040:1280])
    closer = np.ascontiguousarray(astronaut()[20:220, 120:320])
    row = row_of(portrait(), someone, closer)
    gate = {"cosine": 0.8}  # random networks find all faces somewhat alike
    result = done(gated(stage, odd_one_out=gate), row)
    assert result["reference_numbers"] == [0, 1, 2]
    assert result["odd_references"] == [1], np.array(result["embeddings"]) @ np.array(result["embeddings"]).T
    assert result["flaws"] == ["odd_one_out"]
    assert result["reference_used"] == [True, False, True]
    others_agree = done(gated(stage, odd_one_out=gate), row_of(someone, portrait(), closer))
    assert others_agree["odd_references"] == [0]
    assert others_agree["reference_used"] == [True, False, False], "the first stands for the identity"
    error = refused(gated(stage, odd_one_out={**gate, "action": "refuse"}), row)
    assert error.kind == "odd_reference"
    assert "pictures 1 " in error.message
    off = done(gated(stage, odd_one_out={**gate, "action": "off"}), row)
    assert (off["odd_references"], off["flaws"], off["reference_used"]) == ([], [], [True] * 3)
