"""The face detail pass: a face is cut out, drawn anew at a size at which SDXL draws faces well, and laid back in.

Geometry of the released method: the box of a face is grown, a window of twice the box is enlarged until the box's
shorter edge (or else the window's longer one) is 1024 pixels, only the grown box is drawn, and its edge is feathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from ipvg_ray.media.images import resized

_SIGMA = 10.0
"""Of the Gaussian that feathers the mask; over so few pixels it is nearly a straight ramp."""


@dataclass(frozen=True)
class Geometry:
    """How faces are cut out; pixels of the picture unless said otherwise.

    Attributes:
        smallest: faces whose box has an edge no longer than this are left as they are.
        grow: how far the mask reaches beyond the box on every side.
        factor: edges of the window in edges of the box.
        guide: what the box's shorter edge is enlarged to, pixels drawn.
        longest: the drawn window's longer edge at most, pixels drawn.
        grid: the drawn window's edges are multiples of this; the window gives or takes a few pixels for it. Faces of
            like shape can then share a batch.
        feather: width of the rim over which the drawing fades into the picture.
        most: faces drawn at most, largest first.
    """

    smallest: int = 10
    grow: int = 10
    factor: float = 2.0
    guide: int = 1024
    longest: int = 1024
    grid: int = 64
    feather: int = 5
    most: int = 4


@dataclass(frozen=True)
class Crop:
    """One face's window, its size when drawn, and the grown box in it; all boxes x0, y0, x1, y1, in whole pixels."""

    window: tuple[int, int, int, int]
    box: tuple[int, int, int, int]
    width: int
    height: int

    def cut(self, picture: np.ndarray) -> np.ndarray:
        """The window at the size at which it is drawn, uint8 RGB (height, width, 3)."""
        x0, y0, x1, y1 = self.window
        return resized(picture[y0:y1, x0:x1], self.width, self.height)

    def mask(self) -> np.ndarray:
        """Bool (height, width): what is drawn anew."""
        x0, y0, x1, y1 = self.window
        across, down = self.width / (x1 - x0), self.height / (y1 - y0)
        left, top, right, bottom = (
            round((e - o) * s) for e, o, s in zip(self.box, (x0, y0) * 2, (across, down) * 2, strict=True)
        )
        mask = np.zeros((self.height, self.width), bool)
        mask[top:bottom, left:right] = True
        return mask

    def paste(self, picture: np.ndarray, drawn: np.ndarray, feather: int) -> np.ndarray:
        """The picture with the drawing laid into its box; beyond box and feather every pixel is as it was."""
        x0, y0, x1, y1 = self.window
        share = feathered(picture.shape, self.box, feather)[y0:y1, x0:x1, None]
        old, new = picture[y0:y1, x0:x1], resized(drawn, x1 - x0, y1 - y0)
        mixed = np.round(old * (1 - share) + new * share).astype(np.uint8)
        result = picture.copy()
        result[y0:y1, x0:x1] = np.where(share > 0, mixed, old)
        return result


def crops(boxes: Sequence[np.ndarray], size: tuple[int, int], geometry: Geometry) -> list[Crop]:
    """The faces' windows, largest face first.

    Args:
        boxes: (4,) each, x0, y0, x1, y1; may reach beyond the picture.
        size: the picture's height and width.
        geometry: see there.
    """
    edges = [(box[2] - box[0], box[3] - box[1], box) for box in boxes]
    wanted = [each for each in edges if min(each[:2]) > geometry.smallest]
    wanted.sort(key=lambda each: each[0] * each[1], reverse=True)
    return [_crop(box, size, geometry) for _, _, box in wanted[: geometry.most]]


def _crop(box: np.ndarray, size: tuple[int, int], geometry: Geometry) -> Crop:
    height, width = size
    x0, y0, x1, y1 = (float(v) for v in box)
    rim = 2 * (geometry.grow + geometry.feather)  # the window of a small face must hold its mask's soft edge too
    across, down = (
        min(max(geometry.factor * edge, edge + rim), limit) for edge, limit in ((x1 - x0, width), (y1 - y0, height))
    )
    scale = max(1.0, min(geometry.guide / min(x1 - x0, y1 - y0), geometry.longest / max(across, down)))
    left, right, drawn_width = _window((x0 + x1) / 2, across, width, scale, geometry)
    top, bottom, drawn_height = _window((y0 + y1) / 2, down, height, scale, geometry)
    grown = (
        max(left, int(np.floor(x0)) - geometry.grow),
        max(top, int(np.floor(y0)) - geometry.grow),
        min(right, int(np.ceil(x1)) + geometry.grow),
        min(bottom, int(np.ceil(y1)) + geometry.grow),
    )
    return Crop((left, top, right, bottom), grown, drawn_width, drawn_height)


def _window(centre: float, edge: float, limit: int, scale: float, geometry: Geometry) -> tuple[int, int, int]:
    """Begin and end of the window along one axis, moved into the picture, and its edge when drawn."""
    drawn = max(geometry.grid, round(edge * scale / geometry.grid) * geometry.grid)
    pixels = min(limit, max(1, round(drawn / scale)))
    begin = min(max(0, round(centre - pixels / 2)), limit - pixels)
    return begin, begin + pixels, drawn


def feathered(shape: Sequence[int], box: Sequence[int], feather: int) -> np.ndarray:
    """The box as a soft mask, float32 (H, W): exactly 0 beyond `feather` pixels outside, 1 as far inside."""
    mask: np.ndarray = np.zeros(tuple(shape[:2]), np.float32)
    x0, y0, x1, y1 = box
    mask[y0:y1, x0:x1] = 1
    if feather:
        # The picture's edge is no edge of the face: there the mask is mirrored instead of fading out.
        side = 2 * feather + 1
        mask = cv2.GaussianBlur(mask, (side, side), _SIGMA, borderType=cv2.BORDER_REFLECT_101)
    return mask
