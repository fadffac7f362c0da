"""Arc-Sim: how much the face of a video is the reference's, as ConsisID's evaluation and the challenge compute it.

ConsisID: Yuan et al., "Identity-Preserving Text-to-Video Generation by Frequency Decomposition" (arXiv 2411.17440);
the embedding is ArcFace's (arXiv 1801.07698).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

_PAD_SHARE = 0.25
_PAD_GREY = 128


class Face(Protocol):
    """A face found: `box` is x0, y0, x1, y1 in pixels, `embedding` the recogniser's raw output, of any length."""

    @property
    def box(self) -> np.ndarray: ...

    @property
    def embedding(self) -> np.ndarray | None: ...


class FaceAnalyser(Protocol):
    """Finds the faces of a picture: uint8 RGB, (H, W, 3)."""

    def faces(self, rgb: np.ndarray) -> Sequence[Face]: ...


@dataclass(frozen=True)
class ArcSim:
    """The metric's result.

    Attributes:
        score: mean over usable frames of max(0, cosine), 0 to 1; 0 where no frame is usable.
        frames: usable frames, those on which a face was found.
    """

    score: float
    frames: int


def arc_sim(frames: np.ndarray, reference: np.ndarray, analyser: FaceAnalyser, samples: int = 16) -> ArcSim:
    """Compare the largest face of `samples` frames, spread evenly from the first to the last, with the reference.

    A frame without a face is tried again with a border of grey 128, a quarter of its size on every side, in which faces
    that fill the frame are found; if that fails it is left out of the mean, it does not count as 0. A video of fewer
    frames than `samples` gives some of them several times.

    Args:
        frames: uint8 RGB, (N, H, W, 3), N ≥ 1.
        reference: the reference face's embedding, (D,), of any length above 0, from the analyser's own recogniser.
        analyser: the challenge uses buffalo_l at a detection size of 320x320.

    Raises:
        ValueError: for an empty video, or an embedding that is zero, no numbers, or of another size than the other's.
    """
    if frames.ndim != 4 or not len(frames):
        raise ValueError(f"frames have shape {frames.shape}; (N, H, W, 3) with N ≥ 1 is needed")
    wanted = _unit(reference, "the reference's")
    cosines = []
    for index in np.linspace(0, len(frames) - 1, samples).astype(int):
        face = _largest_face(frames[index], analyser)
        if face is not None:
            cosines.append(max(0.0, float(wanted @ _unit(face.embedding, f"frame {index}'s", wanted.shape))))
    return ArcSim(float(np.mean(cosines)) if cosines else 0.0, len(cosines))


def _largest_face(frame: np.ndarray, analyser: FaceAnalyser) -> Face | None:
    # The box of a face found in the bordered frame is not moved back: only its area and its embedding are used.
    faces = analyser.faces(frame) or analyser.faces(_bordered(frame))
    return max(faces, key=_area, default=None)


def _bordered(frame: np.ndarray) -> np.ndarray:
    top, left = (int(side * _PAD_SHARE) for side in frame.shape[:2])
    return np.pad(frame, ((top, top), (left, left), (0, 0)), constant_values=_PAD_GREY)


def _area(face: Face) -> float:
    x0, y0, x1, y1 = face.box
    return float((x1 - x0) * (y1 - y0))


def _unit(embedding: np.ndarray | None, whose: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """The embedding at length 1, float64, once it is sure that there is one and that it has the shape wanted."""
    vector = np.asarray(() if embedding is None else embedding, np.float64)
    if shape is not None and vector.shape != shape:
        raise ValueError(
            f"{whose} embedding has shape {vector.shape}, the reference's {shape}; use one recognition model"
        )
    norm = float(np.linalg.norm(vector))
    if not 0 < norm < np.inf:
        raise ValueError(f"{whose} embedding is zero or holds values that are no numbers; compute it again")
    unit: np.ndarray = vector / norm
    return unit
