"""The miniature face packs: the real packs' files, and what their networks know of a face."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data

from ipvg_ray.models.faces import FaceAnalyser
from ipvg_ray.models.mini import insightface_pack
from ipvg_ray.models.mini.face_template import landmarks_106
from ipvg_ray.models.mini.lbp_cascade import read_cascade


def test_both_packs_have_the_real_packs_files_and_load_whole(packs: Path) -> None:
    expected = {
        "mini_buffalo_l": {"det_10g", "2d106det", "genderage", "w600k_r50"},
        "mini_antelopev2": {"scrfd_10g_bnkps", "2d106det", "genderage", "glintr100"},
    }
    for name, names in expected.items():
        folder = packs / "insightface/models" / name
        assert {path.stem for path in folder.iterdir()} == names
        assert sum(path.stat().st_size for path in folder.iterdir()) < 5e6
        modules = FaceAnalyser(folder, det_sizes=(256,)).modules
        assert modules == {"detection", "landmark_2d_106", "genderage", "recognition"}


def test_the_seed_alone_decides_the_bytes(packs: Path, tmp_path: Path) -> None:
    def digests(root: Path) -> dict[str, str]:
        return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*.onnx")}

    insightface_pack.make(tmp_path / "same")
    insightface_pack.make(tmp_path / "other", seed=1)
    first = digests(packs)
    assert digests(tmp_path / "same") == first
    other = digests(tmp_path / "other")
    assert {Path(k).stem for k in first if other[k] == first[k]} == {"det_10g", "scrfd_10g_bnkps"}
    assert len(first) == 8
    assert len(set(first.values())) == 7, "as in the real packs, both have the same detector"


def test_the_mirrored_cascade_sees_the_mirror_image() -> None:
    cascade = read_cascade(Path(skimage.data.lbp_frontal_face_cascade_filename()))
    assert len(cascade.thresholds) == 20
    patch = np.random.default_rng(0).integers(0, 256, (24, 24))

    def values(some: Any, window: np.ndarray) -> np.ndarray:
        ring = [(0, 0, 128), (0, 1, 64), (0, 2, 32), (1, 2, 16), (2, 2, 8), (2, 1, 4), (2, 0, 2), (1, 0, 1)]
        results = []
        for (x, y, w, h), table in zip(some.rects, some.tables, strict=True):
            sums = window[y : y + 3 * h, x : x + 3 * w].reshape(3, h, 3, w).sum(axis=(1, 3))
            results.append(table[sum(weight for r, c, weight in ring if sums[r, c] >= sums[1, 1])])
        return np.array(results)

    assert np.array_equal(values(cascade.mirrored(), patch[:, ::-1]), values(cascade, patch))
    assert not np.array_equal(values(cascade, patch[:, ::-1]), values(cascade, patch))


def test_the_landmark_template_is_a_symmetric_face() -> None:
    points = landmarks_106()
    assert np.isfinite(points).all()
    assert len(np.unique(points, axis=0)) == 106
    mirrored = points * (-1, 1) + (1, 0)
    assert all(np.abs(points - m).max(axis=1).min() < 1e-5 for m in mirrored)
    assert points[:, 1].argmax() == 0, "landmark 0 is the chin"
    left_eye, right_eye, tip = points[[33, 35, 39, 40]].mean(0), points[[87, 89, 93, 94]].mean(0), points[86]
    assert left_eye[0] < tip[0] < right_eye[0]
    assert left_eye[1] < tip[1] < points[52:72, 1].min()


def test_the_hyperlora_polygon_encloses_eyes_nose_and_mouth() -> None:
    import cv2

    from ipvg_ray.models.matting import face_polygon

    points = landmarks_106().astype(np.float64) * 100
    polygon = face_polygon(points).astype(np.float32)
    for index in (*range(33, 43), *range(52, 97)):
        assert cv2.pointPolygonTest(polygon, points[index].tolist(), False) > 0, index
