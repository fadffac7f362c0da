"""Size, sharpness and pose of faces, and what several reference pictures say of each other."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from face_pictures import ASTRONAUT, astronaut

from ipvg_ray.models import face_quality
from ipvg_ray.models.face_quality import Pose, Quality, flaws, odd_ones, pose, quality, sharpness, spread, used_ones


def turned(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """The mean face's five points on a picture, (5, 2), as a far camera sees the head turned by these degrees.

    It looks straight ahead first: the mean shape is turned back by what the average frontal face measures.
    """
    ahead = face_quality._ahead()
    y, p, r = np.radians([yaw + ahead[0], pitch + ahead[1], roll])
    about_y = np.array([[np.cos(y), 0, -np.sin(y)], [0, 1, 0], [np.sin(y), 0, np.cos(y)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(p), np.sin(p)], [0, -np.sin(p), np.cos(p)]])
    about_z = np.array([[np.cos(r), -np.sin(r), 0], [np.sin(r), np.cos(r), 0], [0, 0, 1]])
    points = face_quality._mean_face() @ (about_z @ about_y @ about_x).T
    return points[:, :2] * 80 + (300, 200)


@pytest.mark.parametrize(
    "angles", [(0, 0, 0), (25, 0, 0), (-40, 10, 0), (0, 25, 0), (0, -25, 0), (-30, 0, 20), (20, 15, -40)]
)
def test_the_turn_of_a_head_is_found(angles: tuple[float, float, float]) -> None:
    found = pose(turned(*angles))
    assert np.abs(np.array([found.yaw, found.pitch, found.roll]) - angles).max() < 4


def test_the_signs_are_those_of_the_picture() -> None:
    ahead = turned(0, 0, 0)
    right, up = turned(30, 0, 0), turned(0, 20, 0)
    nose, eyes = 2, slice(0, 2)
    assert right[nose, 0] - right[eyes, 0].mean() > ahead[nose, 0] - ahead[eyes, 0].mean() + 5
    assert up[nose, 1] - up[eyes, 1].mean() < ahead[nose, 1] - ahead[eyes, 1].mean() - 5
    tilted = turned(0, 0, 20)
    assert tilted[1, 1] > tilted[0, 1], "clockwise: the right eye of the picture is the lower one"


def test_the_average_frontal_face_looks_ahead() -> None:
    from insightface.utils.face_align import arcface_dst

    found = pose(arcface_dst * 3 + 40)
    assert np.allclose([found.yaw, found.pitch], 0, atol=0.1)
    assert abs(found.roll) < 1


def test_points_that_are_no_face_give_numbers() -> None:
    for points in (np.zeros((5, 2)), np.arange(10.0).reshape(5, 2), np.full((5, 2), 1e6)):
        found = pose(points)
        assert np.isfinite([found.yaw, found.pitch, found.roll]).all()


def test_blur_lowers_sharpness_and_light_does_not() -> None:
    picture = astronaut()
    sharp = sharpness(picture, ASTRONAUT)
    blurred = [sharpness(cv2.GaussianBlur(picture, (0, 0), sigma), ASTRONAUT) for sigma in (1, 2)]
    assert sharp > 2 * blurred[0] > 3 * blurred[1]
    darker = (picture * 0.5).astype(np.uint8)
    assert sharpness(darker, ASTRONAUT) == pytest.approx(sharp, rel=0.2), "rounding to half the levels adds noise"


def test_sharpness_at_edges_and_of_nothing() -> None:
    picture = astronaut()
    assert sharpness(picture, np.array([-50, -50, 60, 60], np.float32)) > 0
    assert sharpness(picture, np.array([600, 600, 700, 700], np.float32)) == 0
    assert sharpness(np.full((40, 40, 3), 7, np.uint8), np.array([0, 0, 40, 40], np.float32)) == 0


def test_size_is_the_shorter_edge() -> None:
    assert quality(astronaut(), np.array([10, 10, 60, 90], np.float32), turned(0, 0, 0)).size == 50


def test_flaws_are_named_at_their_limits() -> None:
    limits = {"size": 80.0, "sharpness": 0.004, "yaw": 45.0, "pitch": 35.0}

    def names(size: float = 80, sharpness: float = 0.004, yaw: float = 45, pitch: float = 35) -> list[str]:
        return [name for name, _ in flaws(Quality(size, sharpness, Pose(yaw, pitch, 170)), **limits)]

    assert names() == []
    assert names(size=79) == ["too_small"]
    assert names(sharpness=0.0039) == ["blurred"]
    assert names(yaw=-46) == names(pitch=-36) == ["turned_away"]
    assert names(1, 0, 90, 0) == ["too_small", "blurred", "turned_away"]


def test_spread_and_the_odd_one_out() -> None:
    rng = np.random.default_rng(0)

    def person() -> np.ndarray:
        return rng.standard_normal(512)

    def views(centre: np.ndarray, count: int) -> list[np.ndarray]:
        return [(v := centre + 0.5 * rng.standard_normal(512)) / np.linalg.norm(v) for _ in range(count)]

    one, other = person(), person()
    same = np.stack(views(one, 4))
    assert odd_ones(same, 0.3) == []
    assert spread(same) == pytest.approx(0.2, abs=0.05)
    mixed = np.stack([*views(one, 2), *views(other, 1), *views(one, 1)])
    assert odd_ones(mixed, 0.3) == [2]
    assert spread(mixed) > 0.4
    pair = np.stack([*views(one, 1), *views(other, 1)])
    assert odd_ones(pair, 0.3) == [0, 1], "nothing tells which of two is right"
    assert odd_ones(same[:1], 0.3) == []
    assert spread(same[:1]) is None


def test_which_pictures_are_used() -> None:
    assert used_ones(1, [], 4) == [True]
    assert used_ones(4, [], 4) == [True] * 4
    assert used_ones(4, [], 2) == [True, True, False, False]
    assert used_ones(4, [2], 4) == [True, True, False, True]
    assert used_ones(4, [1], 2) == [True, False, True, False], "the odd one takes no place"
    assert used_ones(2, [0, 1], 4) == [True, False], "of two that disagree the first stands"
    assert used_ones(3, [0], 4) == [True, False, False], "the others agree, but show someone else than the first"
