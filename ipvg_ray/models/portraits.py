"""Reference pictures to portraits: the face that stands for each picture, described by two packs.

The first pack detects, describes and scores; HyperLoRA's pack embeds the same face once more, from a crop around it,
as the released ComfyUI-HyperLoRA does (github.com/bytedance/ComfyUI-HyperLoRA).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ipvg_ray.models.face_quality import Quality, quality
from ipvg_ray.models.faces import Choice, Face, FaceAnalyser, SeveralFacesError, choose, matching
from ipvg_ray.models.matting import LandmarkError, landmark_box


class PortraitError(ValueError):
    """No portrait can be made of a picture. `kind` is one of `no_face`, `several_faces`, `bad_landmarks`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, eq=False)
class Portrait:
    """One picture's face.

    Attributes:
        face: as the first pack describes it.
        id_face: the same face as the second pack finds it; its coordinates are those of the crop it was found in.
        count: faces found on the picture.
        quality: how good it is.
    """

    face: Face
    id_face: Face
    count: int
    quality: Quality


@dataclass(eq=False)
class _Chosen:
    """A picture, all faces found on it, and the one that stands for it, later with its description."""

    rgb: np.ndarray
    found: Sequence[Face]
    face: Face


@dataclass(frozen=True, eq=False)
class _View:
    """A picture, or a crop of it, and the face's box (4,) in it."""

    rgb: np.ndarray
    box: np.ndarray


class Portraits:
    """Two packs and the rule by which a face is chosen. May be called from several threads at once.

    Args:
        analyser: gives landmarks and embedding, and gender and age where it can.
        id_analyser: gives the second embedding.
        choice: which face of several; see `faces.choose`.
    """

    def __init__(self, analyser: FaceAnalyser, id_analyser: FaceAnalyser, choice: Choice) -> None:
        self.analyser = analyser
        self.id_analyser = id_analyser
        self.choice = choice
        # The published buffalo_l and antelopev2 hold the same detector under two names.
        self._one_detector = analyser.detector_key == id_analyser.detector_key

    def find(self, pictures: Sequence[np.ndarray]) -> list[Portrait | PortraitError]:
        """The portrait of each picture, uint8 (H, W, 3), or why there is none.

        Only the chosen faces are described, each network running once for all pictures where its file lets it.
        """
        outcome: dict[int, Portrait | PortraitError] = {}
        chosen: dict[int, _Chosen] = {}
        for i, (rgb, found) in enumerate(zip(pictures, self.analyser.detect(pictures), strict=True)):
            if not found:
                message = "no face found on the picture; use a picture with one large, frontal, uncovered face"
                outcome[i] = PortraitError("no_face", message)
                continue
            try:
                chosen[i] = _Chosen(rgb, found, choose(found, self.choice, (rgb.shape[1], rgb.shape[0])))
            except SeveralFacesError as error:
                outcome[i] = PortraitError("several_faces", str(error))
        faces = self.analyser.describe([(one.rgb, one.face) for one in chosen.values()])
        for one, face in zip(chosen.values(), faces, strict=True):
            one.face = face
        for (i, one), id_face in zip(chosen.items(), self._id_faces(list(chosen.values())), strict=True):
            if isinstance(id_face, PortraitError):
                outcome[i] = id_face
            else:
                measured = quality(one.rgb, one.face.box, one.face.landmarks_5)
                outcome[i] = Portrait(one.face, id_face, len(one.found), measured)
        return [outcome[i] for i in range(len(pictures))]

    def _id_faces(self, chosen: Sequence[_Chosen]) -> list[Face | PortraitError]:
        """The same faces by the second pack, which looks at a square twice the landmarks' box, else at all."""
        outcome: dict[int, Face | PortraitError] = {}
        crops: dict[int, _View] = {}
        for i, one in enumerate(chosen):
            try:
                crops[i] = _crop(one.rgb, _present(one.face.landmarks_106), one.face.box)
            except LandmarkError as error:
                outcome[i] = PortraitError("bad_landmarks", str(error))
        seen: dict[int, tuple[np.ndarray, Face]] = {}
        # Most portraits are all face: the crop is the whole picture, and what the same detector found there is known.
        whole = [i for i in crops if crops[i].rgb.shape == chosen[i].rgb.shape]
        known = [i for i in whole if self._one_detector]
        self._match(seen, {i: crops[i] for i in known}, [chosen[i].found for i in known])
        views = {i: view for i, view in crops.items() if i not in known and view.rgb.size}
        self._match(seen, views, self.id_analyser.detect([view.rgb for view in views.values()]))
        views = {i: _View(chosen[i].rgb, chosen[i].face.box) for i in crops if i not in seen and i not in whole}
        self._match(seen, views, self.id_analyser.detect([view.rgb for view in views.values()]))
        for i, described in zip(seen, self.id_analyser.describe(list(seen.values())), strict=True):
            outcome[i] = described
        message = "HyperLoRA's pack (faces.id_pack) does not find the same face on the picture; use a clearer picture"
        return [outcome.get(i) or PortraitError("no_face", message) for i in range(len(chosen))]

    @staticmethod
    def _match(
        seen: dict[int, tuple[np.ndarray, Face]], views: Mapping[int, _View], found: Sequence[Sequence[Face]]
    ) -> None:
        """Add those whose face is among the ones found on its view."""
        for (i, view), faces in zip(views.items(), found, strict=True):
            if (same := matching(faces, view.box)) is not None:
                seen[i] = view.rgb, same


def _crop(rgb: np.ndarray, landmarks: np.ndarray, box: np.ndarray) -> _View:
    """The ArcFace crop, cut off at the picture's edges; whole pixels."""
    x, y, half = landmark_box(landmarks)
    corners = np.round([x - 2 * half, y - 2 * half, x + 2 * half, y + 2 * half]).astype(int)
    height, width = rgb.shape[:2]
    left, top, right, bottom = np.clip(corners, 0, [width, height, width, height]).tolist()
    return _View(rgb[top:bottom, left:right], box - np.array([left, top, left, top], np.float32))


def _present(landmarks: np.ndarray | None) -> np.ndarray:
    if landmarks is None:
        raise RuntimeError("the pack has no model for landmark_2d_106")
    return landmarks
