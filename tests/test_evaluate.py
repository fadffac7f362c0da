"""The evaluate stage on real MP4 files, with an analyser whose faces are known."""

from __future__ import annotations

import hashlib
import pickle
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from known_faces import KnownFaces

from ipvg_ray import config
from ipvg_ray.media import images, videos
from ipvg_ray.metrics import catalogue, frames
from ipvg_ray.metrics.scorer import MetricError, Scores
from ipvg_ray.models.mini import metrics
from ipvg_ray.pipeline.stage import RowError, StageContext
from ipvg_ray.stages import evaluate
from ipvg_ray.stages.evaluate import EvaluateStage

SIZE = {"width": 64, "height": 48, "frames": 9}


@dataclass
class Face:
    box: np.ndarray
    embedding: np.ndarray
    landmarks_5: np.ndarray | None = None


class FakeAnalyser(KnownFaces):
    """One face on frames brighter than 128, at a cosine of 0.6 from the first unit vector; none on others."""

    made: tuple[tuple, dict] | None = None

    def __init__(self, *args: object, **options: object) -> None:
        type(self).made = (args, options)

    def faces(self, rgb: np.ndarray) -> list[Face]:
        embedding = np.zeros(512)
        embedding[:2] = 12.0, 16.0
        return [Face(np.array([1, 1, 9, 9]), embedding)] if rgb.mean() > 128 else []


class AlwaysOneFace(FakeAnalyser):
    """One face on every picture, with landmarks."""

    def faces(self, rgb: np.ndarray) -> list[Face]:
        found = super().faces(np.full_like(rgb, 200))[0]
        found.landmarks_5 = np.array([[15, 15], [35, 15], [25, 25], [17, 35], [33, 35]], np.float32)
        return [found]


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
    picture = images.encode(np.full((64, 64, 3), 200, np.uint8))
    digest = hashlib.sha256(picture["bytes"]).hexdigest()
    given = {"embedding": reference, "image": picture, "image_sha256": digest, "face_box": [1.0, 1.0, 9.0, 9.0]}
    given |= {"prompt": "a man in a red coat", "seed": 1}
    return {"sample_id": f"id001/{name}", "video_uri": f"videos/{name}.mp4", **given}


def grey(value: int, count: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    return np.full((count, height, width, 3), value, np.uint8)


def test_scores(stage, tmp_path):
    (result,) = stage.process([row(tmp_path, "prompt1", grey(220))])
    assert set(result) == set(stage.table().columns)
    known = {name: result[name] for name in ("arc_sim", "arc_frames", "frames_ok", "motion")}
    assert known == {"arc_sim": pytest.approx(0.6), "arc_frames": 16, "frames_ok": True, "motion": 0.0}


def test_metrics_without_their_models_are_skipped_and_said_to_be(stage, tmp_path):
    (result,) = stage.process([row(tmp_path, "prompt1", grey(220))])
    assert [result[name] for name in catalogue.NAMES] == [None] * len(catalogue.NAMES)
    assert "cur_sim: mini-curricular-face.bin is not there" in result["skipped"]
    assert "overall: it is a sum of which cur_sim, gme_score, imaging_quality, motion_smoothness" in result["skipped"]
    assert set(stage.models()) == {"pack"}
    assert set(stage.optional_models()) == set(catalogue.fields_of(catalogue.NAMES))


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
            "batch": 1,
        },
    )
    assert stage.models() == {"pack": tmp_path / "insightface/models/mini_buffalo_l"}


def test_a_worker_without_a_model_that_the_driver_counted_on_does_not_start(stage, tmp_path):
    path = tmp_path / stage.config.evaluate.amt
    path.mkdir()
    sent = EvaluateStage(stage.config)
    assert sent.usable()[0] == ["motion_smoothness"]
    path.rmdir()
    worker = pickle.loads(pickle.dumps(sent))
    assert worker.wanted_models() == {}
    with pytest.raises(FileNotFoundError, match=r"where the run was started and not on .*amt: "):
        worker.setup(StageContext("cpu", 1, None, str(tmp_path)))  # type: ignore[arg-type]


def test_videos_of_names_that_were_made_safe_are_found(stage, tmp_path):
    (result,) = stage.process([row(tmp_path, "prompt%201", grey(220))])
    assert not isinstance(result, RowError)


class TwoFaces(FakeAnalyser):
    def faces(self, rgb: np.ndarray) -> list[Face]:
        landmarks = np.array([[15, 15], [35, 15], [25, 25], [17, 35], [33, 35]], np.float32)
        boxes = ([0, 0, 60, 60], [40, 40, 50, 50])
        return [Face(np.array(box), np.full(512, float(n)), landmarks) for n, box in enumerate(boxes)]


