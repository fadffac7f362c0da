"""The first frame from several reference pictures of one identity, on the miniatures and through the stages before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from face_pictures import row_of, sample_picture
from first_frame_stage import NoMedia, found, picture, row, started, toward
from sdxl_minis import embedding, face, make_minis

from ipvg_ray import config
from ipvg_ray.media import images
from ipvg_ray.pipeline.stage import RowError, StageContext
from ipvg_ray.stages import make_stages
from ipvg_ray.stages.first_frame import FirstFrameStage


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return make_minis(tmp_path_factory.mktemp("minis"))


@pytest.fixture
def stage(models, monkeypatch) -> FirstFrameStage:
    return started(models, monkeypatch)


def seen_on(*pictures: int, identity: str = "eve", used: Sequence[bool] = (), **changes: Any) -> dict[str, Any]:
    """A row of someone seen on these made-up pictures."""
    first, *more = [images.encode(face(n)) for n in pictures]
    columns = {"identity_id": identity, "id_picture": first, "more_id_pictures": more or None}
    columns |= {"id_embeddings": [embedding(n).tolist() for n in pictures]}
    columns |= {"embeddings": [embedding(1000 + n).tolist() for n in pictures]}
    return row(1, **{**columns, "reference_used": list(used) or [True] * len(pictures), **changes})


def apart(a: dict[str, Any] | RowError, b: dict[str, Any] | RowError) -> np.ndarray:
    """How much two rows' pictures differ, pixel by pixel."""
    return np.abs(picture(a).astype(int) - picture(b))


# -- whom HyperLoRA is given -------------------------------------------------------------------------------------------


def test_every_used_picture_is_heard(stage):
    one, two, three = (
        stage.process([seen_on(*pictures, identity=str(pictures))])[0] for pictures in ((1,), (1, 2), (1, 2, 3))
    )
    assert apart(one, two).mean() > 1
    assert apart(two, three).mean() > 0.5


def test_a_picture_given_twice_draws_what_it_draws_alone_and_order_is_nothing(stage):
    alone, twice, forth, back = (
        stage.process([seen_on(*pictures, identity=str(pictures))])[0] for pictures in ((1,), (1, 1), (1, 2), (2, 1))
    )
    assert apart(alone, twice).max() <= 1
    assert apart(forth, back).max() <= 1


def test_a_picture_that_is_not_used_changes_no_bit(stage):
    """Its id picture is not made at all; its embeddings stay in their lists."""
    (alone,) = stage.process([seen_on(1)])
    beside = seen_on(1, 2, identity="with another", used=[True, False], more_id_pictures=None)
    assert stage.process([beside])[0] == alone


def test_identities_of_one_two_and_three_pictures_are_drawn_together(stage):
    rows = [seen_on(*pictures, identity=str(pictures)) for pictures in ((1, 2, 3), (4,), (5, 6), (7,))]
    sizes, paint = [], stage._painter.paint
    stage._painter.paint = lambda jobs, how: sizes.append(len(jobs)) or paint(jobs, how)
    together = stage.process(rows)
    assert sizes == [4]
    for alone, beside in zip(rows, together, strict=True):
        assert apart(stage.process([alone])[0], beside).max() <= 1


@torch.no_grad()
def test_the_adapter_is_hyperloras_of_all_pictures(stage):
    painter = stage._painter
    given, paint = [], painter.paint
    painter.paint = lambda jobs, how: given.extend(job.identity for job in jobs) or paint(jobs, how)
    stage.process([seen_on(1, 2, 3)])
    made = painter.adapters[given[0].key]
    features = torch.cat([painter.clip.penultimate(face(n)) for n in (1, 2, 3)])
    expected = painter.hyperlora.lora(
        painter.hyperlora.tokens(torch.stack([embedding(n) for n in (1, 2, 3)]), features)
    )
    for name, pair in expected.items():
        torch.testing.assert_close(made[name].down, pair.down, atol=1e-6, rtol=0)
        torch.testing.assert_close(made[name].up, pair.up, atol=1e-6, rtol=0)


