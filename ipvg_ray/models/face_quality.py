"""How good a face on a reference picture is: its size, its sharpness, and how far it is turned away."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

SIDE = 224
"""Side of the crop on which sharpness is measured, pixels: what CLIP's vision models see of a face."""

_MEAN_SHAPE = "meanshape_68.pkl"
_EYES = (slice(36, 42), slice(42, 48))
_NOSE_TIP, _MOUTH_CORNERS = 30, (48, 54)
_FAR = 10.0
"""Distance of the camera in widths of the mean face; so far away that perspective hardly matters."""


@dataclass(frozen=True)
class Pose:
    """Where a face looks, degrees; all zero for one that looks into the camera, upright.

    Attributes:
        yaw: positive towards the picture's right edge.
        pitch: positive up.
        roll: the head's tilt on the picture, positive clockwise.
    """

    yaw: float
    pitch: float
    roll: float


@dataclass(frozen=True)
class Quality:
    """Of one face. `size` is its box's shorter edge, pixels; `sharpness` as `sharpness` measures it."""

    size: float
    sharpness: float
    pose: Pose


def quality(rgb: np.ndarray, box: np.ndarray, landmarks_5: np.ndarray) -> Quality:
    """Measure one face.

    Args:
        rgb: uint8 (H, W, 3).
        box: (4,), x0, y0, x1, y1.
        landmarks_5: (5, 2), eyes, nose, mouth corners; of pairs, first the one further left on the picture.
    """
    size = float(min(box[2] - box[0], box[3] - box[1]))
    return Quality(size, sharpness(rgb, box), pose(landmarks_5))


def sharpness(rgb: np.ndarray, box: np.ndarray) -> float:
    """Variance of the Laplacian over variance of the grey values, of the face at 224 × 224 pixels; 0 for one colour.

    The variance of the Laplacian is Pech-Pacheco et al.'s measure of focus (ICPR 2000). Divided so, it depends neither
    on light nor on contrast. A face smaller than 224 pixels is enlarged, and so counts as blurred in the measure that
    it lacks detail.

    Args:
        rgb: uint8 (H, W, 3).
        box: (4,), x0, y0, x1, y1; what of it lies beyond the picture is left out.
    """
    height, width = rgb.shape[:2]
    left, right = np.clip([np.floor(box[0]), np.ceil(box[2])], 0, width).astype(int)
    top, bottom = np.clip([np.floor(box[1]), np.ceil(box[3])], 0, height).astype(int)
    if left >= right or top >= bottom:
        return 0.0
    grey = cv2.cvtColor(np.ascontiguousarray(rgb[top:bottom, left:right]), cv2.COLOR_RGB2GRAY)
    how = cv2.INTER_AREA if min(grey.shape) > SIDE else cv2.INTER_LINEAR
    crop = cv2.resize(grey, (SIDE, SIDE), interpolation=how).astype(np.float32)
    spread = float(crop.var(dtype=np.float64))
    return float(cv2.Laplacian(crop, cv2.CV_32F).var(dtype=np.float64)) / spread if spread > 1e-6 else 0.0


def pose(landmarks_5: np.ndarray) -> Pose:
    """How a head is turned, from five points: the turn of the mean 3D face whose picture they would be.

    The mean face is the one that insightface ships for its 68 landmarks; the average frontal face, to which ArcFace's
    inputs are aligned, counts as looking straight ahead. Five points give about five degrees. Points on one place or
    one line, which no face has, count as a face seen from the side.

    Args:
        landmarks_5: (5, 2), pixels, as `quality` takes them.
    """
    yaw, pitch, roll = _angles(landmarks_5)
    ahead = _ahead()
    return Pose(yaw - ahead[0], pitch - ahead[1], roll)


@lru_cache
def _ahead() -> tuple[float, float, float]:
    from insightface.utils.face_align import arcface_dst

    return _angles(arcface_dst)


