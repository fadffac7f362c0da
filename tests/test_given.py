"""Videos, pictures and prompts that others made: where they are looked for, and what comes of what is not there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from media_folder import Folder

from ipvg_ray import config, tables
from ipvg_ray.dataset.asked import asked, require_own_numbers
from ipvg_ray.dataset.problems import DatasetError
from ipvg_ray.media import images, videos
from ipvg_ray.pipeline.stage import RowError, StageContext
from ipvg_ray.stages import UnknownStageError, make_stages, stages_of
from ipvg_ray.stages.evaluate import EvaluateGivenStage
from ipvg_ray.stages.given import GivenVideosStage, LayoutError, checked_layout, layout_of, names_of


@pytest.mark.parametrize(
    ("layout", "names"),
    [("challenge", ["id001/prompt2.mp4"]), ("tpige", ["id001_2.mp4", "id001_prompt2.mp4"]), ("2026", ["2.mp4"])],
)
def test_names(layout, names):
    assert names_of(layout, "id001", "prompt2") == names


@pytest.mark.parametrize(
    ("file", "layout"), [("id001/prompt1.mp4", "challenge"), ("id001_1.mp4", "tpige"), ("17.mp4", "2026")]
)
def test_a_layout_is_told_by_names(tmp_path, file, layout):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"")
    assert layout_of(str(tmp_path)) == layout


def test_layouts_that_are_none(tmp_path):
    with pytest.raises(LayoutError, match=r"no \.mp4 files and no folders"):
        layout_of(str(tmp_path))
    with pytest.raises(LayoutError, match="cannot list"):
        layout_of(str(tmp_path / "gone"))
    with pytest.raises(LayoutError, match="there are challenge, tpige, 2026"):
        checked_layout("2027")


def test_missing_and_broken_videos(tmp_path):
    data = videos.encode_mp4(np.zeros((4, 32, 48, 3), np.uint8), 8, 18)
    (tmp_path / "given").mkdir()
    (tmp_path / "given/id001_1.mp4").write_bytes(data)
    (tmp_path / "given/id001_prompt2.mp4").write_bytes(data[:-100])
    stage = GivenVideosStage(config.load("cpu-mini"), str(tmp_path / "given"), "tpige")
    stage.setup(StageContext("cpu", 1, Folder(tmp_path / "run"), str(tmp_path / "run")))
    rows = [{"identity_id": "id001", "prompt_id": f"prompt{number}", "prompt": "x"} for number in (1, 2, 3)]
    good, broken, missing = stage.process(rows)
    assert set(good) == set(stage.table().columns)
    assert (good["video_frames"], good["video_width"], good["video_fps"]) == (4, 48, 8)
    assert images.decode(good["video_poster"]["bytes"]).shape == (32, 48, 3)
    assert images.decode(good["video_strip"]["bytes"]).shape == (32, 4 * 48, 3)
    assert (tmp_path / "run" / good["video_uri"]).read_bytes() == data
    assert [error.kind for error in (broken, missing) if isinstance(error, RowError)] == [
        "broken_video",
        "missing_video",
    ]
    assert "id001_3.mp4 or id001_prompt3.mp4" in missing.message


def test_taking_videos_asks_for_no_gpu():
    settings = config.load("gpu")
    asks = GivenVideosStage(settings, "/given", "2026").resources()
    assert settings.video.pool.gpus == 1
    assert (asks.gpus, asks.cpus, asks.max_workers) == (0, 1, settings.evaluate.pool.max_workers)


def test_a_video_that_cannot_be_read_is_not_a_missing_one(tmp_path):
    (tmp_path / "given/id001_1.mp4").mkdir(parents=True)
    stage = GivenVideosStage(config.load("cpu-mini"), str(tmp_path / "given"), "tpige")
    stage.setup(StageContext("cpu", 1, Folder(tmp_path / "run"), str(tmp_path / "run")))
    with pytest.raises(OSError, match=r"id001_1\.mp4"):
        stage.process([{"identity_id": "id001", "prompt_id": "prompt1", "prompt": "x"}])


def test_later_commands_know_the_stages_of_a_run_that_scores_given_videos():
    settings = config.load("cpu-mini")
    kept = {"dataset": {"videos": "/given", "layout": "tpige"}}
    video, scores = stages_of(settings, kept)
    assert (video.fingerprint_settings(), type(scores)) == ({"folder": "/given", "layout": "tpige"}, EvaluateGivenStage)
    assert [stage.name for stage in stages_of(settings, kept, "video")] == ["video"]
    with pytest.raises(UnknownStageError, match="there are video, evaluate"):
        stages_of(settings, kept, "faces")
    assert stages_of(settings, {})[0].name == "faces"


def test_older_runs_keep_their_videos_place_with_the_fingerprint_alone():
    settings = config.load("cpu-mini")
    inputs = GivenVideosStage(settings, "/given", "2026").fingerprint_settings()
    kept = {"dataset": {"path": "/refs"}, "stages": {"video": {"inputs": {"settings": inputs}}}}
    assert [type(stage) for stage in stages_of(settings, kept)] == [GivenVideosStage, EvaluateGivenStage]
    assert stages_of(settings, kept)[0].fingerprint_settings() == inputs
    made = next(stage for stage in make_stages(settings) if stage.name == "video").fingerprint_settings()
    own = {"dataset": {"path": "/refs"}, "stages": {"video": {"inputs": {"settings": made}}}}
    assert stages_of(settings, own)[0].name == "faces"


class TestAsked:
    def test_one_set_with_its_prompts(self, tmp_path):
        assert asked(str(tmp_path), None, tmp_path) == {"path": str(tmp_path)}
        assert asked("s3://b/set", None, tmp_path) == {"path": "s3://b/set"}

    def test_prompt_files(self, tmp_path):
        for name, text in (("a_1.txt", "one\n"), ("a_prompt2.txt", "two"), ("b_b_10.txt", "ten"), ("note.txt", "no")):
            (tmp_path / name).write_text(text)
        found = asked(str(tmp_path / "refs"), str(tmp_path), tmp_path / "work")
        assert found["format"] == "tpige_json"
        assert found["images"] == str(tmp_path / "refs")
        assert json.loads(Path(found["path"]).read_text()) == {"a": {"1": "one", "2": "two"}, "b_b": {"10": "ten"}}

    def test_the_list_of_2026_is_numbered(self, tmp_path):
        (tmp_path / "eval.json").write_text(json.dumps([{"img": "images/id007.webp", "prompt": "p"}]))
        found = asked(str(tmp_path / "images"), str(tmp_path / "eval.json"), tmp_path / "work")
        row = {"identity_id": "id007", "image": "id007.webp", "prompt": "p", "prompt_id": "1"}
        assert json.loads(Path(found["path"]).read_text()) == row

    @pytest.mark.parametrize("refs", ["eval.json", "."])
    def test_the_list_of_2026_is_numbered_as_a_set_too(self, tmp_path, refs):
        entries = [{"img": f"images/{name}.png", "prompt": "p"} for name in "ab"]
        (tmp_path / "eval.json").write_text(json.dumps(entries))
        found = asked(str(tmp_path / refs), None, tmp_path / "work")
        rows = [json.loads(line) for line in Path(found["path"]).read_text().splitlines()]
        assert [(row["image"], row["prompt_id"]) for row in rows] == [("images/a.png", "1"), ("images/b.png", "2")]
        assert found["images"] == str(tmp_path)
        other = asked(str(tmp_path / refs), None, tmp_path / "work", numbered=False)
        assert other == {"path": str((tmp_path / refs).resolve())}

    def test_two_samples_of_one_number_are_refused(self, tmp_path):
        for number, names in enumerate([["1", "2"], ["prompt2"]]):
            rows = [
                {"identity_id": f"id{number}", "sample_id": f"id{number}/{name}", "prompt_id": name, "prompt": "p"}
                for name in names
            ]
            (tmp_path / "samples").mkdir(exist_ok=True)
            table = pa.Table.from_pylist(rows, schema=tables.stored_schema("samples"))
            pq.write_table(table, tmp_path / f"samples/part-00000{number}.parquet")
            if not number:
                require_own_numbers(tmp_path)
        with pytest.raises(DatasetError, match=r"id0/2 and id1/prompt2 would both be scored on 2\.mp4"):
            require_own_numbers(tmp_path)

    def test_other_files_are_the_set_readers(self, tmp_path):
        (tmp_path / "p.json").write_text('{"a": {"1": "x"}}')
        assert asked("r", str(tmp_path / "p.json"), tmp_path)["format"] == "tpige_json"
        assert asked("r", str(tmp_path / "p.csv"), tmp_path)["format"] == "images"

    @pytest.mark.parametrize("content", ["[1]", '[{"img": "a.png"}]', "{"])
    def test_bad_lists(self, tmp_path, content):
        (tmp_path / "eval.json").write_text(content)
        with pytest.raises(DatasetError):
            asked("r", str(tmp_path / "eval.json"), tmp_path)

    def test_a_folder_without_prompts(self, tmp_path):
        with pytest.raises(DatasetError, match=r"holds no <id>_<k>.txt"):
            asked("r", str(tmp_path), tmp_path)
