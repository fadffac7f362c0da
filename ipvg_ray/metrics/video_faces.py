"""The largest face of each of a video's frames, found once for all metrics that compare faces, as ConsisID does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

_PAD_SHARE = 0.25
_PAD_GREY = 128
_ALIGNED_SIDE = 224

Shift = tuple[int, int]
"""x and y, in pixels, of a frame's corner in the picture in which its faces were looked for."""


class Face(Protocol):
    """A face found: `box` is x0, y0, x1, y1 in pixels, `embedding` the recogniser's raw output, of any length."""

    @property
    def box(self) -> np.ndarray: ...

    @property
    def embedding(self) -> np.ndarray | None: ...


class FaceAnalyser(Protocol):
    """Finds the faces of pictures, uint8 RGB (H, W, 3) each, and then tells what they are."""

    def detect(self, pictures: Sequence[np.ndarray]) -> Sequence[Sequence[Any]]:
        """The faces of each picture, without embeddings."""
        ...

    def describe(self, found: Sequence[tuple[np.ndarray, Any]]) -> Sequence[Any]:
        """The same faces, each given with its picture, with embeddings."""
        ...


@dataclass(frozen=True, eq=False)
class FoundFace:
    """The largest face of a frame.

    Attributes:
        frame: uint8 RGB, (H, W, 3).
        face: as the analyser gives it, in pixels of the picture it was found in.
        shift: of the frame in that picture, which may be the frame with a border.
    """

    frame: np.ndarray
    face: Any
    shift: Shift = (0, 0)

    def aligned(self) -> np.ndarray:
        """The face brought to ArcFace's five-point template of twice its size: uint8 RGB, (224, 224, 3)."""
        from insightface.utils import face_align

        landmarks = np.asarray(self.face.landmarks_5, np.float32) - np.asarray(self.shift, np.float32)
        with warnings.catch_warnings():
            # insightface calls a function of scikit-image that is to go; it would say so for every face.
            warnings.filterwarnings("ignore", message=".*estimate.* is deprecated", category=FutureWarning)
            crop: np.ndarray = face_align.norm_crop(self.frame, landmark=landmarks, image_size=_ALIGNED_SIDE)
        return crop


def largest_faces(frames: Sequence[np.ndarray], analyser: FaceAnalyser) -> list[FoundFace | None]:
    """The largest face of every frame, None where none is found.

    A frame without a face is tried again with a border of grey 128, a quarter of its size on every side, in which faces
    that fill the frame are found.

    Args:
        frames: uint8 RGB, (H, W, 3) each; of one video or of several.
    """
    return _found(frames, analyser, lambda faces, shift: max(faces, key=_area))


def find_face(frame: np.ndarray, analyser: FaceAnalyser, near: np.ndarray | None = None) -> FoundFace | None:
    """The largest face of a frame, or the one whose box lies nearest to `near`; as `largest_faces` otherwise.

    Args:
        near: x0, y0, x1, y1 in pixels of the frame.
    """

    def nearest(faces: Sequence[Face], shift: Shift) -> Face:
        wanted = np.asarray(near) + np.array([*shift, *shift])
        return min(faces, key=lambda face: float(np.abs(face.box - wanted).sum()))

    return largest_faces([frame], analyser)[0] if near is None else _found([frame], analyser, nearest)[0]


def _found(
    frames: Sequence[np.ndarray], analyser: FaceAnalyser, chosen: Callable[[Sequence[Face], Shift], Face]
) -> list[FoundFace | None]:
    pictures, shifts = list(frames), [(0, 0)] * len(frames)
    faces = list(analyser.detect(pictures))
    bare = [place for place, found in enumerate(faces) if not found]
    for place in bare:
        top, left = (int(side * _PAD_SHARE) for side in frames[place].shape[:2])
        pictures[place] = np.pad(frames[place], ((top, top), (left, left), (0, 0)), constant_values=_PAD_GREY)
        shifts[place] = (left, top)
    for place, found in zip(bare, analyser.detect([pictures[place] for place in bare]), strict=True):
        faces[place] = found
    best = {place: chosen(found, shifts[place]) for place, found in enumerate(faces) if found}
    told = analyser.describe([(pictures[place], face) for place, face in best.items()])
    described = dict(zip(best, told, strict=True))
    return [
        FoundFace(frame, described[place], shifts[place]) if place in described else None
        for place, frame in enumerate(frames)
    ]


def _area(face: Face) -> float:
    x0, y0, x1, y1 = face.box
    return float((x1 - x0) * (y1 - y0))
