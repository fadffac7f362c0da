"""The face detail pass' geometry, worked out by hand, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest

from ipvg_ray.models import pose
from ipvg_ray.models.face_detail import Crop, Geometry, crops, feathered

SIZE = (480, 832)
FACE = np.array([300, 150, 402, 278], np.float32)


def box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([x0, y0, x1, y1], np.float32)


def one(face: np.ndarray, **changes: int | float) -> Crop:
    (crop,) = crops([face], SIZE, Geometry(**changes))
    return crop


def test_a_window_of_twice_the_box_is_drawn_so_that_its_longer_edge_is_1024():
    """102×128: window 204×256; 1024/102 would make it 2570 high, so it is drawn 4 times as large, 816 → 832 wide."""
    crop = one(FACE)
    assert (crop.width, crop.height) == (832, 1024)
    assert crop.window == (247, 86, 455, 342)  # 208 = 832/4 wide: 4 more than twice the box
    assert crop.box == (290, 140, 412, 288)


def test_the_shorter_edge_is_the_guide():
    crop = one(box(300, 150, 400, 200), guide=160)
    assert (crop.width, crop.height) == (640, 320)  # 160/50 times 200×100
    assert crop.window == (250, 125, 450, 225)


def test_a_large_face_is_never_shrunk_and_its_window_stays_in_the_picture():
    crop = one(box(200, 20, 600, 460), guide=256)
    assert crop.window[1::2] == (0, 480)
    assert (crop.width, crop.height) == (768, 512)
    x0, _, x1, _ = crop.window
    assert 0 <= x0 < x1 <= 832


@pytest.mark.parametrize("face", [box(-20, -30, 60, 70), box(800, 440, 860, 500), box(0, 0, 832, 480)])
def test_faces_at_the_edge(face):
    crop = one(face)
    x0, y0, x1, y1 = crop.window
    assert 0 <= x0 < x1 <= 832
    assert 0 <= y0 < y1 <= 480
    assert x0 <= crop.box[0] < crop.box[2] <= x1
    assert y0 <= crop.box[1] < crop.box[3] <= y1
    assert crop.width % 64 == crop.height % 64 == 0
    assert max(crop.width, crop.height) <= 1024


def test_small_faces_are_left_and_the_largest_come_first():
    faces = [box(10, 10, 20, 60), box(100, 100, 150, 160), box(300, 100, 420, 250), box(500, 50, 540, 100)]
    found = crops(faces, SIZE, Geometry(most=2))
    assert [crop.box[0] for crop in found] == [290, 90]
    assert len(crops(faces, SIZE, Geometry())) == 3
    assert crops([], SIZE, Geometry()) == []


def test_the_mask_is_the_grown_box_unfeathered():
    crop = one(FACE)
    mask = crop.mask()
    ys, xs = np.nonzero(mask)
    assert mask.shape == (1024, 832)
    assert (xs.min(), xs.max() + 1) == ((290 - 247) * 4, (412 - 247) * 4)
    assert (ys.min(), ys.max() + 1) == ((140 - 86) * 4, (288 - 86) * 4)
    assert mask.sum() == 488 * 592


def test_the_rim_is_soft_and_ends():
    share = feathered(SIZE, (290, 140, 410, 288), 5)
    row = share[200]
    assert (row[:285] == 0).all()
    assert (row[415:] == 0).all()
    assert 0 < row[285] < row[286] < row[289] < 0.5 < row[290] < row[294] < 1
    assert row[295:405] == pytest.approx(1)
    assert np.array_equal(feathered(SIZE, (290, 140, 410, 288), 0), feathered(SIZE, (290, 140, 410, 288), 0) > 0)
    assert feathered(SIZE, (0, 0, 100, 100), 5)[:95, :95] == pytest.approx(1)  # the picture's edge is no rim


@pytest.mark.parametrize("face", [FACE, box(30, 40, 42, 52), box(-20, -30, 60, 70)])
def test_beyond_box_and_feather_no_bit_changes(face):
    picture = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    crop = one(face)
    drawn = np.full((crop.height, crop.width, 3), 255, np.uint8)
    before = picture.copy()
    result = crop.paste(picture, drawn, 5)
    x0, y0, x1, y1 = crop.box
    outside = np.ones(SIZE, bool)
    outside[max(0, y0 - 5) : y1 + 5, max(0, x0 - 5) : x1 + 5] = False
    assert np.array_equal(picture, before)
    assert np.array_equal(result[outside], picture[outside])
    inside = result[max(y0, 0) + 6 : y1 - 6, max(x0, 0) + 6 : x1 - 6]
    assert inside.size
    assert (inside == 255).all()


def test_cutting_keeps_the_place():
    picture = np.zeros((*SIZE, 3), np.uint8)
    picture[140:288, 290:412] = 200
    crop = one(FACE)
    cut = crop.cut(picture)
    assert cut.shape == (1024, 832, 3)
    assert (cut[crop.mask()] > 100).mean() > 0.99
    assert (cut[~crop.mask()] > 100).mean() < 0.01
    assert np.abs(crop.paste(picture, cut, 5).astype(int) - picture).max() <= 60  # resampling rings at hard edges


# -- the pose that a ControlNet is shown ------------------------------------------------------------------------------


def test_landmarks_are_moved_into_the_frame():
    landmarks = np.array([[40, 40], [60, 40], [50, 55], [42, 70], [58, 70]])
    placed = pose.placed(landmarks, box(30, 20, 70, 80), SIZE, share=0.5, centre=(0.25, 0.5))
    assert placed[2].tolist() == [208 + 0 * 4, 240 + 5 * 4]  # 60 px become 240: 4 times, about (208, 240)
    assert placed[0].tolist() == [208 - 40, 240 - 40]


def test_the_pose_is_five_dots_and_lines_to_the_nose():
    points = np.array([[300, 200], [400, 200], [350, 260], [310, 320], [390, 320]])
    picture = pose.keypoint_picture(points, SIZE)
    assert picture.shape == (*SIZE, 3)
    dots = [tuple(picture[y, x].tolist()) for x, y in points]
    assert dots == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)]
    assert tuple(picture[230, 325].tolist()) == (153, 0, 0)  # half way from the first eye to the nose, dimmed
    assert (picture.any(-1)).mean() < 0.05