@pytest.mark.parametrize(("box", "number"), [([41.0, 40.0, 52.0, 50.0], 1.0), (None, 0.0)])
def test_the_crop_is_of_the_face_that_the_embedding_is_of(stage, tmp_path, box, number):
    stage._scorer._analyser = TwoFaces()
    given = row(tmp_path, "prompt1", grey(220)) | {"face_box": box}
    assert stage._found_on(given)[0][0] == number


def test_a_reference_that_has_changed_or_is_too_large_is_refused(stage, tmp_path):
    given = row(tmp_path, "prompt1", grey(220))
    with pytest.raises(images.ImageError, match="not the file it was"):
        stage._found_on(given | {"image_sha256": "0" * 64})
    stage.config = config.load("cpu-mini", overrides=["dataset.max_image_pixels=1000"])
    with pytest.raises(images.ImageError, match="above 1000 pixels"):
        stage._found_on(given)


def test_packs_must_be_the_same():
    with pytest.raises(config.ConfigError, match="must be the same"):
        config.load("cpu-mini", overrides=["faces.pack=other"])
    config.load("cpu-mini", overrides=["faces.pack=other", "evaluate.pack=other"])


@pytest.fixture
def full_stage(monkeypatch, tmp_path) -> EvaluateStage:
    """With all metrics, on miniature networks."""
    metrics.make(tmp_path)
    module = types.ModuleType("ipvg_ray.models.faces")
    module.FaceAnalyser = AlwaysOneFace
    monkeypatch.setitem(sys.modules, "ipvg_ray.models.faces", module)
    asked = {"metrics": list(catalogue.NAMES), "batch": 3}
    stage = EvaluateStage(config.load("cpu-mini", values={"models": {"root": str(tmp_path)}, "evaluate": asked}))
    stage.setup(StageContext("cpu", 1, None, str(tmp_path)))  # type: ignore[arg-type]
    return stage


def noise(seed: int, count: int = 9, height: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, 64, 3), np.uint8)


def together_and_alone(stage: EvaluateStage, rows: list[dict]) -> tuple[list, list]:
    return list(stage.process(rows)), [result for row in rows for result in stage.process([row])]


def same(first: dict, second: dict) -> bool:
    """Whether two rows of results agree to rounding."""
    numbers = [name for name, value in first.items() if isinstance(value, float)]
    close = all(first[name] == pytest.approx(second[name], abs=1e-5) for name in numbers)
    return close and all(first[name] == second[name] for name in set(first) - set(numbers))


def test_all_metrics_of_a_row_on_miniatures(full_stage, tmp_path):
    (result,) = full_stage.process([row(tmp_path, "prompt1", noise(0))])
    missing = {name for name in catalogue.NAMES if result[name] is None}
    assert missing == {"human_identity"}  # nine frames are too few
    assert result["skipped"].startswith("human_identity: ")
    assert all(np.isfinite(float(result[name])) for name in set(catalogue.NAMES) - missing)
    assert pa.Table.from_pylist([result], full_stage.table().schema).num_rows == 1
    assert set(full_stage.models()) == {"pack", *catalogue.fields_of(catalogue.NAMES)}


@pytest.mark.parametrize(("count", "fps"), [(81, 16), (121, 24), (17, 25)])
def test_every_metric_takes_the_frames_of_its_rule(full_stage, count, fps):
    rules = dict.fromkeys(
        ("human_identity", "aesthetic_quality", "imaging_quality", "motion_smoothness"), frames.all_frames
    )
    rules |= {"overall_consistency": frames.middles(8), "dynamic_degree": frames.eight_a_second}
    rules |= {"clip_score": frames.starts(16), "clip_score_tpige": frames.at_most(32), "gme_score": frames.at_most(16)}
    metrics_of_videos = full_stage._scorer.on_video
    assert set(metrics_of_videos) == set(rules)
    for name, metric in metrics_of_videos.items():
        assert metric.rule(count, fps) == rules[name](count, fps), name


def test_videos_scored_together_have_the_scores_that_they_have_alone(full_stage, tmp_path):
    films = [noise(0), noise(1, count=5), grey(220), noise(2, height=64), noise(3, count=2), noise(4)]
    prompts = ["a man in a red coat", "a dog", "a woman who looks out over the sea and waits", "rain", "x", "a man"]
    rows = [row(tmp_path, f"prompt{i}", film) for i, film in enumerate(films)]
    rows = [given | {"prompt": prompt} for given, prompt in zip(rows, prompts, strict=True)]
    together, alone = together_and_alone(full_stage, rows)
    assert [same(*pair) for pair in zip(together, alone, strict=True)] == [True] * len(rows)
    assert len({result["clip_score"] for result in together}) == len(rows)
    assert [result["motion_smoothness"] is None for result in together] == [False, False, False, False, True, False]


