"""The video stage on the miniature, its files published into a temporary folder."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ipvg_ray import config
from ipvg_ray.media import images, videos
from ipvg_ray.models.mini import wan_vace
from ipvg_ray.pipeline.stage import RowError, StageContext
from ipvg_ray.stages.video import VideoStage

SMALL = {"width": 48, "height": 32, "frames": 5, "fps": 8, "steps": 2}


class Folder:
    """Publishes into a plain folder, as the run's store does."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def publish(self, folder: str, identity_id: str, name: str, suffix: str, data: bytes) -> str:
        path = self.root / folder / identity_id / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return str(path.relative_to(self.root))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    wan_vace.make(root)
    return root


@pytest.fixture
def stage(models, tmp_path) -> VideoStage:
    return started(models, tmp_path)


def started(models: Path, run: Path, **video: object) -> VideoStage:
    values = {"models": {"root": str(models)}, "video": {**SMALL, **video}}
    stage = VideoStage(config.load("cpu-mini", values=values))
    stage.setup(StageContext("cpu", 1, Folder(run), str(run)))
    return stage


def row(number: int = 1, height: int = 32, width: int = 48, flip: bool = False, **changes: object) -> dict:
    y, x = np.mgrid[0:height, 0:width]
    first = np.stack([x * 255 // width, y * 255 // height, 0 * x], -1).astype(np.uint8)
    return {
        "sample_id": f"id001/prompt{number}",
        "identity_id": "id001",
        "prompt_id": f"prompt{number}",
        "seed": 40 + number,
        "first_frame": images.encode(np.ascontiguousarray(first[:, ::-1]) if flip else first),
        "video_prompt": "A woman smiles at the camera.",
        **changes,
    }


def test_the_row_describes_the_file(stage, tmp_path):
    (result,) = stage.process([row()])
    assert tuple(result) == tuple(VideoStage.table().columns)
    data = (tmp_path / result["video_uri"]).read_bytes()
    assert result == {
        "video_uri": "videos/id001/prompt1.mp4",
        "video_bytes": len(data),
        "video_sha256": hashlib.sha256(data).hexdigest(),
        "video_width": 48,
        "video_height": 32,
        "video_frames": 5,
        "video_fps": 8.0,
        "video_seconds": 5 / 8,
    }
    assert videos.read_frames(data).shape == (5, 32, 48, 3)


def test_the_file_says_that_it_is_synthetic(stage, tmp_path):
    (result,) = stage.process([row()])
    metadata = videos.probe((tmp_path / result["video_uri"]).read_bytes()).metadata
    assert "Synthetic" in metadata["title"]
    assert "id001/prompt1" in metadata["title"]
    assert "AI-generated" in metadata["comment"]
    assert "seed 41" in metadata["comment"]


def test_bytes_follow_row_and_seed_but_not_the_batch(models, tmp_path):
    stage = started(models, tmp_path)
    alone = stage.process([row(1)])[0]
    beside = stage.process([row(2), row(1)])[1]
    elsewhere = started(models, tmp_path / "other").process([row(1)])[0]
    assert alone == beside == elsewhere


@pytest.mark.parametrize("change", [{"flip": True}, {"seed": 99}, {"video_prompt": "A man walks in the park."}])
def test_first_frame_seed_and_prompt_change_the_picture(stage, tmp_path, change):
    pictures = []
    for changes in ({}, change):
        (result,) = stage.process([row(**changes)])
        pictures.append(videos.read_frames(tmp_path / result["video_uri"]))
    assert not np.array_equal(*pictures)


def test_a_first_frame_of_another_size_is_fitted(stage):
    (result,) = stage.process([row(height=200, width=100)])
    assert (result["video_width"], result["video_height"]) == (48, 32)


def test_bad_rows_fail_alone(stage, tmp_path):
    broken = {"bytes": b"not a picture", "path": None}
    gone = {"bytes": None, "path": str(tmp_path / "gone.png")}
    results = stage.process([row(1, first_frame=broken), row(2, first_frame=gone), row(3, video_prompt=" "), row(4)])
    assert [r.kind for r in results if isinstance(r, RowError)] == ["broken_image", "missing_image", "empty_prompt"]
    assert results[3]["video_uri"] == "videos/id001/prompt4.mp4"
    assert [path.name for path in (tmp_path / "videos" / "id001").iterdir()] == ["prompt4.mp4"]


def test_nan_is_a_failed_row_and_no_file(stage, tmp_path):
    import torch

    with torch.no_grad():
        stage._video.pipeline.transformer.proj_out.bias[0] = torch.nan
    (result,) = stage.process([row()])
    assert isinstance(result, RowError)
    assert result.kind == "bad_video"
    assert not (tmp_path / "videos").exists()


def test_a_file_that_reads_back_otherwise_is_not_published(stage, tmp_path, monkeypatch):
    encode = videos.encode_mp4
    monkeypatch.setattr(videos, "encode_mp4", lambda frames, *rest: encode(frames[:-1], *rest))
    (result,) = stage.process([row()])
    assert isinstance(result, RowError)
    assert result.kind == "bad_video"
    assert not (tmp_path / "videos").exists()


def test_shift_dtype_and_scale_reach_the_model(models, tmp_path):
    import torch

    stage = started(models, tmp_path, shift=5.0, dtype="bfloat16", conditioning_scale=0.25)
    transformer = stage._video.pipeline.transformer
    assert stage._video.pipeline.scheduler.config.flow_shift == 5.0
    assert transformer.dtype == torch.bfloat16
    scales = []
    transformer.register_forward_pre_hook(
        lambda module, args, kwargs: scales.append(kwargs["control_hidden_states_scale"].tolist()), with_kwargs=True
    )
    stage.process([row()])
    assert scales[0] == [0.25, 0.25]


def test_the_contract(models):
    stage = VideoStage(config.load("cpu-mini", values={"models": {"root": str(models)}}))
    assert stage.models() == {"model": models / wan_vace.NAME}
    assert "model" not in stage.fingerprint_settings()


def test_importing_the_stage_loads_no_heavy_library():
    code = "import sys, ipvg_ray.stages.video; print({'torch', 'diffusers', 'transformers', 'ray'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"
