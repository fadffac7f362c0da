"""The reference picture's geometry: a box and a mask from 106 landmarks, the person on grey.

Coordinates are pixels, x to the right, y down, (0, 0) the centre of the upper left pixel; landmarks stand in
insightface's order of 106. The geometry is HyperLoRA's, which was trained on such pictures (arXiv 2503.16944); with
`landmark_mask` it is what the released IPVG-STD code does, with a person's matte (`matte_network`, `matte_refine`) what
its paper (arXiv 2507.04705, eq. 1) describes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

ID_SIDE = 1024
"""Longest side of the id picture, pixels: the encoder reads 224, and blending 10,000 × 10,000 would take gigabytes."""
GREY = 127
"""What stands where the person does not, in all three channels."""

_OUTLINE = (1, *range(9, 17), *range(2, 9), 0, *range(24, 17, -1), *range(32, 24, -1), 17)
_BROWS = (101, 105, 104, 103, 102, 50, 51, 49, 48, 43)
FACE_POLYGON = (*_OUTLINE, *_BROWS)
"""The 43 landmarks around the face in drawing order: one cheek down to the chin, the other cheek up, then the brows."""

_MASK_SIDE = 512
_MASK_SIGMA = 15.0  # Pillow's "radius" of a Gaussian blur is its standard deviation


class LandmarkError(ValueError):
    """Landmarks from which no picture can be cut."""


def landmark_box(landmarks: np.ndarray) -> tuple[float, float, float]:
    """The square around a face that HyperLoRA's image encoder sees.

    Its centre is the middle of the landmarks' bounding box moved up by 1/8 of the half edge; its half edge is 0.75
    times the bounding box's longer edge.

    Args:
        landmarks: (106, 2).

    Returns:
        Centre x, centre y and half edge. The square may reach beyond the picture.

    Raises:
        LandmarkError: for another shape, or landmarks that are no numbers or all one point.
    """
    low, high = _extent(_checked(landmarks))
    half = 0.75 * float((high - low).max())
    x, y = (low + high) / 2
    return float(x), float(y) - half / 8, half


def face_polygon(landmarks: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """The 43 points of `FACE_POLYGON`, float64 (43, 2), scaled about their mean.

    Args:
        landmarks: (106, 2).
        scale: 1.0 for the id picture, 1.4 for taking the face out of HyperLoRA's base picture.

    Raises:
        LandmarkError: as `landmark_box`.
    """
    points = _checked(landmarks)[list(FACE_POLYGON)]
    centre = points.mean(axis=0)
    return centre + scale * (points - centre)


def face_square(landmarks: np.ndarray) -> tuple[float, float, float]:
    """The square in which a face is masked: centre x, centre y and half edge, as `crop_square` takes them.

    Its centre is the mean of `face_polygon`, its half edge 0.8 times the polygon's longer edge.

    Args:
        landmarks: (106, 2).

    Raises:
        LandmarkError: as `landmark_box`.
    """
    polygon = face_polygon(landmarks)
    low, high = _extent(polygon)
    x, y = polygon.mean(axis=0)
    return float(x), float(y), 0.8 * float((high - low).max())


def landmark_mask(shape: Sequence[int], landmarks: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """The face polygon as a soft mask, float32 (H, W), 0 outside to 1 inside.

    Drawn and blurred at 512x512 in `face_square`, beyond which it is 0 whatever the scale, so the softness grows with
    the face; then brought to the picture's scale and pasted in.

    Args:
        shape: of the picture; H and W are its first two numbers.
        landmarks: (106, 2).
        scale: of the polygon, as in `face_polygon`.

    Raises:
        LandmarkError: as `landmark_box`.
    """
    polygon, square = face_polygon(landmarks, scale), face_square(landmarks)
    left, top, side = _square(*square)
    # Pixel centres: the first of `side` pixels covers the first 512/side pixels of the drawing.
    points = (polygon - (left, top) + 0.5) * (_MASK_SIDE / side) - 0.5
    mask: np.ndarray = np.zeros((_MASK_SIDE, _MASK_SIDE), np.float32)
    bits = 4  # of the fraction, in fillPoly's fixed-point numbers
    cv2.fillPoly(mask, [np.round(points * (1 << bits)).astype(np.int32)], (1.0,), shift=bits)
    mask = cv2.GaussianBlur(mask, (0, 0), _MASK_SIGMA, borderType=cv2.BORDER_CONSTANT)
    mask = cv2.resize(mask, (side, side), interpolation=cv2.INTER_LINEAR)
    return paste_square(np.clip(mask, 0, 1), shape, *square)


def crop_square(image: np.ndarray, cx: float, cy: float, half: float, fill: float = GREY) -> np.ndarray:
    """The square of round(2 · half) pixels, from round(cx - half), round(cy - half) on; `fill` outside the picture.

    Args:
        image: (H, W) or (H, W, C), any dtype.

    Raises:
        LandmarkError: for a centre or half edge that is no number, or a half edge not above 0 and below 16,384 px.
    """
    left, top, side = _square(cx, cy, half)
    square = np.full((side, side, *image.shape[2:]), fill, dtype=image.dtype)
    inside, there = _overlap(image.shape, left, top, side)
    square[there] = image[inside]
    return square


def cut_square(image: np.ndarray, cx: float, cy: float, half: float) -> np.ndarray:
    """What of the square of `crop_square` lies in the picture; no copy.

    Raises:
        LandmarkError: as `crop_square`, and where nothing of it does.
    """
    inside, _ = _overlap(image.shape, *_square(cx, cy, half))
    if not image[inside].size:
        raise LandmarkError("the face lies outside of the picture; detect it again")
    return image[inside]


def paste_square(square: np.ndarray, shape: Sequence[int], cx: float, cy: float, half: float) -> np.ndarray:
    """A picture of that height and width, 0 all over but for a square that `crop_square` gave with the same numbers."""
    left, top, side = _square(cx, cy, half)
    picture = np.zeros((*shape[:2], *square.shape[2:]), dtype=square.dtype)
    inside, there = _overlap(shape, left, top, side)
    picture[inside] = square[there]
    return picture


def id_crop(rgb: np.ndarray, alpha: np.ndarray, landmarks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Picture and matte cropped to `landmark_box`: uint8 (S, S, 3) and float32 (S, S), S at most `ID_SIDE`.

    Args:
        rgb: uint8 (H, W, 3).
        alpha: (H, W), 0 background to 1 person.
        landmarks: (106, 2).

    Raises:
        LandmarkError: as `landmark_box`.
        ValueError: where the picture and the matte are not of one size.
    """
    if rgb.shape[:2] != alpha.shape:
        raise ValueError(
            f"the picture is {rgb.shape[:2]} and its matte {alpha.shape} (height, width); they must be equal"
        )
    box = landmark_box(landmarks)
    person, share = crop_square(rgb, *box), crop_square(alpha.astype(np.float32), *box, fill=0)
    if person.shape[0] > ID_SIDE:
        size = (ID_SIDE, ID_SIDE)
        person, share = (cv2.resize(a, size, interpolation=cv2.INTER_AREA) for a in (person, share))
    return person, share


