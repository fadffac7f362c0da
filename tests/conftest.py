"""Shared by all tests: where the sample data is, and miniature models made once."""

from __future__ import annotations

import os
from pathlib import Path

# Miniature networks are slower on several threads than on one, and much slower beside other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# As the engine sets it, but before any test imports Ray: Ray reads it once.
os.environ.setdefault("RAY_AUTH_MODE", "token")
# Ray's workers import the stages of engine_driver.py from here.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The sample data's folder, from IPVG_RAY_SHARED; tests that need it are skipped where it is not set."""
    place = os.environ.get("IPVG_RAY_SHARED")
    if not place or not Path(place).is_dir():
        pytest.skip("IPVG_RAY_SHARED does not name the folder with the sample data")
    return Path(place)


@pytest.fixture(scope="session")
def mini_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all miniature models; IPVG_RAY_MINI names one that is made already."""
    from ipvg_ray.models.mini import make_all

    root = Path(os.environ.get("IPVG_RAY_MINI") or tmp_path_factory.mktemp("mini"))
    make_all(root, report=lambda line: None)
    return root


@pytest.fixture(scope="session")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the miniature face packs alone, which take a second to make."""
    from ipvg_ray.models.mini import insightface_pack

    root = tmp_path_factory.mktemp("faces")
    insightface_pack.make(root)
    return root
