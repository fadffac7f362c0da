"""Runs in S3: paths, the lease, the fence, and the whole engine on them; moto's server stands in for the store."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from engine_checks import check_complete
from engine_driver import freeze_fake, request
from engine_inprocess import Crash, drive
from s3_server import s3_server

from ipvg_ray import tables
from ipvg_ray.pipeline import run as engine
from ipvg_ray.pipeline.compact import compact
from ipvg_ray.pipeline.lease import RunLockedError, holder, lock
from ipvg_ray.pipeline.status import status
from ipvg_ray.pipeline.store import Store, new_session
from ipvg_ray.storage import S3Path, StorageError, copy_file, folders, remove_folder, run_path


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as environment, s3_server(environment) as endpoint:
        yield endpoint


@pytest.fixture
def root(server: str) -> S3Path:
    return S3Path("runs", f"some folder/{uuid.uuid4().hex}")


def test_uris() -> None:
    assert run_path("s3://b/some/run/") == S3Path("b", "some/run")
    assert str(S3Path("b", "x") / "y/z") == "s3://b/x/y/z"
    assert run_path("run") == Path("run")
    assert run_path("file:///data/run") == Path("/data/run")
    assert run_path("s3://b/run#1?x%20y") == S3Path("b", "run#1?x%20y"), "keys are taken as they are written"
    with pytest.raises(StorageError, match="local folders or s3://bucket/prefix"):
        run_path("gs://b/x")
    with pytest.raises(StorageError, match="carries credentials"):
        run_path("s3://me:secret@b/x")


def test_paths_behave_as_pathlib_does(root: S3Path, tmp_path: Path) -> None:
    assert not root.exists()
    (root / "a/one.txt").write_text("é")
    (root / "a/two.txt").write_bytes(b"12")
    (root / "a/deep/three.txt").touch()
    assert (root / "a/one.txt").read_text() == "é"
    assert sorted(p.name for p in (root / "a").glob("*.txt")) == ["one.txt", "two.txt"]
    assert sorted(p.relative_to(root) for p in root.rglob("*")) == ["a/deep/three.txt", "a/one.txt", "a/two.txt"]
    assert folders(root) == ["a"]
    assert folders(root / "a") == ["deep"]
    assert (root / "a").is_dir()
    assert not (root / "a").is_file()
    assert not (root / "a/on").exists(), "a prefix is a folder only at a slash"
    assert next((root / "a").glob("two*")).stat().st_size == (root / "a/two.txt").stat().st_size == 2
    assert abs((root / "a/two.txt").stat().st_mtime - time.time()) < 60
    (root / "a/two.txt").rename(root / "b/moved.txt")
    assert not (root / "a/two.txt").exists()
    copy_file(root / "b/moved.txt", tmp_path / "new/file")
    assert (tmp_path / "new/file").read_bytes() == b"12"
    copy_file(tmp_path / "new/file", root / "up")
    assert (root / "up").read_bytes() == b"12"
    remove_folder(root)
    assert not root.exists()
    with pytest.raises(FileNotFoundError):
        (root / "up").read_bytes()
    with pytest.raises(FileNotFoundError):
        (root / "up").stat()
    (root / "up").unlink()
    with pytest.raises(StorageError, match="s3://no-such-bucket/x"):
        S3Path("no-such-bucket", "x").write_bytes(b"")


def test_listings_of_many_pages(root: S3Path) -> None:
    for i in range(1003):
        (root / f"part-{i:04d}").touch()
    assert len(list(root.glob("part-*"))) == 1003


def test_a_conditional_write_has_one_winner(root: S3Path) -> None:
    wins = []
    threads = [threading.Thread(target=lambda i=i: wins.append((root / "x").put_if(b"%d" % i, None))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (tag,) = [win for win in wins if win]
    assert (root / "x").put_if(b"new", '"other"') is None
    assert (root / "gone").put_if(b"new", '"other"') is None
    assert (root / "x").put_if(b"new", tag) not in (None, tag)
    data, _, age = (root / "x").read_tagged() or (b"", "", -1.0)
    assert data == b"new"
    assert 0 <= age < 30


def test_a_lease_is_renewed_and_keeps_others_out(root: S3Path) -> None:
    held = lock(root, ttl=4.0)
    assert str(os.getpid()) in str(holder(root))
    with pytest.raises(RunLockedError, match=f"in use by process {os.getpid()}"):
        lock(root, ttl=4.0)
    held.close()
    assert holder(root) is None
    lock(root, ttl=4.0).close()


def test_a_lease_of_a_dead_process_is_taken_over_at_once(root: S3Path) -> None:
    program = "import os, sys\nfrom ipvg_ray.pipeline.lease import lock\nfrom ipvg_ray.storage import run_path\n"
    program += "lock(run_path(sys.argv[1]))\nos._exit(1)"
    subprocess.run([sys.executable, "-c", program, str(root)], check=False)
    assert (root / "_engine/lock").is_file()
    assert holder(root) is None
    started = time.monotonic()
    lock(root).close()
    assert time.monotonic() - started < 10


def test_a_lease_of_a_dead_machine_expires_and_its_holder_notices(root: S3Path) -> None:
    lost = threading.Event()
    cut_off = lock(root, lost.set, ttl=2.0)
    cut_off.closing.set()  # type: ignore[attr-defined] # its machine hangs: nobody renews
    cut_off.thread.join()  # type: ignore[attr-defined]
    place = root / "_engine/lock"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"machine": "another", "who": "it"}))
    started = time.monotonic()
    taken = lock(root, ttl=2.0)
    assert time.monotonic() - started > 1.0, "it was not expired yet"
    cut_off.closing.clear()  # type: ignore[attr-defined] # and comes back
    cut_off._renew()  # type: ignore[attr-defined]
    assert lost.is_set()
    cut_off.close()
    assert str(os.getpid()) in str(holder(root)), "letting go of a lost lease leaves the new one alone"
    taken.close()


def test_a_session_that_was_fenced_off_cannot_publish(root: S3Path) -> None:
    old = Store(root, new_session())
    old.begin()
    place = old.publish_table("first", "a", pa.table({"x": [1]}))
    Store(root, new_session()).begin()
    with pytest.raises(FileNotFoundError, match="another start of the run has begun"):
        old.publish_table("first", "b", pa.table({"x": [2]}))
    with pytest.raises(FileNotFoundError):
        old.publish("videos", "id", "p", ".mp4", b"late")
    assert tables.parts(root, "first") == [place]
    assert not (root / "videos").exists()


@pytest.mark.parametrize("seed", range(6))
def test_killed_starts_end_complete(root: S3Path, seed: int) -> None:
    luck = random.Random(seed)
    run_dir = root / uuid.uuid4().hex
    bad = {"first:id00002": "raise"}
    for _ in range(3):
        try:
            drive(request(run_dir, bad=bad), luck)
            break
        except Crash:
            if luck.random() < 0.5:
                compact(run_dir)
    drive(request(run_dir, bad=bad))
    check_complete(run_dir, {"first": {"id00002"}})
    assert compact(run_dir)["third"][1] == 1
    check_complete(run_dir, {"first": {"id00002"}})
    assert status(run_dir, request(run_dir).stages).stages["third"].counts.waiting == 0


def test_forks(root: S3Path) -> None:
    drive(request(root / "old"))
    asked = request(root / "new", add=5)
    assert engine.fork(root / "old", asked) == ["first", "second"]
    drive(asked)
    check_complete(root / "new")
    with pytest.raises(engine.ChangedError, match="is not empty"):
        engine.fork(root / "old", asked)


@pytest.mark.slow
def test_a_run_on_ray_with_deaths_failures_and_a_resume(root: S3Path) -> None:
    bad = {"second:id00000/prompt1": "exit", "third:id00002/prompt0": "row-error"}
    result = engine.run(request(root, batch=2, bad=bad), freeze_fake(4, 2))
    assert (result.outcome, result.failed, result.waiting) == ("complete", 2, 0)
    check_complete(root, {"second": {"id00000/prompt1"}, "third": {"id00002/prompt0"}})
    died = next(f for f in tables.read_table(root, "failures").to_pylist() if f["kind"] == "worker_died")
    assert "exit code 1" in died["message"]
    result = engine.run(request(root, retry_failures=True), freeze_fake(0, 0))
    assert (result.outcome, result.failed, result.waiting) == ("complete", 0, 0)
    check_complete(root)
    left = {path.name for path in (root / "_engine").rglob("*") if "/retried/" not in str(path)}
    assert left == {"log.jsonl"}
