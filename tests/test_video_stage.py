"""The stages text_states and video on the miniatures, their files published into a temporary folder."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media_folder import Folder

from ipvg_ray import config
from ipvg_ray.media import images, videos
from ipvg_ray.models.mini import wan_vace
from ipvg_ray.pipeline.stage import RowError, StageContext
from ipvg_ray.pipeline.store import FencedError
from ipvg_ray.stages import make_stages
from ipvg_ray.stages.text_states import TextStatesStage
from ipvg_ray.stages.video import VideoStage
from ipvg_ray.storage import StorageError

SMALL = {"width": 64, "height": 32, "frames": 5, "fps": 8, "steps": 2}
MODELS = {"ti2v-5B": wan_vace.TI2V_NAME, "i2v-A14B": wan_vace.A14B_NAME}


class Memory:
    """A scratch store that lives in this process."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.writes = 0

    def read(self, name: str) -> bytes | None:
        return self.kept.get(name)

    def write(self, name: str, data: bytes) -> None:
        self.kept[name] = data
        self.writes += 1

    def remove(self, name: str) -> None:
        self.kept.pop(name, None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    wan_vace.make(root)
    return root


def settings(models: Path, **video: Any) -> config.Config:
    video = {**SMALL, "model": MODELS.get(video.get("task", ""), wan_vace.NAME), **video}
    enhance = "hyperlora" if video.get("reference") == "reference_picture" else "none"
    values = {"models": {"root": str(models)}, "first_frame": {"reference": {"enhance": enhance}}, "video": video}
    return config.load("cpu-mini", values=values)


def started(models: Path, run: Path, scratch: Memory | None = None, **video: Any) -> VideoStage:
    stage = VideoStage(settings(models, **video))
    stage.setup(StageContext("cpu", 1, Folder(run), str(run), scratch))
    return stage


@pytest.fixture(scope="module")
def encoder(models: Path, tmp_path_factory: pytest.TempPathFactory) -> TextStatesStage:
    stage, run = TextStatesStage(settings(models)), tmp_path_factory.mktemp("texts")
    stage.setup(StageContext("cpu", 1, Folder(run), str(run)))
    stage.run = run  # type: ignore[attr-defined]
    return stage


@pytest.fixture
def row(encoder: TextStatesStage, tmp_path: Path) -> Any:
    """Makes rows as they arrive at the stage, with their text states, for a run in `tmp_path`."""

    def make(number: int = 1, height: int = 32, width: int = 64, flip: bool = False, **changes: Any) -> dict[str, Any]:
        y, x = np.mgrid[0:height, 0:width]
        first = np.stack([x * 255 // width, y * 255 // height, 0 * x], -1).astype(np.uint8)
        picture = images.encode(np.ascontiguousarray(first[:, ::-1]) if flip else first)
        made = {
            "sample_id": f"id001/prompt{number}",
            "identity_id": "id001",
            "prompt_id": f"prompt{number}",
            "seed": 40 + number,
            "first_frame": picture,
            "image": picture,
            "image_sha256": hashlib.sha256(picture["bytes"]).hexdigest(),
            "video_prompt": "A woman smiles at the camera.",
            **changes,
        }
        if made["video_prompt"].strip():
            (text,) = encoder.process([made])
            assert isinstance(text, dict)
            made |= text
            target = tmp_path / made["negative_uri"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((encoder.run / made["negative_uri"]).read_bytes())  # type: ignore[attr-defined]
        return made

    return make


def test_the_row_describes_the_file(models: Path, tmp_path: Path, row: Any) -> None:
    (result,) = started(models, tmp_path).process([row()])
    assert isinstance(result, dict)
    assert tuple(result) == tuple(VideoStage.table().columns)
    data = (tmp_path / result["video_uri"]).read_bytes()
    poster, strip = (images.decode(result.pop(name)["bytes"]) for name in ("video_poster", "video_strip"))
    assert result == {
        "video_uri": "videos/id001/prompt1.mp4",
        "video_bytes": len(data),
        "video_sha256": hashlib.sha256(data).hexdigest(),
        "video_width": 64,
        "video_height": 32,
        "video_frames": 5,
        "video_fps": 8.0,
        "video_seconds": 5 / 8,
    }
    frames = videos.read_frames(data)
    assert frames.shape == (5, 32, 64, 3)
    assert (poster.shape, strip.shape) == ((32, 64, 3), (32, 5 * 64, 3))
    assert np.abs(poster.astype(float) - frames[2]).mean() < 20
    assert np.abs(strip[:, -64:].astype(float) - frames[4]).mean() < 20


def test_the_file_says_that_it_is_synthetic(models: Path, tmp_path: Path, row: Any) -> None:
    (result,) = started(models, tmp_path).process([row()])
    assert isinstance(result, dict)
    metadata = videos.probe((tmp_path / result["video_uri"]).read_bytes()).metadata
    assert "Synthetic" in metadata["title"]
    assert "id001/prompt1" in metadata["title"]
    assert "AI-generated" in metadata["comment"]
    assert f"run {tmp_path.name} " in metadata["comment"]
    assert "seed 41" in metadata["comment"]


def test_bytes_follow_row_and_seed_but_not_the_batch(models: Path, tmp_path: Path, row: Any) -> None:
    stage = started(models, tmp_path)
    alone = stage.process([row(1)])[0]
    beside = stage.process([row(2), row(1)])[1]
    elsewhere = started(models, tmp_path).process([row(1)])[0]
    assert alone == beside == elsewhere


def test_rows_together_are_the_rows_alone_but_for_rounding(models: Path, tmp_path: Path, row: Any) -> None:
    rows, frames = [row(1), row(2, flip=True), row(3)], []
    for together in (1, 2):
        pool = {"batch_size": 2}
        results = started(models, tmp_path, together=together, branches="together", pool=pool).process(rows)
        frames.append([videos.read_frames(tmp_path / r["video_uri"]) for r in results if isinstance(r, dict)])
    for alone, beside in zip(*frames, strict=True):
        assert np.abs(alone.astype(int) - beside).mean() < 1, "what the encoder makes of rounding"
    assert np.abs(frames[0][0].astype(int) - frames[0][1]).mean() > 5, "another first frame"


@pytest.mark.parametrize("change", [{"flip": True}, {"seed": 99}, {"video_prompt": "A man walks in the park."}])
def test_first_frame_seed_and_prompt_change_the_picture(
    models: Path, tmp_path: Path, row: Any, change: dict[str, Any]
) -> None:
    stage, pictures = started(models, tmp_path), []
    for changes in ({}, change):
        (result,) = stage.process([row(**changes)])
        assert isinstance(result, dict)
        pictures.append(videos.read_frames(tmp_path / result["video_uri"]))
    assert not np.array_equal(*pictures)


@pytest.mark.parametrize("task", ["vace-r2v", "vace-i2v+ref", "ti2v-5B", "i2v-A14B"])
def test_every_task_makes_a_video_of_its_pictures(task: str, models: Path, tmp_path: Path, row: Any) -> None:
    stage, made = started(models, tmp_path, task=task), []
    for flip in (False, True):
        (result,) = stage.process([row(flip=flip)])
        assert isinstance(result, dict), result
        made.append(videos.read_frames(tmp_path / result["video_uri"]))
    assert made[0].shape == (5, 32, 64, 3)
    assert not np.array_equal(*made)


def test_needs_follow_the_task(models: Path) -> None:
    text = {"text_states", "negative_uri"}
    for task, pictures in {
        "vace-i2v": {"first_frame"},
        "vace-r2v": {"image", "image_sha256"},
        "vace-i2v+ref": {"first_frame", "image", "image_sha256"},
        "ti2v-5B": {"first_frame"},
        "i2v-A14B": {"first_frame"},
    }.items():
        assert set(VideoStage(settings(models, task=task)).needs) == pictures | text
    assert set(VideoStage(settings(models, task="vace-r2v", reference="id_picture")).needs) == {"id_picture", *text}
    drawn = settings(models, task="vace-r2v", reference="reference_picture")
    assert set(VideoStage(drawn).needs) == {"reference_picture", *text}
    assert "first_frame" in [stage.name for stage in make_stages(drawn)], "which draws it"
    names = [stage.name for stage in make_stages(settings(models, task="vace-r2v", text_in_worker=True))]
    assert names == ["faces", "matting", "prompts", "video", "evaluate"]


def test_the_video_follows_the_reference_that_is_chosen(models: Path, tmp_path: Path, row: Any) -> None:
    given, frames = {**row(), "reference_picture": row(flip=True)["image"]}, []
    for reference in ("image", "reference_picture"):
        (result,) = started(models, tmp_path, task="vace-r2v", reference=reference).process([given])
        assert isinstance(result, dict), result
        frames.append(videos.read_frames(tmp_path / result["video_uri"]))
    (flipped,) = started(models, tmp_path, task="vace-r2v").process([row(flip=True)])
    assert isinstance(flipped, dict)
    assert not np.array_equal(*frames)
    assert np.array_equal(frames[1], videos.read_frames(tmp_path / flipped["video_uri"]))


def test_the_reference_must_be_the_file_that_the_run_began_with(models: Path, tmp_path: Path, row: Any) -> None:
    (result,) = started(models, tmp_path, task="vace-r2v").process([row(image_sha256="0" * 64)])
    assert isinstance(result, RowError)
    assert result.kind == "image_changed"


def test_bad_rows_fail_alone(models: Path, tmp_path: Path, row: Any) -> None:
    broken = {"bytes": b"not a picture", "path": None}
    gone = {"bytes": None, "path": str(tmp_path / "gone.png")}
    results = started(models, tmp_path).process([row(1, first_frame=broken), row(2, first_frame=gone), row(4)])
    assert [r.kind for r in results if isinstance(r, RowError)] == ["broken_image", "missing_image"]
    assert isinstance(results[2], dict)
    assert [path.name for path in (tmp_path / "videos" / "id001").iterdir()] == ["prompt4.mp4"]


def test_nan_is_a_failed_row_and_no_file(models: Path, tmp_path: Path, row: Any) -> None:
    stage = started(models, tmp_path)
    with torch.no_grad():
        stage._maker.video.denoiser.transformers[0].proj_out.bias[0] = torch.nan
    (result,) = stage.process([row()])
    assert isinstance(result, RowError)
    assert result.kind == "bad_video"
    assert not (tmp_path / "videos").exists()


def test_a_file_that_reads_back_otherwise_is_not_published(
    models: Path, tmp_path: Path, row: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = videos.encode_mp4
    monkeypatch.setattr(videos, "encode_mp4", lambda frames, *rest, **kw: encode(frames[:-1], *rest, **kw))
    (result,) = started(models, tmp_path).process([row()])
    assert isinstance(result, RowError)
    assert result.kind == "bad_video"
    assert not (tmp_path / "videos").exists()


def test_frames_are_encoded_while_the_next_row_is_made(
    models: Path, tmp_path: Path, row: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder waits for the second row's denoising: in turn, this would never end."""
    stage, begun, encode = started(models, tmp_path), threading.Semaphore(0), videos.encode_mp4
    denoise = stage._maker.video.denoise
    monkeypatch.setattr(stage._maker.video, "denoise", lambda *a, **k: (begun.release(), denoise(*a, **k))[1])

    def waiting(*arguments: Any, **options: Any) -> bytes:
        assert all(begun.acquire(timeout=60) for _ in range(2)), "the second row was not begun meanwhile"
        begun.release(2)  # for the second row's own encoding
        return encode(*arguments, **options)

    monkeypatch.setattr(videos, "encode_mp4", waiting)
    assert all(isinstance(result, dict) for result in stage.process([row(1), row(2)]))


def test_settings_reach_the_model(models: Path, tmp_path: Path, row: Any) -> None:
    stage = started(models, tmp_path, shift=5.0, dtype="bfloat16", conditioning_scale=0.25, guide="tpige")
    transformer = stage._maker.video.denoiser.transformers[0]
    assert stage._maker.video.denoiser.scheduler().config.flow_shift == 5.0
    assert transformer.dtype == torch.bfloat16
    scales = []
    transformer.register_forward_pre_hook(
        lambda module, args, kwargs: scales.append(kwargs["control_hidden_states_scale"].tolist()), with_kwargs=True
    )
    assert isinstance(stage.process([row()])[0], dict)
    assert scales[:3] == [[0.25, 0.25], [0.25, 0.25], [0.25, 0.0]], "the weak branch skips block 2 with its hint"


@pytest.mark.parametrize("kind", ["first_block", "taylorseer"])
def test_caches_leave_forwards_out(kind: str, models: Path, tmp_path: Path, row: Any) -> None:
    cache = {"kind": kind, "threshold": 10.0, "start": 2, "interval": 3}
    stage = started(models, tmp_path, steps=6, cache=cache)
    calls: list[int] = []
    stage._maker.video.denoiser.transformers[0].blocks[3].ffn.register_forward_pre_hook(lambda *_: calls.append(1))
    first = stage.process([row()])[0]
    assert 0 < len(calls) < 2 * 6
    assert stage.process([row()])[0] == first, "the second video begins without memories of the first"


# -- text states -----------------------------------------------------------------------------------------------------


def test_text_states_are_rows_and_the_negative_prompt_one_file(encoder: TextStatesStage, models: Path) -> None:
    from ipvg_ray.models.wan.text import unpack

    rows = [{"video_prompt": text} for text in ("a man", "a woman smiles", " ", "a man")]
    results = encoder.process(rows)
    assert [r.kind for r in results if isinstance(r, RowError)] == ["empty_prompt"]
    good = [r for r in results if isinstance(r, dict)]
    assert tuple(good[0]) == tuple(TextStatesStage.table().columns)
    assert good[0] == good[2] != good[1]
    states = unpack(good[0]["text_states"])
    assert states.shape == (good[0]["text_tokens"], 32)
    assert states.dtype == torch.float32
    assert len({r["negative_uri"] for r in good}) == 1
    kept = list((encoder.run / "text_states_shared").rglob("*.safetensors"))  # type: ignore[attr-defined]
    assert len(kept) == 1
    assert unpack(kept[0].read_bytes()).shape[1] == 32


def test_the_negative_prompt_is_part_of_the_text_stage(models: Path) -> None:
    plain, other = (TextStatesStage(settings(models, **v)) for v in ({}, {"negative_prompt": "static"}))
    assert plain.fingerprint_settings() != other.fingerprint_settings()


def test_states_keep_their_dtype(models: Path, tmp_path: Path) -> None:
    from ipvg_ray.models.wan.text import unpack

    values = {"models": {"root": str(models)}, "text_states": {"dtype": "bfloat16"}}
    stage = TextStatesStage(config.load("cpu-mini", values=values))
    stage.setup(StageContext("cpu", 1, Folder(tmp_path), str(tmp_path)))
    (result,) = stage.process([{"video_prompt": "a man"}])
    assert isinstance(result, dict)
    assert unpack(result["text_states"]).dtype == torch.bfloat16


def test_a_worker_with_its_own_encoder_makes_the_same_video(models: Path, tmp_path: Path, row: Any) -> None:
    given = row()
    apart = started(models, tmp_path).process([given])[0]
    alone = started(models, tmp_path, text_in_worker=True)
    assert "video_prompt" in alone.needs
    assert alone.process([given])[0] == apart
    (empty,) = alone.process([row(video_prompt=" ")])
    assert isinstance(empty, RowError)
    assert empty.kind == "empty_prompt"


def test_the_video_worker_holds_no_text_encoder(models: Path, tmp_path: Path) -> None:
    from transformers import UMT5EncoderModel

    stage = started(models, tmp_path)
    assert stage._encoder is None
    assert not any(isinstance(value, UMT5EncoderModel) for value in vars(stage._maker.video).values())


# -- surviving -------------------------------------------------------------------------------------------------------


class KilledError(BaseException):
    """Stands for a process that ends in the middle of a step."""


@pytest.mark.parametrize(
    ("video", "again"),
    [
        ({"task": "vace-i2v"}, 4),
        ({"task": "i2v-A14B"}, 4),
        ({"task": "vace-i2v", "guide": "tpige", "cache": {"kind": "first_block", "threshold": 10.0, "start": 1}}, 4),
        ({"task": "vace-i2v", "cache": {"kind": "taylorseer", "start": 1, "interval": 2}}, 4),
    ],
)
def test_a_killed_video_goes_on_and_ends_in_the_same_bytes(
    video: dict[str, Any], again: int, models: Path, tmp_path: Path, row: Any
) -> None:
    """Killed during step 7 of 10 with a state kept every 3 steps: steps 7 to 10 are done again."""
    video = video | {"steps": 10, "save_every": 3}
    undisturbed = started(models, tmp_path, Memory(), **video).process([row()])[0]
    scratch, calls = Memory(), []
    first = started(models, tmp_path, scratch, **video)
    evaluate = first._maker.video.denoiser.evaluate

    def dying(shared: Any, branches: Any) -> Any:
        if shared.step.index == 6:
            raise KilledError
        return evaluate(shared, branches)

    first._maker.video.denoiser.evaluate = dying
    with pytest.raises(KilledError):
        first.process([row()])
    assert len(scratch.kept) == 1
    second = started(models, tmp_path, scratch, **video)
    evaluate = second._maker.video.denoiser.evaluate
    second._maker.video.denoiser.evaluate = lambda shared, b: (calls.append(shared.step.index), evaluate(shared, b))[1]
    assert second.process([row()])[0] == undisturbed
    assert calls == [6, 7, 8, 9]
    assert len(calls) == again
    assert not scratch.kept, "what is finished leaves nothing behind"


def test_another_row_does_not_go_on_from_it(models: Path, tmp_path: Path, row: Any) -> None:
    from ipvg_ray.models.wan.state import name_of

    stage = started(models, tmp_path)
    changes: list[dict[str, Any]] = [{}, {"seed": 9}, {"flip": True}, {"video_prompt": "a man"}]
    names = {name_of([stage._sample(row(**change))], None) for change in changes}
    assert len(names) == 4
    assert name_of([stage._sample(row())], None) in names


def test_a_state_that_cannot_be_read_is_begun_anew(
    models: Path, tmp_path: Path, row: Any, caplog: pytest.LogCaptureFixture
) -> None:
    scratch = Memory()
    stage = started(models, tmp_path, scratch, steps=4, save_every=2)
    whole = stage.process([row()])[0]
    assert scratch.writes == 1, "nothing is kept after the last step"
    scratch.read = lambda name: b"torn"  # type: ignore[method-assign]
    assert stage.process([row()])[0] == whole
    assert "cannot be read" in caplog.text


def test_a_state_that_cannot_be_kept_costs_no_video(
    models: Path, tmp_path: Path, row: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, data: bytes) -> None:
        raise errors.pop(0)

    errors: list[OSError] = [StorageError("the disk is full"), FencedError("closed")]
    scratch = Memory()
    monkeypatch.setattr(scratch, "write", refuse)
    stage = started(models, tmp_path, scratch, steps=4, save_every=2)
    (made,) = stage.process([row()])
    assert made["video_frames"] == SMALL["frames"]
    assert "the disk is full" in caplog.text
    with pytest.raises(FencedError):
        stage.process([row()])


def test_how_often_it_is_kept_is_no_part_of_the_result_without_cache(models: Path) -> None:
    def fingerprint(**video: Any) -> Any:
        return VideoStage(settings(models, **video)).fingerprint_settings()

    assert fingerprint(save_every=3) == fingerprint(save_every=0)
    cache = {"kind": "first_block"}
    assert fingerprint(save_every=3, cache=cache) != fingerprint(save_every=0, cache=cache)


def test_the_contract(models: Path) -> None:
    stage = VideoStage(settings(models))
    assert stage.models() == {"model": models / wan_vace.NAME}
    assert "model" not in stage.fingerprint_settings()


@pytest.mark.parametrize("stage", ["video", "text_states"])
def test_importing_the_stage_loads_no_heavy_library(stage: str) -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'ray'} & set(sys.modules)"
    code = f"import sys, ipvg_ray.stages.{stage}; print({heavy})"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"
