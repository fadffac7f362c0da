"""A HyperLoRA with a Base LoRA, in the stage: the base picture, its weight, and what a wrong weight says."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from first_frame_stage import picture, row, started
from scipy.ndimage import gaussian_filter
from sdxl_minis import add_base, face, make_minis
from skimage.draw import polygon2mask

from ipvg_ray.media import images
from ipvg_ray.models.base_picture import base_picture
from ipvg_ray.models.matting import FACE_POLYGON, LandmarkError, landmark_box, landmark_mask
from ipvg_ray.models.mini import hyperlora as mini_hyperlora
from ipvg_ray.models.mini.face_template import landmarks_106
from ipvg_ray.pipeline.stage import RowError


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = make_minis(tmp_path_factory.mktemp("minis"))
    shutil.copytree(root / mini_hyperlora.NAME, root / "with-base")
    add_base(root / "with-base")
    return root


def landmarks(side: int = 300) -> np.ndarray:
    """A frontal face in the middle of a picture."""
    return side * (0.35 + 0.3 * landmarks_106().astype(np.float64))


def with_picture(number: int, **changes: object) -> dict[str, Any]:
    whole = images.encode(face(number, side=300))
    digest = hashlib.sha256(whole["bytes"]).hexdigest()
    columns = {"image": whole, "image_sha256": digest, "more_images": None, "more_images_sha256": None}
    columns |= {"reference_numbers": [0], "reference_landmarks": [landmarks().ravel().tolist()]}
    return row(1, **(columns | changes))


def test_the_face_is_blurred_out_and_the_rest_is_not():
    rgb = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    made = base_picture(rgb, landmarks())
    x, y, half = landmark_box(landmarks())
    left, top, side = round(x - half), round(y - half), round(2 * half)
    assert made.shape == (side, side, 3)
    inside = slice(top, top + side), slice(left, left + side)
    share, seen, kept = landmark_mask(rgb.shape, landmarks(), 1.4)[inside], made, rgb[inside]
    assert (share > 0.99).any()
    assert seen[share > 0.99].std() < 10 < kept[share > 0.99].std()
    assert np.array_equal(seen[share == 0], kept[share == 0])


def test_the_published_numbers():
    """By scikit-image and SciPy: a square of 0.8 edges to each side, blurs of 45 and 15 at 512, polygon times 1.4."""
    rgb = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    rgb = np.kron(rgb, np.ones((10, 10, 1), np.uint8)).astype(float)
    points = landmarks(400)
    polygon = points[list(FACE_POLYGON)]
    middle, edge = polygon.mean(axis=0), np.ptp(polygon, axis=0).max()
    (left, top), side = np.round(middle - 0.8 * edge).astype(int), round(1.6 * edge)
    square = slice(top, top + side), slice(left, left + side)
    enlarged = polygon2mask((400, 400), (1.4 * polygon - 0.4 * middle)[:, ::-1]).astype(float)

    def softened(values: np.ndarray, sigma: float) -> np.ndarray:
        scale = 512 / side
        return gaussian_filter(values, (sigma / scale, sigma / scale, *[0] * (values.ndim - 2)), mode="nearest")

    share = softened(enlarged[square], 15)[..., None]
    expected = rgb.copy()
    expected[square] += share * (softened(rgb[square], 45) - rgb[square])
    x, y, half = landmark_box(points)
    seen = (slice(round(y - half), round(y + half)), slice(round(x - half), round(x + half)))
    made = base_picture(rgb.astype(np.uint8), points).astype(float)
    assert np.abs(made - expected[seen]).mean() < 1
    assert np.abs(made - rgb[seen]).mean() > 20


def test_a_base_picture_ends_at_the_pictures_edges():
    rgb = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    x, _, half = landmark_box(landmarks() - (120, 0))
    assert x - half < 0
    made = base_picture(rgb, landmarks() - (120, 0))
    assert made.shape == (round(2 * half), round(x - half) + round(2 * half), 3)
    with pytest.raises(LandmarkError, match="outside of the picture"):
        base_picture(rgb, landmarks() - (600, 0))


def test_the_base_lora_takes_the_rest_of_the_picture_in(models, monkeypatch):
    def drawn(weight: float, number: int) -> np.ndarray:
        stage = started(models, monkeypatch, hyperlora="with-base", base_weight=weight)
        return picture(stage.process([with_picture(number)])[0]).astype(int)

    without, with_one, with_other = drawn(0, 1), drawn(0.85, 1), drawn(0.85, 2)
    assert np.abs(without - with_one).mean() > 1
    assert np.abs(with_other - with_one).mean() > 0.1
    assert np.array_equal(without, drawn(0, 2))


def test_its_needs_and_failures(models, monkeypatch):
    stage = started(models, monkeypatch, hyperlora="with-base", base_weight=0.5)
    assert {"image", "more_images", "reference_landmarks"} <= set(stage.needs)
    changed, flat = with_picture(1, image_sha256="0" * 64), with_picture(1, reference_landmarks=[[5.0] * 212])
    results = stage.process([changed, flat])
    assert [r.kind for r in results if isinstance(r, RowError)] == ["image_changed", "bad_landmarks"]
    assert all(r.message.startswith("reference picture 0 (0 is the first): ") for r in results)
    with pytest.raises(ValueError, match="base_weight is above 0"):
        started(models, monkeypatch, base_weight=0.5)


def test_base_pictures_of_all_used_references_are_read(models, monkeypatch):
    """The mean of what each gives; a picture that is not used is not opened."""
    one, other = with_picture(1), with_picture(2)
    both = {"reference_numbers": [0, 2], "reference_landmarks": one["reference_landmarks"] * 2}
    both |= {"more_images": [{"bytes": b"never read", "path": None}, other["image"]]}
    both |= {"more_images_sha256": ["0" * 64, other["image_sha256"]]}
    both |= {"id_embeddings": one["id_embeddings"] * 2, "embeddings": one["embeddings"] * 2}
    stage = started(models, monkeypatch, hyperlora="with-base", base_weight=0.85)

    def drawn(name: str, **changes: Any) -> np.ndarray:
        return picture(stage.process([with_picture(1, identity_id=name, **changes)])[0]).astype(int)

    alone = drawn("alone")
    used = drawn("both", **both, reference_used=[True, True], more_id_pictures=[one["id_picture"]])
    unused = drawn("one", **both, reference_used=[True, False])
    assert np.abs(alone - used).mean() > 0.1
    assert np.array_equal(alone, unused)
