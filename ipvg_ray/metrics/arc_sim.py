"""Arc-Sim: how much the face of a video is the reference's, as ConsisID's evaluation and the challenge compute it.

ConsisID: Yuan et al., "Identity-Preserving Text-to-Video Generation by Frequency Decomposition" (arXiv 2411.17440);
the embedding is ArcFace's (arXiv 1801.07698).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ipvg_ray.metrics.frames import ends
from ipvg_ray.metrics.video_faces import FaceAnalyser, FoundFace, largest_faces


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
    sampled = ends(samples)(len(frames), 0)
    _unit(reference, "the reference's")  # before the work of finding faces
    return of_faces(largest_faces(list(frames[sampled]), analyser), reference, sampled)


def of_faces(faces: Sequence[FoundFace | None], reference: np.ndarray, numbers: Sequence[int]) -> ArcSim:
    """As `arc_sim`, of faces that are found already.

    Args:
        faces: one a sampled frame, None where it shows none.
        numbers: the frames' indices, for messages.
    """
    wanted = _unit(reference, "the reference's")
    cosines = [
        max(0.0, float(wanted @ _unit(found.face.embedding, f"frame {number}'s", wanted.shape)))
        for number, found in zip(numbers, faces, strict=True)
        if found is not None
    ]
    return ArcSim(float(np.mean(cosines)) if cosines else 0.0, len(cosines))


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
