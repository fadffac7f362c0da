"""What is installed is what is there: packages are listed by hand, as one of them lies elsewhere in the tree."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed() -> None:
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("run from an installed copy, without its pyproject.toml")
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "ipvg_ray").rglob("__init__.py")}
    assert listed == {".".join(folder.parts) for folder in folders} | {"ipvg_ray.schemas"}
