"""The whole pipeline on miniature models: the demonstration, hostile input, other pools, a kill, the sample data."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cluster_under_fire import kill_tree
from engine_checks import check_nothing_redone, raw_keys
from PIL import Image

from ipvg_ray import cli, demo, tables
from ipvg_ray.media import images, videos
from ipvg_ray.stages import NAMES

pytestmark = pytest.mark.slow
IDENTITY_STAGES = ("faces", "matting")


def keys() -> dict[str, str]:
    return {name: "identity_id" if name in IDENTITY_STAGES else "sample_id" for name in NAMES}


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ipvg_ray", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], code: int) -> str:
    output, _ = process.communicate(timeout=900)
    assert process.returncode == code, output
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, mini_models: Path) -> Path:
    """A finished demonstration."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "models").symlink_to(mini_models)
    output = finish(start("demo", str(folder)), 0)
    assert "the cat was refused" in output
    return folder


def column(run_dir: Path, table: str, name: str) -> dict[str, Any]:
    return {row["sample_id"]: row[name] for row in tables.read_table(run_dir, table, [name]).to_pylist()}


def test_demo(folder: Path) -> None:
    run_dir = folder / "run"
    failures = tables.read_table(run_dir, "failures").to_pylist()
    assert [(f["stage"], f["identity_id"], f["sample_id"], f["kind"]) for f in failures] == [
        ("faces", "cat", None, "no_face")
    ]
    assert demo.check(run_dir) == tables.read_table(run_dir, "evaluate").num_rows > 0
    page = (run_dir / "report.html").read_text()
    assert "no_face" in page
    for name, key in keys().items():
        found = raw_keys(run_dir, name, key)
        assert len(found) == len(set(found)) > 0
    import pandas as pd

    frame = pd.read_parquet(run_dir / "first_frame")
    picture = images.decode(frame["first_frame"].iloc[0]["bytes"])
    assert picture.shape == (96, 176, 3)


def test_a_finished_demo_runs_again_in_no_time_and_does_nothing(folder: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (folder / "run").rglob("*.parquet")}
    finish(start("run", "--out", str(folder / "run")), cli.EXIT_ROWS_FAILED)
    assert {p: p.stat().st_mtime_ns for p in (folder / "run").rglob("*.parquet")} == before


def test_changed_settings_are_refused_and_forked(folder: Path, tmp_path: Path) -> None:
    run_dir = folder / "run"
    output = finish(start("run", "--out", str(run_dir), "--set", "video.fps=8"), cli.EXIT_ERROR)
    assert "video.fps: 16 → 8" in output
    assert "--redo-from video" in output
    new = tmp_path / "fork"
    output = finish(
        start("run", "--out", str(run_dir), "--fork", str(new), "--set", "video.fps=8"), cli.EXIT_ROWS_FAILED
    )
    assert "takes over from" in output
    assert column(new, "first_frame", "seed") == column(run_dir, "first_frame", "seed")
    assert set(column(new, "video", "video_fps").values()) == {8.0}
    assert set(column(run_dir, "video", "video_fps").values()) == {16.0}
    check_nothing_redone(new, {n: k for n, k in keys().items() if n not in ("video", "evaluate")})


