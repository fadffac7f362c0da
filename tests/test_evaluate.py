"""The evaluate stage on real MP4 files, with an analyser whose faces are known."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ipvg_ray import config
from ipvg_ray.media import videos
from ipvg_ray.pipeline.stage import RowError, StageContext
from ipvg_ray.stages.evaluate import EvaluateStage

SIZE = {"width": 64, "height": 48, "frames": 9}


@dataclass
class Face:
    box: np.ndarray
    embedding: np.ndarray


class FakeAnalyser:
    """One face on frames brighter than 128, at a cosine of 0.6 from the first unit vector; none on others."""

    made: tuple[tuple, dict] | None = None

    def __init__(self, *args: object, **options: object) -> None:
        type(self).made = (args, options)

    def faces(self, rgb: np.ndarray) -> list[Face]:
        embedding = np.zeros(512)
        embedding[:2] = 12.0, 16.0
        return [Face(np.array([1, 1, 9, 9]), embedding)] if rgb.mean() > 128 else []


@pytest.fixture
def stage(monkeypatch, tmp_path) -> EvaluateStage:
    module = types.ModuleType("ipvg_ray.models.faces")
    module.FaceAnalyser = FakeAnalyser
    monkeypatch.setitem(sys.modules, "ipvg_ray.models.faces", module)
    stage = EvaluateStage(
        config.load("cpu-mini", values={"video": SIZE, "evaluate": {"frames": 16}, "models": {"root": str(tmp_path)}})
    )
    stage.setup(StageContext("cpu", 3, None, f"{tmp_path}/"))  # type: ignore[arg-type]
    return stage


def row(run: Path, name: str, frames: np.ndarray) -> dict:
    path = run / "videos" / f"{name}.mp4"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(videos.encode_mp4(frames, 8, 18))
    reference = [1.0] + [0.0] * 511
    return {"sample_id": f"id001/{name}", "video_uri": f"videos/{name}.mp4", "embedding": reference, "seed": 1}


def grey(value: int, count: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    return np.full((count, height, width, 3), value, np.uint8)


def test_scores(stage, tmp_path):
    (result,) = stage.process([row(tmp_path, "prompt1", grey(220))])
    assert set(result) == set(stage.table().columns)
    assert result == {"arc_sim": pytest.approx(0.6), "arc_frames": 16, "frames_ok": True, "motion": 0.0}


def test_no_face_and_motion(stage, tmp_path):
    frames = grey(0)
    frames[1::2] = 102  # 0.4 up and down; on the dark side, so no frame shows a face
    (result,) = stage.process([row(tmp_path, "prompt1", frames)])
    assert result["arc_sim"] == result["arc_frames"] == 0
    assert result["motion"] == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("change", [{"count": 5}, {"height": 64}, {"width": 48}])
def test_other_frames_than_configured(stage, tmp_path, change):
    (result,) = stage.process([row(tmp_path, "prompt1", grey(220, **change))])
    assert result["frames_ok"] is False


def test_broken_videos_are_their_rows_failures(stage, tmp_path):
    good, cut, gone = (row(tmp_path, f"prompt{n}", grey(220)) for n in (1, 2, 3))
    path = tmp_path / cut["video_uri"]
    path.write_bytes(path.read_bytes()[:-200])
    (tmp_path / gone["video_uri"]).unlink()
    results = stage.process([cut, good, gone])
    assert [result.kind if isinstance(result, RowError) else "ok" for result in results] == [
        "broken_video",
        "ok",
        "broken_video",
    ]
    assert "prompt2" in results[0].message


def test_analyser_is_set_up_as_configured(stage, tmp_path):
    assert FakeAnalyser.made == (
        (tmp_path / "insightface/models/mini_buffalo_l",),
        {
            "det_sizes": (320,),
            "det_threshold": 0.5,
            "modules": ("detection", "recognition"),
            "device": "cpu",
            "threads": 3,
        },
    )
    assert stage.models() == {"pack": tmp_path / "insightface/models/mini_buffalo_l"}


def test_packs_must_be_the_same():
    with pytest.raises(config.ConfigError, match="must be the same"):
        config.load("cpu-mini", overrides=["faces.pack=other"])
    config.load("cpu-mini", overrides=["faces.pack=other", "evaluate.pack=other"])