def test_id_pictures_can_be_shown_in_grey(models, monkeypatch):
    """All of them, as released: by luma, and nothing else of the row."""
    stage, shown = started(models, monkeypatch, grayscale=True), []
    look = stage._painter.clip.penultimate
    monkeypatch.setattr(stage._painter.clip, "penultimate", lambda rgb: shown.append(rgb) or look(rgb))
    stage.process([seen_on(1, 2)])
    assert len(shown) == 2
    for grey, number in zip(shown, (1, 2), strict=True):
        assert np.abs(grey - (face(number) @ (0.299, 0.587, 0.114))[..., None]).max() <= 1


def test_a_further_id_picture_that_cannot_be_read_fails_its_row_alone(stage):
    broken = seen_on(1, 2, more_id_pictures=[{"bytes": b"not a picture", "path": None}])
    failed, drawn = stage.process([broken, seen_on(3, identity="other")])
    assert isinstance(failed, RowError)
    assert failed.kind == "broken_image"
    assert failed.message.startswith("id picture 1 (0 is the first): ")
    assert picture(drawn).shape == (64, 88, 3)


# -- what attempts are compared with -----------------------------------------------------------------------------------


def test_attempts_are_compared_with_the_mean_of_the_used_embeddings(models, monkeypatch):
    enhance = {"enhance": "hyperlora", "width": 64, "height": 64}
    stage = started(models, monkeypatch, detail={"enabled": False}, reference=enhance)
    first, second, unused = (embedding(1000 + n).numpy() for n in (1, 2, 3))
    mean = (first + second) / np.linalg.norm(first + second)
    monkeypatch.setattr(stage._faces, "find", lambda rgb: [found((30, 20, 50, 44), toward(mean, 0.8))])
    people, paint = [], stage._painter.paint
    monkeypatch.setattr(stage._painter, "paint", lambda j, how: people.extend(p.identity for p in j) or paint(j, how))
    columns = {"used": [True, True, False], "reference_prompt": None}
    columns |= {"more_id_pictures": [images.encode(face(2))]}
    (result,) = stage.process([seen_on(1, 2, 3, **columns)])
    assert result["first_frame_similarity"] == pytest.approx(0.8, abs=1e-5)
    assert result["reference_similarity"] == pytest.approx(0.8, abs=1e-5)
    assert abs(first @ unused) < 0.2, "with the third in it the mean would be another"
    assert [len(person.pictures) for person in people] == [2, 2], "the enhanced reference is drawn from both too"


# -- through the stages before -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_several_pictures_from_faces_to_the_frame(mini_models):
    """Two pictures of one person are used; where they disagree, what is drawn is what the first gives alone."""
    astronaut = np.ascontiguousarray(skimage.data.astronaut()[10:230, 110:330])
    closer = np.ascontiguousarray(skimage.data.astronaut()[20:220, 120:320])
    someone = np.ascontiguousarray(sample_picture("t1")[200:470, 1040:1280])
    gate = {"odd_one_out": {"cosine": 0.8}}  # random networks find all faces somewhat alike
    faces = {"det_sizes": [256], "gates": gate}
    values = {"models": {"root": str(mini_models)}, "faces": faces, "first_frame": {"attempts": 1}}
    stages = make_stages(config.load("cpu-mini", values=values), "first_frame")
    sets = [(astronaut,), (astronaut, closer), (astronaut, someone), (astronaut, someone, closer)]
    keys = {"sample_id": "one/1", "image_prompt": row()["image_prompt"]}
    rows = [row_of(*pictures, identity_id=str(n), **keys) for n, pictures in enumerate(sets)]
    for each in stages:
        if each.name in ("faces", "matting", "first_frame"):
            each.setup(StageContext("cpu", 1, NoMedia(), "run"))
            for known, made in zip(rows, each.process(rows), strict=True):
                assert isinstance(made, dict), made
                known |= made
            each.teardown()
    assert [r["reference_used"] for r in rows] == [[True], [True, True], [True, False], [True, False, True]]
    assert [len(r["more_id_pictures"] or ()) for r in rows] == [0, 1, 0, 1]
    alone, both, disagreeing, two_of_three = rows
    assert disagreeing["odd_references"] == [0, 1]
    assert apart(alone, disagreeing).max() <= 1
    assert apart(both, two_of_three).max() <= 1
    assert apart(alone, both).mean() > 0.5
