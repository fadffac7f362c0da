"""Reference picture to the face on it: box, landmarks, embeddings, gender, and how prompts call the person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ipvg_ray.media import images
from ipvg_ray.models import faces
from ipvg_ray.pipeline.stage import Row, RowError, Stage, StageContext

TARGETS = {"female": "A woman", "male": "A man", None: "A person"}
"""How prompts begin, by the gender found."""


class FacesStage(Stage):
    """Finds the faces with the evaluation pack, chooses one, and embeds it with both packs.

    Failures: the kinds of `images.ImageError`; `no_face`; `several_faces` where `faces.choose` is error.

    Raises:
        FileNotFoundError: in `setup`, where a pack is missing or lacks a model that the stage needs.
    """

    name = "faces"
    grain = "identity"
    needs = ("image", "image_sha256")

    def models(self) -> Mapping[str, Path]:
        section = self.config.faces
        return {"pack": self.config.models.path(section.pack), "id_pack": self.config.models.path(section.id_pack)}

    def setup(self, context: StageContext) -> None:
        self._analyser = self._load("pack", context, ("landmark_2d_106", "recognition"), ("genderage",))
        self._id_analyser = self._load("id_pack", context, ("recognition",))

    def _load(
        self, field: str, context: StageContext, needed: Sequence[str], welcome: Sequence[str] = ()
    ) -> faces.FaceAnalyser:
        section, pack = self.config.faces, self.models()[field]
        analyser = faces.FaceAnalyser(
            pack,
            det_sizes=section.det_sizes,
            det_threshold=section.det_threshold,
            modules=("detection", *needed, *welcome),
            device=context.device,
            threads=context.threads,
        )
        if missing := set(needed) - analyser.modules:
            raise FileNotFoundError(
                f"{pack} has no model for {', '.join(sorted(missing))}; set faces.{field} to a whole pack"
            )
        return analyser

    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        return [self._attempt(row) for row in rows]

    def _attempt(self, row: Row) -> Row | RowError:
        from ipvg_ray.models.matting import LandmarkError

        try:
            return self._one(row)
        except LandmarkError as error:
            return RowError("bad_landmarks", str(error))
        except images.ImageError as error:
            return RowError(error.kind, str(error))
        except faces.SeveralFacesError as error:
            return RowError("several_faces", str(error))
        except RowError as error:
            return error

    def _one(self, row: Row) -> Row:
        data = images.image_bytes(row["image"], row["image_sha256"])
        rgb = images.decode(data, self.config.dataset.max_image_pixels)
        found = self._analyser.faces(rgb)
        if not found:
            raise self._no_face("the picture", "use a picture with one large, frontal, uncovered face")
        face = faces.choose(found, self.config.faces.choose, (rgb.shape[1], rgb.shape[0]))
        return {
            "face_count": len(found),
            "face_box": face.box.tolist(),
            "face_score": face.score,
            "landmarks_5": face.landmarks_5.ravel().tolist(),
            "landmarks_106": _present(face.landmarks_106).ravel().tolist(),
            "embedding": _present(face.normed_embedding).tolist(),
            "id_embedding": self._id_embedding(rgb, face).tolist(),
            "gender": face.gender,
            "age": face.age,
            "target": TARGETS[face.gender],
        }

    def _no_face(self, where: str, mend: str) -> RowError:
        section = self.config.faces
        sizes = ", ".join(str(size) for size in section.det_sizes)
        return RowError(
            "no_face",
            f"no face found on {where} at detection sizes {sizes}; {mend}, or lower faces.det_threshold "
            f"(now {section.det_threshold:g})",
        )

    def _id_embedding(self, rgb: np.ndarray, face: faces.Face) -> np.ndarray:
        """float32 (512,), length 1: HyperLoRA's pack sees a square twice the landmarks' box, else the whole picture."""
        left, top, right, bottom = _square(_present(face.landmarks_106), rgb.shape)
        crop = rgb[top:bottom, left:right]
        same = None
        if crop.size:
            shift = np.array([left, top, left, top], dtype=np.float32)
            same = faces.matching(self._id_analyser.faces(crop), face.box - shift)
        if same is None:
            same = faces.matching(self._id_analyser.faces(rgb), face.box)
        if same is None:
            pack = self.config.faces.id_pack
            raise self._no_face(f"the picture by {pack}, which must find the same face", "use a clearer picture")
        return _present(same.normed_embedding)


def _square(landmarks: np.ndarray, shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the ArcFace crop, cut off at the picture's edges; whole pixels."""
    from ipvg_ray.models.matting import landmark_box

    x, y, half = landmark_box(landmarks)
    corners = np.round([x - 2 * half, y - 2 * half, x + 2 * half, y + 2 * half]).astype(int)
    height, width = shape[:2]
    left, top, right, bottom = np.clip(corners, 0, [width, height, width, height]).tolist()
    return left, top, right, bottom


def _present(array: np.ndarray | None) -> np.ndarray:
    """What `setup` made sure of: the pack has the model that makes it."""
    if array is None:
        raise RuntimeError("insightface gave a face without the values of a model that was loaded")
    return array
