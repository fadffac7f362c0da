"""Opening, changing and forking run directories, without Ray."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from engine_checks import check_complete
from engine_driver import Third, freeze_fake, request
from engine_inprocess import drive

from ipvg_ray import tables
from ipvg_ray.pipeline import run as engine
from ipvg_ray.pipeline.fingerprint import model_digest
from ipvg_ray.pipeline.lease import lock
from ipvg_ray.pipeline.plan import PlanError
from ipvg_ray.pipeline.replay import ReplayError, replay
from ipvg_ray.pipeline.rundir import ForeignFilesError
from ipvg_ray.pipeline.stage import RowError
from ipvg_ray.pipeline.status import status
from ipvg_ray.pipeline.store import new_session


def until(asked: engine.Request, last: int) -> engine.Request:
    return engine.Request(asked.run_dir, asked.config, asked.seed, asked.stages[:last], asked.redo_from)


def files(run_dir: Path) -> set[Path]:
    return {p for p in run_dir.rglob("*") if p.is_file() and "_engine" not in p.parts and p.name != "run.json"}


def test_a_refused_redo_removes_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    drive(request(run_dir))
    before = files(run_dir)
    with pytest.raises(engine.ChangedError, match="--redo-from first"):
        drive(request(run_dir, seed=2, redo_from="third"))
    with pytest.raises(PlanError, match="there is no such stage"):
        drive(request(run_dir, redo_from="thrid"))
    assert files(run_dir) == before


def test_redo_removes_results_and_media_of_stages_not_asked_for(tmp_path: Path) -> None:
    asked = request(tmp_path / "run")
    drive(asked)
    drive(until(request(asked.run_dir, redo_from="second"), 2))
    assert not (asked.run_dir / "files").exists()
    assert not tables.parts(asked.run_dir, "third")
    drive(asked)
    check_complete(asked.run_dir)


@pytest.mark.parametrize("name", ["identities", "samples", "failures", "second", "files"])
def test_folders_of_others_are_never_taken_over(tmp_path: Path, name: str) -> None:
    mine = tmp_path / name / "id001" / "image.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(ForeignFilesError, match="name a new or empty directory"):
        drive(request(tmp_path))
    assert mine.read_bytes() == b"mine"


def test_a_plan_binds_nobody(tmp_path: Path) -> None:
    with engine.opened(request(tmp_path / "run"), freeze_fake(2, 1)):
        pass
    drive(request(tmp_path / "run", add=5))
    check_complete(tmp_path / "run")


def test_a_shorter_start_keeps_the_configuration_of_what_it_does_not_reach(tmp_path: Path) -> None:
    asked = request(tmp_path / "run")
    full = {"dataset": asked.config["dataset"], "third": {"add": 1}}
    drive(engine.Request(asked.run_dir, full, 1, asked.stages))
    drive(until(engine.Request(asked.run_dir, full | {"third": {"add": 9}}, 1, asked.stages), 2))
    assert tables.read_run(asked.run_dir)["config"]["third"] == {"add": 1}


def test_a_run_of_a_version_with_fewer_fields_goes_on(tmp_path: Path) -> None:
    asked = request(tmp_path / "run")
    drive(asked)
    newer = {"dataset": asked.config["dataset"] | {"max_references": 16}}
    drive(engine.Request(asked.run_dir, newer, 1, asked.stages))
    other = {"dataset": asked.config["dataset"] | {"max_references": 4}}
    with pytest.raises(engine.ChangedError, match=r"dataset.max_references: 16 → 4"):
        drive(engine.Request(asked.run_dir, other, 1, asked.stages))


def test_a_stage_that_a_newer_version_computes_otherwise_is_refused_by_that_name(tmp_path: Path, monkeypatch) -> None:
    asked = request(tmp_path / "run")
    drive(asked)
    monkeypatch.setattr(Third, "version", 2)
    with pytest.raises(engine.ChangedError, match=r"third.version: 1 → 2 \(this version of(.|\n)*--redo-from third"):
        drive(asked)


def test_a_fork_of_another_identity_set_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    drive(request(tmp_path / "old"))
    asked = request(tmp_path / "new")
    other = engine.Request(asked.run_dir, {"dataset": {"path": "other", "strict": False}}, 1, asked.stages)
    with pytest.raises(engine.ChangedError, match=r"dataset.path: 'fake' → 'other'(.|\n)*another --out"):
        engine.fork(tmp_path / "old", other)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old"]


def test_a_fork_has_the_new_configuration_from_its_first_moment(tmp_path: Path) -> None:
    drive(request(tmp_path / "old"))
    asked = request(tmp_path / "new", add=5)
    new = engine.Request(asked.run_dir, asked.config | {"third": {"add": 5}}, asked.seed, asked.stages)
    assert engine.fork(tmp_path / "old", new) == ["first", "second"]
    assert tables.read_run(tmp_path / "new")["config"]["third"] == {"add": 5}
    drive(new)
    check_complete(tmp_path / "new")
    assert {row["answer"][-1] for row in tables.read_table(tmp_path / "new", Third.table()).to_pylist()} == {"5"}


def test_status_of_runs_that_were_not_started_or_were_killed(tmp_path: Path) -> None:
    asked = request(tmp_path / "run")
    drive(asked)
    kept = tables.read_run(asked.run_dir)
    (asked.run_dir / "run.json").write_text(json.dumps(kept | {"sessions": [{"outcome": "running"}]}))
    assert status(asked.run_dir, asked.stages).outcome == "killed"
    (asked.run_dir / "run.json").write_text(json.dumps(kept | {"stages": {}}))
    assert status(asked.run_dir, asked.stages).outcome == "not started"


def test_leftovers_of_killed_starts_are_cleared_away(tmp_path: Path) -> None:
    asked = request(tmp_path / "run")
    drive(asked)
    for name in ("removed-1", "frozen-1", "20200101T000000-abc/traces", "20200101T000000-abc/tickets"):
        (asked.run_dir / "_engine" / name).mkdir(parents=True)
        (asked.run_dir / "_engine" / name / "x").write_bytes(b"x")
    drive(asked)
    assert not list((asked.run_dir / "_engine").rglob("x"))


def test_fingerprints_of_large_models_see_the_middle(tmp_path: Path) -> None:
    model = tmp_path / "model.bin"
    data = bytearray(9 << 20)
    model.write_bytes(data)
    before = model_digest(model)
    middle = (len(data) - (256 << 10)) * 8 // 15 + 5
    data[middle] = 1
    model.write_bytes(data)
    assert model_digest(model) != before


def test_two_starts_of_one_second_sort_by_time() -> None:
    names = [new_session() for _ in range(50)]
    assert names == sorted(names)
    assert len(set(names)) == 50


def test_the_lock_names_its_holder(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(Exception, match=f"process {os.getpid()}"):
        drive(request(tmp_path))


def test_replay_gives_what_the_run_gave_and_changes_nothing(tmp_path: Path) -> None:
    asked = request(tmp_path / "run", bad={"third:id00001/prompt1": "row-error", "first:id00002": "raise"})
    drive(asked)
    before = {p: p.stat().st_mtime_ns for p in asked.run_dir.rglob("*")}
    for last, key in ((3, "id00000/prompt1"), (1, "id00004")):
        stage = asked.stages[last - 1]
        kept = {row[stage.table().key[0]]: row for row in tables.read_table(asked.run_dir, stage.table()).to_pylist()}
        result = replay(until(asked, last), key, tmp_path / "media", "cpu")
        assert isinstance(result, dict)
        for name, value in result.items():
            assert name == "uri" or kept[key][name] == value
    assert isinstance(replay(asked, "id00001/prompt1", tmp_path / "media", "cpu"), RowError)
    with pytest.raises(ReplayError, match="has no sample 'nobody'"):
        replay(asked, "nobody", tmp_path, "cpu")
    with pytest.raises(ReplayError, match="first has not finished it"):
        replay(asked, "id00002/prompt0", tmp_path, "cpu")
    assert {p: p.stat().st_mtime_ns for p in asked.run_dir.rglob("*")} == before