def test_what_fails_on_one_video_leaves_the_others_of_its_batch_alone(full_stage, tmp_path):
    rows = [row(tmp_path, f"prompt{i}", film) for i, film in enumerate([noise(0), noise(1), grey(220), noise(2)])]
    (tmp_path / rows[1]["video_uri"]).write_bytes(b"no video")
    rows[3]["image_sha256"] = "0" * 64
    metric = full_stage._scorer.on_video["imaging_quality"]
    rate = metric.quality

    def fails_on_grey(pixels):
        if (pixels.std((1, 2, 3)) < 0.05).any():
            raise RuntimeError("a flat picture")
        return rate(pixels)

    metric.quality = fails_on_grey
    together, alone = together_and_alone(full_stage, rows)
    assert same(together[0], alone[0])
    kinds = ["broken_video", "metric_failed", "image_changed"]
    for results in (together, alone):
        assert [result.kind for result in results[1:]] == kinds
    assert "imaging_quality: RuntimeError: a flat picture" in together[2].message
    assert isinstance(together[2].__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("failure", "mend"),
    [
        ("gme_score: OutOfMemoryError: CUDA out of memory", "lower evaluate.batch"),
        ("gme_score: ValueError: odd", "leave the metric out of evaluate.metrics"),
        ("arc_sim: ValueError: the reference's embedding is zero", "mend the video or its reference"),
    ],
)
def test_what_is_said_to_mend_a_failed_metric_can_be_done(failure, mend):
    assert mend in evaluate._failed(MetricError(failure)).message


def test_a_lost_gpu_is_not_the_rows_failure(full_stage, tmp_path):
    def lost(pixels):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    full_stage._scorer.on_video["imaging_quality"].quality = lost
    with pytest.raises(RuntimeError, match="illegal memory access"):
        full_stage.process([row(tmp_path, f"prompt{i}", noise(i)) for i in range(2)])


def test_the_next_batch_is_decoded_while_one_is_scored_and_no_two_are_scored_at_once(stage, tmp_path, monkeypatch):
    decoded, scoring = threading.Semaphore(0), threading.Semaphore(1)
    read = videos.read_video

    def read_video(data: bytes):
        found = read(data)
        decoded.release()
        return found

    class Waits:
        wants_crop, calls = False, 0

        def score(self, given):
            assert scoring.acquire(blocking=False)
            self.calls += 1
            if self.calls == 1:
                assert all(decoded.acquire(timeout=60) for _ in range(4))
            scoring.release()
            return [Scores({"arc_sim": 0.5, "arc_frames": 1, "motion": 0.0}, {}) for _ in given]

    monkeypatch.setattr(videos, "read_video", read_video)
    stage._scorer = Waits()
    rows = [row(tmp_path, f"prompt{i}", grey(220)) for i in range(4)]
    with ThreadPoolExecutor(2) as threads:
        results = [result for part in threads.map(stage.process, (rows[:2], rows[2:])) for result in part]
    assert [result["arc_sim"] for result in results] == [0.5] * 4


def test_non_commercial_models_want_acceptance(tmp_path):
    for field in catalogue.fields_of(catalogue.NAMES):
        (tmp_path / getattr(config.EvaluateConfig(), field)).mkdir()
    for accepted in (False, True):
        values = {"models": {"root": str(tmp_path)}, "evaluate": {"accept_licence": accepted}}
        ready, skipped = EvaluateStage(config.load("gpu", values=values)).usable()
        assert len(ready) + len(skipped) == len(catalogue.NAMES)
        assert sorted(skipped) == (
            [] if accepted else ["cur_sim", "human_identity", "imaging_quality", "motion_smoothness", "overall"]
        )
    assert (
        "the licence of amt-s.pth (CC-BY-NC-4.0) is not accepted"
        in (
            EvaluateStage(config.load("gpu", values={"models": {"root": str(tmp_path)}})).usable()[1][
                "motion_smoothness"
            ]
        )
    )


def test_an_unknown_metric_is_refused_with_the_nearest():
    with pytest.raises(config.ConfigError, match="did you mean 'clip_score'"):
        config.load("cpu-mini", overrides=["evaluate.metrics=[clip_scor]"])


def test_models_that_are_not_used_are_not_part_of_the_fingerprint(stage, tmp_path):
    values = {"models": {"root": str(tmp_path)}, "video": SIZE, "evaluate": {"frames": 16, "accept_licence": True}}
    other = EvaluateStage(config.load("cpu-mini", values=values, overrides=["evaluate.amt=other.pth"]))
    assert other.fingerprint_settings() == stage.fingerprint_settings()
    faster = EvaluateStage(config.load("cpu-mini", values=values, overrides=["evaluate.batch=16"]))
    assert faster.fingerprint_settings() == stage.fingerprint_settings()
    assert faster.fingerprint_settings()["batch"] == 2, "as finished runs of older versions have it"
    changed = EvaluateStage(config.load("cpu-mini", values=values, overrides=["evaluate.frames=8"]))
    assert changed.fingerprint_settings() != stage.fingerprint_settings()
