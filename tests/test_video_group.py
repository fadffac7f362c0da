"""The video stage on a group of two gloo ranks through Ray: its videos, and what happens when a rank is killed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

from ipvg_ray import config
from ipvg_ray.media import images, videos
from ipvg_ray.models.mini import wan_vace
from ipvg_ray.pipeline.groups import LedGroup
from ipvg_ray.pipeline.stage import RowError, StageContext
from ipvg_ray.stages.video import VideoStage

pytestmark = pytest.mark.slow
STEPS = 6
RETRY_SECONDS = 60.0
"""Room for a busy machine; the bar is 15 s, and benchmarks/groups.py measures it."""


class Files:
    """Media and scratch in a folder; every process that is handed them is written down."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        with (self.root / "looks").open("a") as looks:
            looks.write(json.dumps({"t": time.time(), "pid": os.getpid()}) + "\n")

    def publish(self, folder: str, identity_id: str, name: str, suffix: str, data: bytes) -> str:
        path = self.root / folder / identity_id / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return str(path.relative_to(self.root))

    def read(self, name: str) -> bytes | None:
        path = self.root / "scratch" / name
        return path.read_bytes() if path.exists() else None

    def write(self, name: str, data: bytes) -> None:
        (self.root / "scratch").mkdir(exist_ok=True)
        (self.root / "scratch" / f"{name}.new").write_bytes(data)
        (self.root / "scratch" / f"{name}.new").rename(self.root / "scratch" / name)

    def remove(self, name: str) -> None:
        (self.root / "scratch" / name).unlink(missing_ok=True)


@ray.remote(num_cpus=0)
class Worker:
    """The stage in an actor, with the group that it asks for; as the engine makes it."""

    def __init__(self, settings: config.Config, run: Path) -> None:
        self.stage = VideoStage(settings)
        asked = self.stage.ranks()
        self.group = LedGroup(asked, "cpu", 1) if asked else None
        if self.group:
            self.group.start()
        self.stage.setup(StageContext("cpu", 1, Files(run), str(run), Files(run), self.group))

    def process(self, row: dict[str, Any]) -> dict[str, Any]:
        (result,) = self.stage.process([row])
        assert not isinstance(result, RowError), result
        return result

    def builds(self) -> int:
        assert self.group is not None
        return self.group.builds


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    wan_vace.make(root)
    return root


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def settings(models: Path, **group: int) -> config.Config:
    video = {"model": wan_vace.NAME, "width": 48, "height": 32, "frames": 5, "fps": 8, "steps": STEPS, "save_every": 1}
    return config.load("cpu-mini", values={"models": {"root": str(models)}, "video": {**video, "group": group}})


def row(run: Path) -> dict[str, Any]:
    from ipvg_ray.models.wan.text import pack

    generator = torch.Generator().manual_seed(3)
    run.mkdir(parents=True, exist_ok=True)
    (run / "negative").write_bytes(pack(torch.randn(4, 32, generator=generator)))
    y, x = np.mgrid[0:32, 0:48]
    return {
        "sample_id": "id001/prompt1",
        "identity_id": "id001",
        "prompt_id": "prompt1",
        "seed": 41,
        "first_frame": images.encode(np.stack([x * 5, y * 7, 0 * x], -1).astype(np.uint8)),
        "text_states": pack(torch.randn(7, 32, generator=generator)),
        "negative_uri": "negative",
    }


@pytest.fixture(scope="module")
def alone(cluster: None, models: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Frames that one process makes."""
    run = tmp_path_factory.mktemp("alone")
    worker = Worker.remote(settings(models), run)
    result = ray.get(worker.process.remote(row(run)))
    ray.kill(worker)
    return videos.read_frames(run / result["video_uri"])


def check_same(run: Path, result: dict[str, Any], alone: np.ndarray) -> None:
    frames = videos.read_frames(run / result["video_uri"])
    # Before H.264 a level may be tipped by rounding (test_wan_parallel.py); then its encoder may choose otherwise.
    assert np.abs(frames.astype(int) - alone).mean() < 0.5
    assert not list((run / "scratch").iterdir()), "a finished video leaves no state"


@pytest.mark.parametrize("group", [{"gpus": 2, "cfg": 2}, {"gpus": 2, "ulysses": 2}, {"gpus": 2, "ring": 2}], ids=str)
def test_a_group_makes_the_video_that_one_process_makes(
    group: dict[str, int], alone: np.ndarray, models: Path, tmp_path: Path
) -> None:
    worker = Worker.remote(settings(models, **group), tmp_path)
    check_same(tmp_path, ray.get(worker.process.remote(row(tmp_path))), alone)
    ray.kill(worker)


def test_a_rank_killed_in_mid_video(alone: np.ndarray, models: Path, tmp_path: Path) -> None:
    worker = Worker.remote(settings(models, gpus=2, ulysses=2), tmp_path)
    undisturbed = ray.get(worker.process.remote(row(tmp_path)))
    running = worker.process.remote(row(tmp_path))
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("scratch/*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    ranks = looks(tmp_path)
    os.kill(ranks[-1]["pid"], signal.SIGKILL)
    killed = time.time()
    result = ray.get(running, timeout=300)
    assert result == undisturbed, "the same bytes"
    assert ray.get(worker.builds.remote()) == 2
    again = next(look for look in looks(tmp_path) if look["t"] > killed)
    assert again["pid"] not in {look["pid"] for look in ranks}
    assert again["t"] - killed < RETRY_SECONDS
    check_same(tmp_path, result, alone)
    living = {look["pid"] for look in looks(tmp_path)} & set(psutil.pids())
    assert len(living) == 2
    ray.kill(worker)


def looks(run: Path) -> list[dict[str, Any]]:
    """When which rank was handed a row and the place of states, which is where its work begins."""
    return [json.loads(line) for line in (run / "looks").read_text().splitlines()]