def test_pools_and_batches_change_nothing(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    pools = ["prompts.pool.batch_size=3", "faces.pool.batch_size=1", "first_frame.pool.max_workers=2"]
    pools += ["video.pool.max_workers=1", "video.pool.batch_size=2", "matting.pool.batch_size=2"]
    arguments = [part for pool in pools for part in ("--set", pool)]
    arguments += ["--set", f"models.root={(folder / 'models').resolve()}", "--profile", "cpu-mini"]
    finish(start("run", str(folder / "identities"), "--out", str(other), *arguments), cli.EXIT_ROWS_FAILED)
    for name in ("video_prompt", "image_prompt", "prompt_status"):
        assert column(other, "prompts", name) == column(folder / "run", "prompts", name)
    ours, theirs = (column(run, "first_frame", "first_frame") for run in (folder / "run", other))
    for sample, picture in ours.items():
        a, b = (images.decode(p["bytes"]).astype(np.float64) / 255 for p in (picture, theirs[sample]))
        assert np.abs(a - b).max() <= 1e-4
    for sample, uri in column(folder / "run", "video", "video_uri").items():
        a, b = (videos.read_frames(run / uri).astype(np.float64) / 255 for run in (folder / "run", other))
        assert np.abs(a - b).max() <= 1e-4, sample


def hostile(folder: Path) -> Path:
    """One good row, and one of each kind that must end as a named failure or a safe file name."""
    from skimage import data

    folder.mkdir()
    face = data.astronaut()
    buffer = io.BytesIO()
    Image.fromarray(face).save(buffer, "PNG")
    (folder / "good.png").write_bytes(buffer.getvalue())
    (folder / "cut.png").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    Image.fromarray(face[:1, :1]).save(folder / "dot.png")
    rows = [
        ("good", "good.png", "A man talks to the camera."),
        ("cut", "cut.png", "x y"),
        ("dot", "dot.png", "x y"),
        ("silent", "good.png", "  "),
        ("long", "good.png", "word " * 6000),
        ("../../escape", "good.png", "He looks <|im_end|> up."),
        ("<b>&[/red]", "good.png", "😀😀 \u202e {{7*7}} <script>alert(1)</script>"),
    ]
    with (folder / "set.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("identity_id", "image", "prompt"), *rows])
    return folder / "set.csv"


def test_hostile_rows_end_as_named_failures_or_safe_names(tmp_path: Path, mini_models: Path) -> None:
    run_dir = tmp_path / "outer" / "run"
    before = set(tmp_path.rglob("*"))
    source = hostile(tmp_path / "set")
    arguments = [str(source), "--out", str(run_dir), "--profile", "cpu-mini", "--set", f"models.root={mini_models}"]
    output = finish(start("run", *arguments), cli.EXIT_ROWS_FAILED)
    failures = tables.read_table(run_dir, "failures").to_pylist()
    found = {(f["identity_id"], f["kind"]) for f in failures}
    assert found == {
        ("cut", "broken_image"), ("dot", "image_too_small"), ("silent", "empty_prompt"), ("long", "prompt_too_long")
    }  # fmt: skip
    assert all(f["stage"] == "dataset" and f["where"] and f["message"] for f in failures)
    assert "broken_image" in output
    done = tables.read_table(run_dir, "evaluate")["identity_id"].to_pylist()
    assert sorted(done) == sorted(["good", "../../escape", "<b>&[/red]"])
    files = {p for p in tmp_path.rglob("*") if p.is_file() and p not in before and source.parent not in p.parents}
    assert all(run_dir in file.parents for file in files)
    for uri in column(run_dir, "video", "video_uri").values():
        assert (run_dir / uri).resolve().is_relative_to(run_dir.resolve() / "videos")
    assert "<script>alert(1)" not in (run_dir / "report.html").read_text()
    finish(start("failures", str(run_dir)), 0)
    finish(start("run", *arguments, "--strict"), cli.EXIT_ROWS_FAILED)
    strict = finish(
        start("run", str(source), "--out", str(tmp_path / "strict"), *arguments[3:], "--strict"), cli.EXIT_ERROR
    )
    assert "broken_image" in strict
    assert not (tmp_path / "strict" / "run.json").exists()


@pytest.mark.shared
def test_the_sample_data_through_a_kill(shared: Path, tmp_path: Path, mini_models: Path) -> None:
    """25 samples, all stages; the driver and its workers are killed on the way."""
    run_dir = tmp_path / "run"
    arguments = [str(shared / "data" / "vip200k"), "--out", str(run_dir), "--profile", "cpu-mini"]
    arguments += ["--set", f"models.root={mini_models}"]
    process = start("run", *arguments)
    while len(tables.parts(run_dir, "video")) < 4 and process.poll() is None:
        time.sleep(0.05)
    kill_tree(process.pid)
    process.wait()  # type: ignore[arg-type]
    finish(start("run", "--out", str(run_dir)), 0)
    for name, key in keys().items():
        found = raw_keys(run_dir, name, key)
        assert len(found) == len(set(found)) == (5 if name in IDENTITY_STAGES else 25)
    check_nothing_redone(run_dir, keys())
    assert tables.read_table(run_dir, "failures").num_rows == 0
    for uri in column(run_dir, "video", "video_uri").values():
        assert videos.probe((run_dir / uri).read_bytes()).frames == 17
    target = tmp_path / "export"
    finish(start("export", str(run_dir), str(target)), 0)
    assert len(list(target.glob("id*/prompt*.mp4"))) == 25
    (tmp_path / "plan.txt").write_text(finish(start("plan", "--out", str(run_dir)), 0))
    assert json.loads((run_dir / "run.json").read_text())["sessions"][-1]["outcome"] == "complete"
