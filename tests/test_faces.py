"""Faces on pictures by the miniature packs, and the choice of one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from face_pictures import ASTRONAUT, Picture, astronaut, face, sample_picture
from PIL import Image

from ipvg_ray.models.faces import Face, FaceAnalyser, NoFaceError, SeveralFacesError, choose, iou, matching


@pytest.fixture(scope="session")
def analyser(packs: Path) -> FaceAnalyser:
    return FaceAnalyser(packs / "insightface/models/mini_buffalo_l", det_sizes=(640,))


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_each_rule_chooses_its_own_face() -> None:
    large, central, confident = face(0, 0, 40, 0.6), face(45, 45, 10, 0.7), face(80, 80, 15, 0.95)
    found = [central, confident, large]
    assert choose(found, "largest", (100, 100)) is large
    assert choose(found, "centre", (100, 100)) is central
    assert choose(found, "confident", (100, 100)) is confident


def test_the_centre_is_taken_in_width_and_height_order() -> None:
    right, low = face(85, 5), face(5, 35)
    assert choose([right, low], "centre", (180, 20)) is right
    assert choose([right, low], "centre", (20, 80)) is low


def test_error_refuses_several_faces_and_accepts_one() -> None:
    only = face()
    assert choose([only], "error", (100, 100)) is only
    with pytest.raises(SeveralFacesError, match="2 faces"):
        choose([only, face(50)], "error", (100, 100))
    with pytest.raises(NoFaceError):
        choose([], "largest", (100, 100))


def test_the_matching_face_is_the_one_that_overlaps_most() -> None:
    box = np.array([0, 0, 10, 10], np.float32)
    assert iou(box, np.array([5, 0, 15, 10], np.float32)) == pytest.approx(1 / 3)
    assert iou(box, np.array([20, 20, 30, 30], np.float32)) == 0
    near, nearer = face(4), face(1)
    assert matching([near, nearer], box) is nearer
    assert matching([face(8)], box) is None
    assert matching([], box) is None


def test_area_and_normed_embedding() -> None:
    assert face(side=4).area == 16
    assert face().normed_embedding is None
    assert face().embedding_norm is None
    raw = np.full(512, 2, np.float32)
    some = Face(np.zeros(4, np.float32), 1.0, np.zeros((5, 2), np.float32), embedding=raw)
    assert np.linalg.norm(some.normed_embedding) == pytest.approx(1)
    assert some.embedding_norm == pytest.approx(2 * 512**0.5)
    assert some.embedding is raw


# --- detection --------------------------------------------------------------------------------------------------------


def test_the_astronaut_is_found_where_she_is(analyser: FaceAnalyser) -> None:
    (found,) = analyser.faces(astronaut())
    assert iou(found.box, ASTRONAUT) > 0.8
    assert found.score > 0.8
    assert found.landmarks_106.shape == (106, 2)
    assert found.gender in ("female", "male")
    assert 0 < found.age < 100
    right_eye, left_eye, nose, _, _ = found.landmarks_5
    # Read off the picture: her eyes are near (203, 105) and (241, 105), the tip of her nose near (222, 128).
    assert np.abs(np.stack([right_eye, left_eye, nose]) - [[203, 105], [241, 105], [222, 128]]).max() < 9
    inside = (found.landmarks_106 > found.box[:2] - 5) & (found.landmarks_106 < found.box[2:] + 5)
    assert inside.all()


def test_boxes_agree_with_scikit_images_own_cascade(analyser: FaceAnalyser) -> None:
    from skimage.feature import Cascade

    cascade = Cascade(skimage.data.lbp_frontal_face_cascade_filename())
    theirs = cascade.detect_multi_scale(astronaut(), 1.1, 1, (60, 60), (200, 200))
    (ours,) = analyser.faces(astronaut())
    boxes = [np.array([t["c"], t["r"], t["c"] + t["width"], t["r"] + t["height"]]) for t in theirs]
    assert max(iou(ours.box, box) for box in boxes) > 0.6


def test_channels_are_taken_as_rgb(analyser: FaceAnalyser) -> None:
    # The embedding is of a crop turned back to RGB by insightface: swapped channels must change it.
    (right,), (swapped,) = analyser.faces(astronaut()), analyser.faces(astronaut()[:, :, ::-1])
    raw = right.embedding
    crop_session = analyser._models["recognition"].session
    aligned = _aligned(astronaut(), right.landmarks_5)
    expected = crop_session.run(None, {"input.1": (aligned.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]})[
        0
    ][0]
    assert np.abs(raw - expected).max() < 0.02 * np.abs(expected).max()
    assert np.abs(raw - swapped.embedding).max() > 0.1 * np.abs(raw).max()


def _aligned(rgb: Picture, points: np.ndarray) -> Picture:
    from insightface.utils import face_align

    return np.asarray(face_align.norm_crop(rgb, points, image_size=112))


@pytest.mark.parametrize("name", ["cat", "chelsea", "coffee", "rocket"])
def test_no_face_on_pictures_without_one(analyser: FaceAnalyser, name: str) -> None:
    assert analyser.faces(np.asarray(getattr(skimage.data, name)())) == []


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_no_face_on_a_blank_picture(analyser: FaceAnalyser, grey: int) -> None:
    assert analyser.faces(np.full((300, 200, 3), grey, np.uint8)) == []


@pytest.mark.slow
@pytest.mark.parametrize("side", [64, 96, 128, 200, 256, 384, 512])
def test_no_face_on_noise(packs: Path, side: int) -> None:
    analyser = FaceAnalyser(packs / "insightface/models/mini_buffalo_l", det_sizes=(640, 512, 384, 256))
    random = np.random.default_rng(side)
    for _ in range(3):
        assert analyser.faces(random.integers(0, 256, (side, side, 3), np.uint8)) == []


def test_a_crowd_and_a_close_up(analyser: FaceAnalyser) -> None:
    crowd = analyser.faces(sample_picture("t1"))
    expected = np.array([[1115, 278, 1232, 395], [725, 355, 843, 473], [449, 274, 581, 406]], np.float32)
    assert all(max(iou(f.box, box) for f in crowd) > 0.6 for box in expected)
    (close_up,) = analyser.faces(sample_picture("Tom_Hanks_54745"))
    assert iou(close_up.box, np.array([15, 18, 98, 102], np.float32)) > 0.7


def test_embeddings_tell_faces_apart_and_know_them_again(analyser: FaceAnalyser) -> None:
    (one,) = analyser.faces(astronaut())
    (again,) = analyser.faces(np.asarray(Image.fromarray(astronaut()).resize((400, 400))))
    crowd = analyser.faces(sample_picture("t1"))
    same = float(one.normed_embedding @ again.normed_embedding)
    others = [float(one.normed_embedding @ f.normed_embedding) for f in crowd]
    assert max(others) < 0.7
    assert same > max(others) + 0.1
    assert 5 < np.linalg.norm(one.embedding) < 50, "raw, not normalised"


def test_two_calls_give_the_same_numbers(analyser: FaceAnalyser) -> None:
    (one,), (two,) = analyser.faces(astronaut()), analyser.faces(astronaut())
    for field in ("box", "landmarks_5", "landmarks_106", "embedding"):
        assert np.array_equal(getattr(one, field), getattr(two, field)), field
    assert (one.score, one.gender, one.age) == (two.score, two.gender, two.age)


def test_sizes_are_tried_in_order_until_one_shows_a_face(packs: Path) -> None:
    pack = packs / "insightface/models/mini_buffalo_l"
    tried: list[tuple[int, int]] = []

    def watched(*sizes: int) -> list[Face]:
        analyser = FaceAnalyser(pack, det_sizes=sizes, modules=("detection",))
        detector = analyser._detector.model
        forward = detector.forward
        tried.clear()

        def record(picture: np.ndarray, threshold: float) -> Any:
            tried.append(picture.shape[:2])
            return forward(picture, threshold)

        detector.forward = record
        return analyser.faces(astronaut())

    # Below 55 pixels of the detector's square a face is too small: hers is 96 of 512, so 24 of 128.
    assert watched(128) == []
    assert len(watched(128, 640, 512)) == 1
    assert tried == [(128, 128), (640, 640)]
    (found,) = watched(512, 256)
    assert tried == [(512, 512)]
    assert found.landmarks_106 is None
    assert found.embedding is None
    assert found.gender is None


def test_small_and_odd_pictures_and_wrong_arrays(analyser: FaceAnalyser) -> None:
    assert analyser.faces(np.zeros((1, 1, 3), np.uint8)) == []
    assert analyser.faces(np.zeros((3, 700, 3), np.uint8)) == []
    for wrong in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((0, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            analyser.faces(wrong)


def test_missing_packs_say_what_mends_them(packs: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"buffalo_l\.zip"):
        FaceAnalyser(tmp_path / "buffalo_l", det_sizes=(640,))
    (tmp_path / "antelopev2/antelopev2").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="move them up"):
        FaceAnalyser(tmp_path / "antelopev2", det_sizes=(640,))
    headless = tmp_path / "headless"
    headless.mkdir()
    whole = packs / "insightface/models/mini_buffalo_l"
    (headless / "genderage.onnx").write_bytes((whole / "genderage.onnx").read_bytes())
    with pytest.raises(FileNotFoundError, match="no face detector"):
        FaceAnalyser(headless, det_sizes=(640,))
    for sizes in ((), (100,), (0,)):
        with pytest.raises(ValueError, match="det_sizes"):
            FaceAnalyser(whole, det_sizes=sizes)


def test_nothing_is_printed(packs: Path) -> None:
    program = (
        "import numpy as np, skimage.data, sys\nfrom pathlib import Path\n"
        "from ipvg_ray.models.faces import FaceAnalyser\n"
        "a = FaceAnalyser(Path(sys.argv[1]), det_sizes=(512,)); assert a.faces(np.asarray(skimage.data.astronaut()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(packs / "insightface/models/mini_buffalo_l")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    assert "Warning" not in done.stderr
