"""Pictures with faces for tests: libraries' samples, and rows of the faces stage made of them."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image

from ipvg_ray import config
from ipvg_ray.media import images
from ipvg_ray.models.faces import Face
from ipvg_ray.pipeline.stage import RowError, StageContext
from ipvg_ray.stages.faces import FacesStage

Picture = np.ndarray
ASTRONAUT = np.array([174, 68, 270, 164], dtype=np.float32)
"""Where the astronaut's face is; read off the picture."""


@lru_cache
def astronaut() -> Picture:
    return np.asarray(skimage.data.astronaut())


@lru_cache
def two_faces() -> Picture:
    """The astronaut's head twice: as it is on the left, at 1.5 times the size on the right; 600 x 300."""
    head = Image.fromarray(astronaut()[0:200, 120:320])
    sheet = Image.new("RGB", (600, 300), (90, 120, 90))
    sheet.paste(head, (0, 0))
    sheet.paste(head.resize((300, 300)), (300, 0))
    return np.asarray(sheet)


def sample_picture(name: str) -> Picture:
    """A picture that insightface ships: `t1` shows several people, `Tom_Hanks_54745` one."""
    insightface_data = pytest.importorskip("insightface.data")
    return np.ascontiguousarray(insightface_data.get_image(name)[:, :, ::-1])


def face(x: float = 0, y: float = 0, side: float = 10, score: float = 0.9) -> Face:
    return Face(np.array([x, y, x + side, y + side], np.float32), score, np.zeros((5, 2), np.float32))


def make_stage(root: Path, threads: int = 1, pool: dict[str, Any] | None = None, **section: Any) -> FacesStage:
    """The stage, set up; `section` are fields of `faces`."""
    values: dict[str, Any] = {"models": {"root": str(root)}, "faces": section | ({"pool": pool} if pool else {})}
    if "pack" in section:
        values["evaluate"] = {"pack": section["pack"]}  # the configuration wants one pack for both
    stage = FacesStage(config.load("cpu-mini", values=values))
    stage.setup(StageContext(device="cpu", threads=threads, media=None, run_dir=""))  # type: ignore[arg-type]
    return stage


def cell(rgb: Picture) -> tuple[dict[str, Any], str]:
    """A table's picture and its hash."""
    picture = images.encode(rgb)
    return picture, hashlib.sha256(picture["bytes"]).hexdigest()


def row_of(rgb: Picture, *more: Picture, **changes: Any) -> dict[str, Any]:
    """An identity's row, with further reference pictures."""
    image, digest = cell(rgb)
    others = [cell(one) for one in more]
    row = {"identity_id": "id001", "image": image, "image_sha256": digest, "seed": 1}
    row |= {"more_images": [o[0] for o in others], "more_images_sha256": [o[1] for o in others]}
    return {**row, **changes}


def done(stage: FacesStage, row: dict[str, Any]) -> dict[str, Any]:
    (result,) = stage.process([row])
    assert isinstance(result, dict), result
    return result


def refused(stage: FacesStage, row: dict[str, Any]) -> RowError:
    (result,) = stage.process([row])
    assert isinstance(result, RowError), result
    return result
