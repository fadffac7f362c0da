"""The demo set: pictures from installed packages, four faces and a cat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ipvg_ray.config import DatasetConfig
from ipvg_ray.dataset.demo import PROMPTS, Box, _cut, find_faces, make_demo
from ipvg_ray.dataset.formats import detect_format
from ipvg_ray.dataset.freeze import freeze
from ipvg_ray.media.images import decode


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo") / "set")


def test_each_person_has_one_face_and_the_cat_none(demo: Path) -> None:
    faces = {file.parent.name: find_faces(decode(file.read_bytes())) for file in demo.glob("raw/*/image.png")}
    assert {name: len(found) for name, found in faces.items()} == {
        "id001": 1,
        "id002": 1,
        "id003": 1,
        "id004": 1,
        "cat": 0,
    }
    assert all(box.side > 70 for found in faces.values() for box in found)


def test_the_people_are_different_ones(demo: Path) -> None:
    pictures = {file.read_bytes() for file in demo.glob("raw/*/image.png")}
    assert len(pictures) == 5


def test_it_freezes_without_a_problem_and_is_the_same_each_time(demo: Path, tmp_path: Path) -> None:
    assert detect_format(str(demo)) == "vip200k"
    summary = freeze(DatasetConfig(path=str(demo)), tmp_path / "run")
    assert (summary.identities, summary.samples, summary.problems) == (5, 10, 0)
    before = {file: file.read_bytes() for file in demo.rglob("*.*")}
    make_demo(demo)
    assert {file: file.read_bytes() for file in demo.rglob("*.*")} == before


def test_prompts_are_of_the_specs_length() -> None:
    lengths = [len(prompt.split()) for prompts in PROMPTS.values() for prompt in prompts]
    assert len(set().union(*PROMPTS.values())) == 10
    assert min(lengths) >= 35
    assert max(lengths) <= 60


def test_a_cut_stays_inside_the_picture() -> None:
    picture = np.arange(100 * 120 * 3, dtype=np.uint32).astype(np.uint8).reshape(100, 120, 3)
    assert _cut(picture, Box(50, 40, 20)).shape == (48, 48, 3)
    assert np.array_equal(_cut(picture, Box(0, 80, 20)), picture[66:100, 0:34])
