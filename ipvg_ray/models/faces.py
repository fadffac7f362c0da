"""Faces on a picture: boxes, landmarks, gender, age and ArcFace embeddings, by insightface's model packs.

A pack is a folder of ONNX files (`buffalo_l`, `antelopev2`); see https://github.com/deepinsight/insightface.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

logger = logging.getLogger(__name__)

Choice = Literal["largest", "centre", "confident", "error"]
CUDA = "CUDAExecutionProvider"
MODULES = ("detection", "landmark_2d_106", "genderage", "recognition")


class SeveralFacesError(ValueError):
    """More than one face where exactly one is wanted."""


class NoFaceError(ValueError):
    """No face where one is needed."""


@dataclass(frozen=True, eq=False)
class Face:
    """One face; coordinates are pixels of the picture, x to the right, y down.

    Attributes:
        box: float32 (4,), x0, y0, x1, y1; may reach beyond the picture.
        score: the detector's confidence, 0 to 1.
        landmarks_5: float32 (5, 2), eyes, nose, mouth corners; of pairs, first the one further left on the picture.
        landmarks_106: float32 (106, 2) in insightface's order, or None where the pack has no such model.
        embedding: float32 (512,), raw as the network gives it, or None.
        gender: `female`, `male` or None.
        age: years, or None.
    """

    box: np.ndarray
    score: float
    landmarks_5: np.ndarray
    landmarks_106: np.ndarray | None = None
    embedding: np.ndarray | None = None
    gender: Literal["female", "male"] | None = None
    age: float | None = None

    @property
    def normed_embedding(self) -> np.ndarray | None:
        """The embedding scaled to length 1, or None where there is none."""
        if self.embedding is None:
            return None
        return (self.embedding / max(float(np.linalg.norm(self.embedding)), 1e-12)).astype(np.float32)

    @property
    def area(self) -> float:
        """Area of the box, square pixels."""
        return float(max(self.box[2] - self.box[0], 0) * max(self.box[3] - self.box[1], 0))

    @property
    def centre(self) -> np.ndarray:
        """Middle of the box, float32 (2,)."""
        return (self.box[:2] + self.box[2:]) / 2


class FaceAnalyser:
    """One insightface pack, loaded.

    Args:
        pack: the pack's folder.
        det_sizes: sides of the square the picture is fitted into before detection, multiples of 32, tried in this order
            until a face is found: a detector misses faces that fill a large square.
        det_threshold: confidence from which a detection is a face, 0 to 1.
        modules: insightface's names of the models to load where the pack has them; `detection` is always among them.
        device: `cpu` or `cuda`; without an onnxruntime that knows CUDA the CPU is used, with a warning.
        threads: threads per model.

    Attributes:
        modules: names of the models that were loaded.

    Raises:
        FileNotFoundError: where the folder is missing or holds no detector.
        ValueError: for no or impossible `det_sizes`.
    """

    def __init__(
        self,
        pack: Path,
        *,
        det_sizes: Sequence[int],
        det_threshold: float = 0.5,
        modules: Sequence[str] = MODULES,
        device: str = "cpu",
        threads: int = 1,
    ) -> None:
        if not det_sizes or any(size < 32 or size % 32 for size in det_sizes):
            raise ValueError(f"det_sizes is {list(det_sizes)}; give at least one, each a positive multiple of 32")
        self.det_sizes = tuple(det_sizes)
        self._app = _load(_checked(pack), {"detection", *modules}, device, threads)
        self.modules = frozenset(self._app.models)
        self._app.prepare(ctx_id=0, det_thresh=det_threshold, det_size=(det_sizes[0], det_sizes[0]))

    def faces(self, rgb: np.ndarray) -> list[Face]:
        """All faces found at the first of `det_sizes` that shows any; [] where none does.

        Args:
            rgb: uint8 (H, W, 3).

        Raises:
            ValueError: for any other array.
        """
        if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or not rgb.size:
            raise ValueError(f"a picture must be uint8 (H, W, 3), not {rgb.dtype} {rgb.shape}")
        bgr = np.ascontiguousarray(rgb[:, :, ::-1])
        for size in self.det_sizes:
            if size * min(rgb.shape[:2]) < max(rgb.shape[:2]):
                continue  # fitted into the square, so thin a picture would have no pixel left across
            # Only the detector is prepared again: preparing every model could set up sessions anew.
            self._app.det_model.prepare(0, input_size=(size, size))
            with warnings.catch_warnings():
                # insightface calls a function of scikit-image that is to go; it would say so for every face.
                warnings.filterwarnings("ignore", message=".*estimate.* is deprecated", category=FutureWarning)
                found = self._app.get(bgr)
            if found:
                return [_face(f) for f in found]
        return []


def choose(faces: Sequence[Face], how: Choice, size: tuple[int, int]) -> Face:
    """The face that stands for the picture.

    Args:
        faces: at least one.
        how: `largest` box; `centre`, the box whose middle is nearest the picture's; `confident`, the highest score;
            `error`, the only one. The first wins a tie.
        size: width and height of the picture, pixels.

    Raises:
        NoFaceError: for an empty list.
        SeveralFacesError: for several faces with `error`.
    """
    if not faces:
        raise NoFaceError("there is no face to choose")
    if how == "error":
        if len(faces) > 1:
            raise SeveralFacesError(
                f"{len(faces)} faces on the picture; crop it to one, or set faces.choose to largest"
            )
        return faces[0]
    if how == "largest":
        return max(faces, key=lambda f: f.area)
    if how == "confident":
        return max(faces, key=lambda f: f.score)
    middle = np.array(size) / 2
    return min(faces, key=lambda f: float(np.linalg.norm(f.centre - middle)))


def matching(faces: Sequence[Face], box: np.ndarray, least: float = 0.3) -> Face | None:
    """The face whose box overlaps `box` most, or None where none reaches an intersection over union of `least`.

    Args:
        faces: may be empty.
        box: (4,), x0, y0, x1, y1.
    """
    best = max(faces, key=lambda f: iou(f.box, box), default=None)
    return best if best is not None and iou(best.box, box) >= least else None


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1), 0 to 1."""
    extent = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    common = float(np.prod(np.maximum(extent, 0)))
    union = float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - common
    return common / union if union > 0 else 0.0


