"""Where a face is to stand in the frame and how it is turned, as the picture that pose ControlNets for faces read."""

from __future__ import annotations

import cv2
import numpy as np

_COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
"""Of left eye, right eye, nose, left and right corner of the mouth (as seen), as InstantID draws them."""

_NOSE = 2
_LINE, _DOT, _DIMMED = 4, 10, 0.6


def placed(
    landmarks_5: np.ndarray, face_box: np.ndarray, size: tuple[int, int], share: float, centre: tuple[float, float]
) -> np.ndarray:
    """Five landmarks of a reference picture, moved and scaled into the frame; how the face is turned stays.

    Args:
        landmarks_5: (5, 2), pixels of the reference picture.
        face_box: (4,), x0, y0, x1, y1 there.
        size: the frame's height and width.
        share: of the frame's height that the face is to be high.
        centre: of the face, as shares of width and height.

    Returns:
        float64 (5, 2), pixels of the frame.
    """
    height, width = size
    box = np.asarray(face_box, np.float64)
    scale = share * height / max(float(box[3] - box[1]), 1.0)
    middle = (box[:2] + box[2:]) / 2
    result: np.ndarray = (np.asarray(landmarks_5, np.float64) - middle) * scale + np.array(centre) * (width, height)
    return result


def keypoint_picture(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Dimmed lines from the nose to the other points, and a dot on each: RGB uint8 (height, width, 3) on black."""
    picture: np.ndarray = np.zeros((*size, 3), np.uint8)
    whole = [(round(float(x)), round(float(y))) for x, y in points]
    for place, colour in enumerate(_COLOURS):
        if place != _NOSE:
            cv2.line(picture, whole[place], whole[_NOSE], colour, 2 * _LINE, cv2.LINE_AA)
    picture = (picture * _DIMMED).astype(np.uint8)
    for point, colour in zip(whole, _COLOURS, strict=True):
        cv2.circle(picture, point, _DOT, colour, -1, cv2.LINE_AA)
    return picture
