"""The first-frame stage on the miniatures, with a face detector that finds what a test tells it to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sdxl_minis import embedding, face

from ipvg_ray import config
from ipvg_ray.media import images
from ipvg_ray.models.faces import Face
from ipvg_ray.pipeline.stage import RowError, StageContext
from ipvg_ray.stages import first_frame
from ipvg_ray.stages.first_frame import FirstFrameStage

SMALL = {"width": 88, "height": 64, "steps": 2, "format": "png"}


class NoMedia:
    """The stage publishes no files."""

    def publish(self, folder: str, identity_id: str, name: str, suffix: str, data: bytes) -> str:
        raise AssertionError("the first frame belongs into its row")


class Faces:
    """Stands in for the pack: `find` says what is on a picture, nothing unless a test sets it."""

    def __init__(self, *args: object, **options: object) -> None:
        self.options = options
        self.find: Callable[[np.ndarray], list[Face]] = lambda rgb: []

    def faces(self, rgb: np.ndarray) -> list[Face]:
        return self.find(rgb)


def found(box: tuple[float, float, float, float], direction: np.ndarray | None = None) -> Face:
    """A face in a box, whose embedding points somewhere."""
    return Face(np.array(box, np.float32), 0.9, np.zeros((5, 2), np.float32), embedding=direction)


def toward(reference: np.ndarray, cosine: float) -> np.ndarray:
    """An embedding of that cosine with the reference, of length 3."""
    other = np.roll(reference, 1)
    other -= (other @ reference) * reference
    other /= np.linalg.norm(other)
    return 3 * (cosine * reference + (1 - cosine**2) ** 0.5 * other)


def started(models: Path, patch: pytest.MonkeyPatch, **section: Any) -> FirstFrameStage:
    """A stage that has been set up."""
    patch.setattr(first_frame, "FaceAnalyser", Faces)
    detail = {"guide": 64, "longest": 64, "grid": 8, "steps": 2, **section.pop("detail", {})}
    values = {"models": {"root": str(models)}, "first_frame": {**SMALL, "attempts": 1, "detail": detail, **section}}
    stage = FirstFrameStage(config.load("cpu-mini", values=values))
    stage.setup(StageContext("cpu", 1, NoMedia(), "s3://bucket/runs/run-7/"))
    return stage


def row(identity: int = 1, prompt: int = 1, **changes: object) -> dict[str, Any]:
    texts = {1: "a woman in a red dress, close-up", 2: "a man in a black suit, close-up"}
    return {
        "sample_id": f"id{identity:03}/prompt{prompt}",
        "identity_id": f"id{identity:03}",
        "prompt_id": f"prompt{prompt}",
        "seed": 100 * identity + prompt,
        "id_picture": images.encode(face(identity)),
        "more_id_pictures": None,
        "id_embeddings": [embedding(identity).tolist()],
        "embeddings": [embedding(1000 + identity).tolist()],
        "reference_used": [True],
        "image_prompt": f"fcsks fxhks fhyks, {texts[prompt]}",
        **changes,
    }


def picture(result: dict[str, Any] | RowError) -> np.ndarray:
    """The row's first frame."""
    assert isinstance(result, dict), result
    return images.decode(result["first_frame"]["bytes"])
