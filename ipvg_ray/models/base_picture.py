"""HyperLoRA's base picture: the person with the face blurred out; a Base LoRA takes hair, clothes and light from it.

The geometry is that of the released code (github.com/bytedance/ComfyUI-HyperLoRA, its node for the base condition).
"""

from __future__ import annotations

import cv2
import numpy as np

from ipvg_ray.models.matting import crop_square, cut_square, face_square, landmark_box, landmark_mask, paste_square

_FACE_SCALE = 1.4
"""Of the face polygon, so that the whole face disappears."""

_SIDE = 512
_SIGMA = 45.0
"""Of the blur, pixels of the face's square at 512 a side: nobody is recognised."""


def base_picture(rgb: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """The id picture's box with the face blurred, cut off at the picture's edges: uint8 RGB (H, W, 3).

    Args:
        rgb: uint8 (H, W, 3).
        landmarks: (106, 2).

    Raises:
        LandmarkError: as `matting.landmark_box`, and for a face outside of the picture.
    """
    square = face_square(landmarks)
    face = crop_square(rgb, *square, fill=0)
    side = len(face)
    small = cv2.resize(face, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA if side > _SIDE else cv2.INTER_CUBIC)
    small = cv2.GaussianBlur(small, (0, 0), _SIGMA, borderType=cv2.BORDER_REPLICATE)
    blurred = paste_square(cv2.resize(small, (side, side), interpolation=cv2.INTER_LINEAR), rgb.shape, *square)
    mask = landmark_mask(rgb.shape, landmarks, _FACE_SCALE)[..., None]
    mixed = np.round(rgb * (1 - mask) + blurred * mask).astype(np.uint8)
    return np.ascontiguousarray(cut_square(mixed, *landmark_box(landmarks)))
