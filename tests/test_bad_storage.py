"""Runs in S3 where the store is busy, breaks off, answers late, or the credentials expire on the way."""

from __future__ import annotations

import json
import os
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from engine_checks import check_complete
from engine_driver import freeze_fake, request
from engine_inprocess import drive
from fault_proxy import Faults, fault_proxy
from s3_server import clear, s3_server

from ipvg_ray import s3_client, storage, tables
from ipvg_ray.pipeline import run as engine
from ipvg_ray.pipeline.lease import lock
from ipvg_ray.storage import S3Path, StorageError, parquet

BAD = {"busy": 0.1, "cut": 0.05, "closed": 0.05, "slow": 0.01}


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """A store behind a proxy without faults yet; a stalled answer is given up after a second."""
    with s3_server(monkeypatch) as endpoint:
        faults = Faults(stall_s=2.0)
        with fault_proxy(endpoint, faults) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
            monkeypatch.setattr(s3_client, "TIMEOUTS", {False: (2, 1), True: (2, 1)})
            clear()
            yield faults


@pytest.fixture
def root() -> S3Path:
    return S3Path("runs", uuid.uuid4().hex)


def spoil(faults: Faults, **chances: float) -> None:
    for name, chance in chances.items():
        setattr(faults, name, chance)


def test_every_operation_rides_out_a_bad_store(faults: Faults, root: S3Path) -> None:
    spoil(faults, busy=0.15, cut=0.15, closed=0.1, slow=0.02)
    for i in range(12):
        (root / f"a/{i}").write_bytes(b"%d" % i * 5000)
    assert sorted(p.name for p in (root / "a").glob("*")) == sorted(map(str, range(12)))
    for i in range(12):
        assert (root / f"a/{i}").read_bytes() == b"%d" % i * 5000
        (root / f"a/{i}").rename(root / f"b/{i}")
    assert len(list((root / "b").glob("*"))) == 12
    storage.remove_folder(root / "b")
    assert not (root / "b").exists()
    assert min(faults.counts[name] for name in ("busy", "cut", "closed")) >= 3


def test_large_objects_go_in_parts_and_come_in_ranges_and_are_whole(
    faults: Faults, root: S3Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "PIECE", 5 << 20)
    source, target = tmp_path / "source", tmp_path / "deep/target"
    source.write_bytes(os.urandom(23 << 20))
    spoil(faults, busy=0.1, cut=0.1, closed=0.05)
    (root / "large").upload(source)
    assert (root / "large")._head()["ETag"].endswith('-5"'), "five parts"
    before = faults.counts["all"]
    (root / "large").download(target)
    assert faults.counts["all"] - before >= 5, "ranges"
    assert target.read_bytes() == source.read_bytes()
    with pytest.raises(FileNotFoundError):
        (root / "none").download(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_tables_are_read_through_broken_answers(faults: Faults, root: S3Path, tmp_path: Path) -> None:
    table = pa.table({"x": list(range(100_000))})
    pq.write_table(table, tmp_path / "t.parquet")
    (root / "t.parquet").upload(tmp_path / "t.parquet")
    spoil(faults, busy=0.1, cut=0.1, closed=0.1)
    for _ in range(10):
        with parquet(root / "t.parquet") as file:
            assert file.read().equals(table)
    assert faults.counts["cut"] + faults.counts["closed"] >= 2


def test_a_store_that_never_answers_is_named(faults: Faults, root: S3Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_client, "ATTEMPTS", 2)
    monkeypatch.setattr(storage, "_PAUSES", (0.1,))
    clear()
    spoil(faults, busy=1.0)
    with pytest.raises(StorageError, match=rf"{root}/x.*SlowDown"):
        (root / "x").write_bytes(b"1")


def credentials(file: Path, key: str) -> None:
    file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\naws_session_token = t\n")


def test_credentials_that_expire_are_looked_for_anew(
    faults: Faults, root: S3Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setattr(storage, "_PAUSES", (0.1,))
    credentials(file, "OLD")
    clear()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "t.parquet")
    (root / "t.parquet").upload(tmp_path / "t.parquet")
    held = lock(root, ttl=2.0)
    assert parquet(root / "t.parquet").metadata.num_rows == 1
    faults.expired.add("OLD")
    with pytest.raises(StorageError, match="ExpiredToken"):
        (root / "x").write_bytes(b"1")
    credentials(file, "NEW")
    (root / "x").write_bytes(b"2")
    assert (root / "x").read_bytes() == b"2"
    assert parquet(root / "t.parquet").metadata.num_rows == 1
    held.close()
    assert not (root / "_engine/lock").exists(), "the lease was renewed and given back with the new ones"


def test_a_link_reads_one_object_without_credentials(faults: Faults, root: S3Path) -> None:
    (root / "videos/a b.mp4").write_bytes(b"film")
    link = (root / "videos/a b.mp4").link(600)
    assert "X-Amz-Expires=600" in link
    assert urllib.request.urlopen(link, timeout=10).read() == b"film"


def test_a_run_ends_complete_on_a_bad_store(faults: Faults, root: S3Path) -> None:
    spoil(faults, **BAD)
    drive(request(root))
    spoil(faults, **dict.fromkeys(BAD, 0.0))
    check_complete(root)
    assert faults.counts["busy"] + faults.counts["cut"] + faults.counts["closed"] > 10


@pytest.mark.slow
def test_a_run_on_ray_ends_complete_on_a_bad_store(faults: Faults, root: S3Path) -> None:
    spoil(faults, **BAD)
    result = engine.run(request(root, batch=2), freeze_fake(6, 3))
    spoil(faults, **dict.fromkeys(BAD, 0.0))
    assert (result.outcome, result.failed, result.waiting) == ("complete", 0, 0)
    check_complete(root)
    assert json.loads((root / "run.json").read_text())["sessions"][-1]["outcome"] == "complete"
    assert tables.parts(root, "third")
    assert faults.counts["busy"] > 10


def test_the_report_links_to_videos_with_links_that_open_where_asked(faults: Faults, root: S3Path) -> None:
    from ipvg_ray.report.embed import Budget, clip

    (root / "videos/a/b.mp4").write_bytes(b"film")
    plain = clip(root, "videos/a/b.mp4", Budget(0))
    assert plain.src == plain.link == "./videos/a/b.mp4"
    signed = clip(root, "videos/a/b.mp4", Budget(0, 60))
    assert signed.src == signed.link
    assert urllib.request.urlopen(str(signed.link), timeout=10).read() == b"film"
    assert clip(root, "../other/b.mp4", Budget(0, 60)).link is None, "nothing outside of the run is signed"