def _angles(landmarks_5: np.ndarray) -> tuple[float, float, float]:
    """Yaw, pitch and roll of the mean face, degrees, as `Pose` has them."""
    points = np.asarray(landmarks_5, np.float64)
    # In a picture of its own, one unit wide, so that neither the picture's size nor the face's place matters.
    middle, extent = points.mean(axis=0), max(float(np.ptp(points, axis=0).max()), 1e-6)
    camera = np.array([[_FAR, 0, 0], [0, _FAR, 0], [0, 0, 1]])
    try:
        _, turn, _ = cv2.solvePnP(_mean_face(), (points - middle) / extent, camera, None, flags=cv2.SOLVEPNP_SQPNP)
    except cv2.error:  # the points lie on one place or one line
        return 90.0, 0.0, 0.0
    rotation = cv2.Rodrigues(turn)[0]
    across = rotation[:, 0]
    roll = np.arctan2(across[1], across[0])
    looks = -rotation[:, 2]
    # Yaw and pitch are those of the head turned upright.
    sideways = looks[0] * np.cos(roll) + looks[1] * np.sin(roll)
    down = looks[1] * np.cos(roll) - looks[0] * np.sin(roll)
    yaw, pitch = np.arctan2(sideways, -looks[2]), np.arctan2(-down, np.hypot(sideways, looks[2]))
    return float(np.degrees(yaw)), float(np.degrees(pitch)), float(np.degrees(roll))


@lru_cache
def _mean_face() -> np.ndarray:
    """float64 (5, 3): x to the right, y down, z away from the viewer; as wide as 1."""
    from insightface.data import get_object

    mean = np.asarray(get_object(_MEAN_SHAPE), np.float64) * (1, 1, -1)
    points = np.stack([*(mean[eye].mean(axis=0) for eye in _EYES), mean[_NOSE_TIP], *mean[list(_MOUTH_CORNERS)]])
    return np.asarray((points - points.mean(axis=0)) / np.ptp(points, axis=0)[:2].max())


def spread(embeddings: np.ndarray) -> float | None:
    """How much the pictures of one person differ: the mean of 1 - cosine over all pairs, 0 to 2; None for fewer than 2.

    Args:
        embeddings: (n, d), each of length 1.
    """
    if len(embeddings) < 2:
        return None
    return float(1 - _cosines(embeddings)[np.triu_indices(len(embeddings), 1)].mean())


def odd_ones(embeddings: np.ndarray, least: float) -> list[int]:
    """Pictures that do not show the person of the others: those whose cosine reaches `least` with fewer than half.

    Of two pictures that disagree both are odd: nothing tells which one is right.

    Args:
        embeddings: (n, d), each of length 1.
        least: cosine from which two pictures show one person, -1 to 1.
    """
    agree = (_cosines(embeddings) >= least).sum(axis=1) - 1
    return np.flatnonzero(agree < (len(embeddings) - 1) / 2).tolist()


def used_ones(count: int, odd: Collection[int], most: int) -> list[bool]:
    """For each picture of an identity whether its first frames are made from it: the first ones that are not odd.

    The first stands for the identity, so it is used always, and alone where it is odd itself: then the others show
    someone else, or nobody can tell whom.

    Args:
        count: how many pictures there are, at least 1.
        odd: places of those that `odd_ones` names.
        most: how many may be used, at least 1; the first ones are.
    """
    fitting = [0] if 0 in odd else [place for place in range(count) if place not in odd]
    chosen = set(fitting[:most])
    return [place in chosen for place in range(count)]


def _cosines(embeddings: np.ndarray) -> np.ndarray:
    cosines: np.ndarray = np.asarray(embeddings, np.float64) @ np.asarray(embeddings, np.float64).T
    np.fill_diagonal(cosines, 2.0)  # a picture agrees with itself, whatever rounding makes of it
    return cosines


def flaws(found: Quality, *, size: float, sharpness: float, yaw: float, pitch: float) -> Sequence[tuple[str, str]]:
    """(name, sentence) of what is wrong with a face by these limits: `too_small`, `blurred`, `turned_away`.

    Args:
        size: least edge of the box, pixels.
        sharpness: least sharpness.
        yaw, pitch: most that the face may be turned, degrees, either way.
    """
    wrong = []
    if found.size < size:
        wrong.append(("too_small", f"the face is {found.size:.0f} pixels, below {size:g}"))
    if found.sharpness < sharpness:
        wrong.append(("blurred", f"the face's sharpness is {found.sharpness:.3g}, below {sharpness:g}"))
    if abs(found.pose.yaw) > yaw or abs(found.pose.pitch) > pitch:
        turned = f"yaw {found.pose.yaw:.0f}° and pitch {found.pose.pitch:.0f}°, above {yaw:g}° or {pitch:g}°"
        wrong.append(("turned_away", f"the face is turned away: {turned}"))
    return wrong
