"""The scratch store beside a run: kept over sessions, closed to those that were cut off, apart by fingerprint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_driver import freeze_fake, request
from engine_inprocess import drive, make_worker

from ipvg_ray import tables
from ipvg_ray.pipeline import compact as compacting
from ipvg_ray.pipeline import run as engine
from ipvg_ray.pipeline.compact import compact
from ipvg_ray.pipeline.lease import Held
from ipvg_ray.pipeline.scratch import RunScratch, owner_of, tidy
from ipvg_ray.pipeline.store import FencedError, Store, new_session


def session(run: Path) -> Store:
    store = Store(run, new_session())
    store.begin()
    return store


def test_it_outlives_its_session(tmp_path: Path) -> None:
    first = session(tmp_path)
    scratch = RunScratch(first, "video-a")
    assert scratch.read("row/1") is None
    scratch.write("row/1", b"one")
    scratch.write("row/1", b"two")
    first.end()
    later = RunScratch(session(tmp_path), "video-a")
    assert later.read("row/1") == b"two"
    assert RunScratch(later.store, "video-b").read("row/1") is None
    later.remove("row/1")
    later.remove("row/1")
    assert later.read("row/1") is None


def test_a_session_that_was_cut_off_writes_nothing(tmp_path: Path) -> None:
    old = RunScratch(session(tmp_path), "video-a")
    new = RunScratch(session(tmp_path), "video-a")
    with pytest.raises(FencedError):
        old.write("row", b"late")
    assert new.read("row") is None


def test_names_stay_inside(tmp_path: Path) -> None:
    scratch = RunScratch(session(tmp_path), "video-a")
    scratch.write("../../../escape", b"x")
    assert scratch.read("../../../escape") == b"x"
    (file,) = (p for p in tmp_path.rglob("*") if p.is_file())
    assert file.parent == tmp_path / "_engine" / "scratch" / "video-a"


def test_a_worker_gives_its_stage_the_scratch_of_its_fingerprint(tmp_path: Path) -> None:
    def owners(add: int) -> dict[str, str]:
        asked = request(tmp_path / f"run{add}", add=add)
        with engine.opened(asked, freeze_fake(2, 1)) as this:
            made = {stage.name: make_worker(this, asked, stage.name).stage for stage in asked.stages}
            return {name: stage.context.scratch.owner for name, stage in made.items()}  # type: ignore[attr-defined]

    one, other = owners(1), owners(2)
    assert one["first"] == other["first"]
    assert one["third"] != other["third"], "it is configured otherwise"
    assert len(set(one.values())) == 3
    assert one["third"].startswith("third-")


def test_work_that_nobody_goes_on_from_is_removed(tmp_path: Path) -> None:
    store = session(tmp_path)
    for owner in ("done-1", "open-1", "open-0", "set-aside-1", "other-1"):
        RunScratch(store, owner).write("row", b"state")
    tidy(store, {"done": "1", "open": "1", "set-aside": "1"}, {"done"})
    left = {p.name for p in (tmp_path / "_engine/scratch").iterdir()}
    assert left == {"open-1", "set-aside-1", "other-1"}, "not of a stage that this start does not run"


def test_a_run_keeps_the_work_of_rows_set_aside_until_it_is_compacted(tmp_path: Path) -> None:
    asked = request(tmp_path / "run", bad={"third:id00000/prompt0": "row-error"})
    this = drive(asked, identities=2, prompts=1)
    this.store.begin()
    kept = [RunScratch(this.store, owner_of(name, made.digest)) for name, made in this.prints.items()]
    for scratch in kept:
        scratch.write("row", b"state")
    this.tidy(this.survey().counts)
    assert [scratch.read("row") for scratch in kept] == [None, None, b"state"], "--retry-failures goes on from it"
    this.store.end()
    compact(tmp_path / "run")
    assert kept[2].read("row") == b"state", "of a run that was not at its end"
    run = tables.read_run(tmp_path / "run")
    (tmp_path / "run/run.json").write_text(json.dumps(run | {"sessions": [{"outcome": "complete"}]}))
    compact(tmp_path / "run")
    assert kept[2].read("row") is None


def test_the_work_of_a_start_that_took_the_run_over_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = drive(request(tmp_path / "run"), identities=1, prompts=1)
    run = tables.read_run(tmp_path / "run")
    (tmp_path / "run/run.json").write_text(json.dumps(run | {"sessions": [{"outcome": "complete"}]}))
    scratch = RunScratch(this.store, "third-1")
    scratch._place("row").parent.mkdir(parents=True)
    scratch._place("row").write_bytes(b"state")
    held = compacting.lock

    def lost(run_dir: Path, on_lost: Callable[[], None]) -> Held:
        on_lost()
        return held(run_dir)

    monkeypatch.setattr(compacting, "lock", lost)
    compact(tmp_path / "run")
    assert scratch.read("row") == b"state"
