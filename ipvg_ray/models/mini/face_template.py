"""106 landmarks of an average frontal face in insightface's order, for the miniature landmark model.

Which number is which place was read off insightface's published drawing of `2d106det`; the places are our own.
"""

from __future__ import annotations

import numpy as np

_CONTOUR = (1, *range(9, 17), *range(2, 9), 0, *range(24, 17, -1), *range(32, 24, -1), 17)
"""Left temple, cheek, chin (0), cheek, right temple, as on the picture."""

_LEFT = {
    # Brow: upper edge from the temple inwards, then the lower edge.
    43: (0.16, 0.29), 48: (0.22, 0.245), 49: (0.29, 0.225), 51: (0.36, 0.23), 50: (0.43, 0.255),
    44: (0.225, 0.275), 45: (0.295, 0.26), 47: (0.36, 0.265), 46: (0.425, 0.285),
    # Eye: outer corner, upper lid, inner corner, lower lid, pupil and iris.
    35: (0.235, 0.372), 41: (0.275, 0.35), 40: (0.32, 0.34), 42: (0.365, 0.35), 39: (0.405, 0.375),
    37: (0.365, 0.392), 33: (0.32, 0.40), 36: (0.275, 0.392), 34: (0.32, 0.37), 38: (0.322, 0.372),
    # Nose: the bridge's side down to the nostril.
    75: (0.455, 0.39), 76: (0.435, 0.53), 77: (0.405, 0.59), 78: (0.425, 0.635), 79: (0.46, 0.64),
    # Mouth: corner, upper lip, inner edge of the upper lip, of the lower lip, lower lip.
    52: (0.36, 0.78), 64: (0.41, 0.75), 63: (0.455, 0.735), 65: (0.385, 0.78), 66: (0.44, 0.772),
    54: (0.44, 0.795), 55: (0.405, 0.82), 56: (0.45, 0.845),
}  # fmt: skip
_MIRROR = {
    43: 101, 48: 105, 49: 104, 51: 103, 50: 102, 44: 100, 45: 99, 47: 98, 46: 97,
    35: 93, 41: 96, 40: 94, 42: 95, 39: 89, 37: 90, 33: 87, 36: 91, 34: 88, 38: 92,
    75: 81, 76: 82, 77: 83, 78: 84, 79: 85,
    52: 61, 64: 68, 63: 67, 65: 69, 66: 70, 54: 57, 55: 58, 56: 59,
}  # fmt: skip
_MIDDLE = {72: 0.38, 73: 0.44, 74: 0.51, 86: 0.585, 80: 0.66, 71: 0.745, 62: 0.775, 60: 0.80, 53: 0.855}
"""Bridge, tip and base of the nose, the lips from top to bottom: heights of what lies on the middle line."""


def landmarks_106() -> np.ndarray:
    """float32 (106, 2), x and y as shares of a square face box from the middle of the forehead to the chin."""
    points = np.full((106, 2), np.nan, dtype=np.float32)
    angle = np.linspace(0, np.pi, len(_CONTOUR))
    across = np.sign(np.cos(angle)) * np.abs(np.cos(angle)) ** 0.75  # fuller at the jaw than an ellipse
    points[list(_CONTOUR)] = np.stack([0.5 - 0.41 * across, 0.36 + 0.64 * np.sin(angle)], axis=1)
    for left, (x, y) in _LEFT.items():
        points[left], points[_MIRROR[left]] = (x, y), (1 - x, y)
    for index, y in _MIDDLE.items():
        points[index] = (0.5, y)
    return points