def on_grey(person: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The person on grey 127: uint8 (H, W, 3) from colours of that kind and a matte (H, W), 0 to 1."""
    share = share.astype(np.float32)[..., None]
    return np.round(person.astype(np.float32) * share + GREY * (1 - share)).astype(np.uint8)


def rgba(person: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Colours with the matte as their alpha: uint8 (H, W, 4)."""
    return np.dstack([person, np.round(share * 255).astype(np.uint8)])


def _checked(landmarks: np.ndarray) -> np.ndarray:
    points = np.asarray(landmarks, dtype=np.float64)
    if points.shape != (106, 2):
        raise LandmarkError(f"landmarks have shape {points.shape}; 106 points as (106, 2) are needed")
    if not np.isfinite(points).all() or not np.ptp(points, axis=0).any():
        raise LandmarkError("landmarks hold values that are no numbers, or are all one point; detect the face again")
    return points


def _extent(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return points.min(axis=0), points.max(axis=0)


def _square(cx: float, cy: float, half: float) -> tuple[int, int, int]:
    """Left, top and edge in whole pixels; halves are rounded up, not to even, so that a shift keeps the crop."""
    if not all(map(math.isfinite, (cx, cy, half))) or not 0 < half < 16384:
        raise LandmarkError(
            f"no square around ({cx}, {cy}) with half edge {half}; it must be above 0 and below 16384 pixels"
        )
    left, top, side = (math.floor(v + 0.5) for v in (cx - half, cy - half, 2 * half))
    return left, top, max(1, side)


def _overlap(shape: Sequence[int], left: int, top: int, side: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The part of a square that lies in a picture: its slices in the picture, and in the square."""
    height, width = shape[:2]
    y0, y1 = (min(max(v, 0), height) for v in (top, top + side))
    x0, x1 = (min(max(v, 0), width) for v in (left, left + side))
    return (slice(y0, y1), slice(x0, x1)), (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