def _checked(pack: Path) -> Path:
    pack = Path(pack).expanduser().resolve()
    if not pack.is_dir():
        raise FileNotFoundError(
            f"no insightface pack at {pack}; unpack {pack.name}.zip there, or set models.root to where the packs are"
        )
    if not any(pack.glob("*.onnx")):
        nested = pack / pack.name  # antelopev2.zip holds a folder of its own name
        hint = f"; move them up from {nested}" if nested.is_dir() else ""
        raise FileNotFoundError(f"{pack} holds no .onnx files{hint}")
    return pack


def _load(pack: Path, modules: set[str], device: str, threads: int) -> Any:
    import onnxruntime
    from insightface.app import FaceAnalysis

    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = threads
    options.log_severity_level = 3
    providers = _providers(device, onnxruntime.get_available_providers())
    if CUDA in providers and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # insightface does so only where it chooses the providers itself
    try:
        app = FaceAnalysis(
            name=str(pack),  # a folder is taken as it is; a bare name would be downloaded where it is missing
            allowed_modules=sorted(modules),
            providers=providers,
            sess_options=options,
            static_shape_sessions=False,  # one session serves every size, instead of one more for each
        )
    except AssertionError as error:
        raise FileNotFoundError(f"{pack} holds no face detector; unpack the whole pack there") from error
    if CUDA in providers and CUDA not in app.det_model.session.get_providers():
        logger.warning("onnxruntime could not start CUDA (its libraries or cuDNN are missing); faces run on the CPU")
    return app


def _providers(device: str, available: Sequence[str]) -> list[str]:
    """onnxruntime's providers for a device, best first."""
    if device.startswith("cuda"):
        if CUDA in available:
            return [CUDA, "CPUExecutionProvider"]
        logger.warning("this onnxruntime has no CUDA; faces run on the CPU (install onnxruntime-gpu)")
    return ["CPUExecutionProvider"]


def _face(found: Any) -> Face:
    """Our face from insightface's, whose missing fields are None."""
    landmarks, embedding = found.landmark_2d_106, found.embedding
    return Face(
        box=np.asarray(found.bbox, np.float32),
        score=float(found.det_score),
        landmarks_5=np.asarray(found.kps, np.float32),
        landmarks_106=None if landmarks is None else np.asarray(landmarks, np.float32),
        embedding=None if embedding is None else np.asarray(embedding, np.float32),
        gender=None if found.gender is None else ("male" if found.gender == 1 else "female"),
        age=None if found.age is None else float(found.age),
    )
