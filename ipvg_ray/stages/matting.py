"""Reference picture to matte and id picture: HRNet's person, or the face polygon of the released code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ipvg_ray.media import images
from ipvg_ray.pipeline.stage import Row, RowError, Stage, StageContext


class MattingStage(Stage):
    """Cuts the person from the reference picture by `matting.method`; `none` keeps the whole picture.

    Failures: the kinds of `images.ImageError`; `bad_landmarks` where the face's landmarks span no box.
    """

    name = "matting"
    grain = "identity"
    needs = ("image", "image_sha256", "face_box", "landmarks_106")

    def models(self) -> Mapping[str, Path]:
        if self.config.matting.method != "hrnet":
            return {}
        return {"model": self.config.models.path(self.config.matting.model)}

    def fingerprint_settings(self) -> dict[str, Any]:
        # The other methods read neither the network nor its input size: changing those must not undo their results.
        settings = super().fingerprint_settings()
        return settings if self.models() else {"method": settings["method"]}

    def setup(self, context: StageContext) -> None:
        self._model: Any = None
        if self.config.matting.method == "hrnet":
            import torch

            from ipvg_ray.models import hrnet

            torch.set_num_threads(context.threads)
            self._model = hrnet.load(self.models()["model"], context.device)

    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        # One picture at a time: in a batch, the last bits of a matte would depend on the pictures beside it.
        return [self._attempt(row) for row in rows]

    def _attempt(self, row: Row) -> Row | RowError:
        from ipvg_ray.models.matting import LandmarkError

        try:
            return self._one(row)
        except images.ImageError as error:
            return RowError(error.kind, str(error))
        except LandmarkError as error:
            return RowError("bad_landmarks", str(error))

    def _one(self, row: Row) -> Row:
        from ipvg_ray.models import matting

        data = images.image_bytes(row["image"], row["image_sha256"])
        rgb = images.decode(data, self.config.dataset.max_image_pixels)
        landmarks = np.asarray(row["landmarks_106"], np.float64).reshape(-1, 2)
        alpha = self._alpha(rgb, landmarks, row["face_box"])
        return {
            "matte": images.encode(np.round(alpha * 255).astype(np.uint8)),
            "id_picture": images.encode(matting.id_picture(rgb, alpha, landmarks)),
            "matting_method": self.config.matting.method,
            "person_share": float(alpha.mean(dtype=np.float64)),
        }

    def _alpha(self, rgb: np.ndarray, landmarks: np.ndarray, face_box: Sequence[float]) -> np.ndarray:
        """float32 (H, W), 0 background to 1 person."""
        from ipvg_ray.models import matting

        section = self.config.matting
        if section.method == "hrnet":
            return matting.person_alpha(self._model, rgb, face_box, section.input_size)
        if section.method == "landmarks":
            return matting.landmark_mask(rgb.shape, landmarks)
        return np.ones(rgb.shape[:2], np.float32)
