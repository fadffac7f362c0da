"""Faces on a picture: boxes, landmarks, gender, age and ArcFace embeddings, by insightface's model packs.

A pack is a folder of ONNX files (`buffalo_l`, `antelopev2`); see https://github.com/deepinsight/insightface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from ipvg_ray import files
from ipvg_ray.models.face_networks import Detector, chunks, embeddings, gender_age, landmarks
from ipvg_ray.models.face_pack import Provider, open_pack

Choice = Literal["largest", "centre", "confident", "error"]
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
        gender_probability: how sure the model is of it, 0.5 to 1, or None.
        age: years, or None.
    """

    box: np.ndarray
    score: float
    landmarks_5: np.ndarray
    landmarks_106: np.ndarray | None = None
    embedding: np.ndarray | None = None
    gender: Literal["female", "male"] | None = None
    gender_probability: float | None = None
    age: float | None = None

    @property
    def normed_embedding(self) -> np.ndarray | None:
        """The embedding scaled to length 1, or None where there is none."""
        if self.embedding is None:
            return None
        return (self.embedding / max(self.embedding_norm or 0.0, 1e-12)).astype(np.float32)

    @property
    def embedding_norm(self) -> float | None:
        """Length of the raw embedding, which is lower for faces the network is less sure of; None without one."""
        return None if self.embedding is None else float(np.linalg.norm(self.embedding))

    @property
    def area(self) -> float:
        """Area of the box, square pixels."""
        return float(max(self.box[2] - self.box[0], 0) * max(self.box[3] - self.box[1], 0))

    @property
    def centre(self) -> np.ndarray:
        """Middle of the box, float32 (2,)."""
        return (self.box[:2] + self.box[2:]) / 2


class FaceAnalyser:
    """One insightface pack, loaded. Its methods may be called from several threads at once.

    Args:
        pack: the pack's folder.
        det_sizes: sides of the square the picture is fitted into before detection, multiples of 32, tried in this order
            until a face is found: a detector misses faces that fill a large square.
        det_threshold: confidence from which a detection is a face, 0 to 1.
        modules: insightface's names of the models to load where the pack has them; `detection` is always among them.
        device: what the worker was given, `cpu` or `cuda`.
        threads: threads per model.
        provider: what onnxruntime runs on; see `face_pack.providers`.
        batch: pictures or faces that go through a network at once. Results then differ in the last bits from one at a
            time, and a CPU gains nothing by it.

    Attributes:
        modules: names of the models that were loaded.
        detector_key: equal in two analysers that find the same faces: hash of the detector's file, and its settings.

    Raises:
        FileNotFoundError: where the folder is missing or holds no detector.
        ValueError: for no or impossible `det_sizes`, a detector without key points, or a `provider` that cannot run.
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
        provider: Provider = "auto",
        batch: int = 1,
    ) -> None:
        if not det_sizes or any(size < 32 or size % 32 for size in det_sizes):
            raise ValueError(f"det_sizes is {list(det_sizes)}; give at least one, each a positive multiple of 32")
        app = open_pack(pack, {"detection", *modules}, device=device, provider=provider, threads=threads)
        app.prepare(ctx_id=0, det_thresh=det_threshold, det_size=(det_sizes[0], det_sizes[0]))
        if not app.det_model.use_kps:
            raise ValueError(f"the detector in {pack} finds no key points; use a pack whose detector does")
        self.modules = frozenset(app.models)
        self.batch = batch
        self._models: dict[str, Any] = app.models
        self._detector = Detector(app.det_model, batch)
        fixed = app.det_model.static_input_size
        self.det_sizes = (fixed[0],) if fixed else tuple(det_sizes)
        digest = files.sha256_file(Path(app.det_model.model_file))
        self.detector_key = digest, self.det_sizes, det_threshold

    def faces(self, rgb: np.ndarray) -> list[Face]:
        """All faces found at the first of `det_sizes` that shows any, with all that the pack tells; [] for none.

        Args:
            rgb: uint8 (H, W, 3).

        Raises:
            ValueError: for any other array.
        """
        return self.describe([(rgb, face) for face in self.detect([rgb])[0]])

    def detect(self, pictures: Sequence[np.ndarray]) -> list[list[Face]]:
        """Box, score and five landmarks of each picture's faces, found at the first of `det_sizes` that shows any.

        Args:
            pictures: uint8 (H, W, 3) each, RGB.

        Raises:
            ValueError: for any other array.
        """
        bgr = [_bgr(rgb) for rgb in pictures]
        found: list[list[Face]] = [[] for _ in pictures]
        for size in self.det_sizes:
            # Fitted into the square, a picture thinner than that would have no pixel left across.
            left = [i for i, p in enumerate(bgr) if not found[i] and size * min(p.shape[:2]) >= max(p.shape[:2])]
            for i, (boxes, points) in zip(left, self._detector.detect([bgr[i] for i in left], size), strict=True):
                found[i] = [_face(box, kps) for box, kps in zip(boxes, points, strict=True)]
        return found

    def describe(self, found: Sequence[tuple[np.ndarray, Face]]) -> list[Face]:
        """The same faces with what the pack's other models tell of them.

        Args:
            found: pictures as `detect` takes them, each with one face on it.
        """
        bgr = {id(rgb): rgb for rgb, _ in found}  # of a crowd's picture one copy, not one per face
        bgr = {key: _bgr(rgb) for key, rgb in bgr.items()}
        described: list[Face] = []
        for part in chunks(found, self.batch):
            described += self._described([bgr[id(rgb)] for rgb, _ in part], [face for _, face in part])
        return described

    def _described(self, pictures: Sequence[np.ndarray], faces: Sequence[Face]) -> list[Face]:
        boxes = [face.box for face in faces]
        told: list[dict[str, Any]] = [{} for _ in faces]
        if model := self._models.get("landmark_2d_106"):
            for one, points in zip(told, landmarks(model, pictures, boxes), strict=True):
                one["landmarks_106"] = points
        if model := self._models.get("genderage"):
            for one, (male, age) in zip(told, gender_age(model, pictures, boxes).tolist(), strict=True):
                is_male = male > 0.5  # a tie is female, as insightface has it
                one |= {"gender": "male" if is_male else "female", "age": age}
                one["gender_probability"] = male if is_male else 1 - male
        if model := self._models.get("recognition"):
            raw = embeddings(model, pictures, [face.landmarks_5 for face in faces])
            for one, embedding in zip(told, raw, strict=True):
                one["embedding"] = embedding
        return [replace(face, **one) for face, one in zip(faces, told, strict=True)]


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


def _bgr(rgb: np.ndarray) -> np.ndarray:
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or not rgb.size:
        raise ValueError(f"a picture must be uint8 (H, W, 3), not {rgb.dtype} {rgb.shape}")
    return np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))


def _face(box: np.ndarray, points: np.ndarray) -> Face:
    """A face from a detector's box with its score (5,) and key points (5, 2)."""
    return Face(np.asarray(box[:4], np.float32), float(box[4]), np.asarray(points, np.float32))
