"""HyperLoRA's base picture: the person with the face blurred out; a Base LoRA takes hair, clothes and light from it."""

from __future__ import annotations

import cv2
import numpy as np

from ipvg_ray.models.matting import crop_square, landmark_box, landmark_mask

_FACE_SCALE = 1.4
"""Of the face polygon, so that the whole face disappears."""


def base_picture(rgb: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """A square of twice the id picture's box, its face blurred until nobody is recognised: uint8 RGB (S, S, 3).

    Neither released checkpoint has a Base LoRA, so how wide the square is and how strong the blur follow no source.

    Args:
        rgb: uint8 (H, W, 3).
        landmarks: (106, 2).

    Raises:
        LandmarkError: as `matting.landmark_box`.
    """
    x, y, half = landmark_box(landmarks)
    mask = landmark_mask(rgb.shape, landmarks, _FACE_SCALE)[..., None]
    blurred = cv2.GaussianBlur(rgb, (0, 0), half / 4)
    mixed = np.round(rgb * (1 - mask) + blurred * mask).astype(np.uint8)
    return crop_square(mixed, x, y, 2 * half)
