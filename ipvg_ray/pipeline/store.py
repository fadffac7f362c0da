"""A run directory on disk: part files that appear whole or not at all, and a fence against workers of dead sessions.

    <run>/run.json                      configuration, fingerprints, sessions
    <run>/identities/ samples/          the frozen identity set
    <run>/<stage>/part-*.parquet        one file per finished batch
    <run>/failures/part-*.parquet       rows that could not be finished
    <run>/videos/<identity>/<prompt>.mp4
    <run>/_engine/lock                  held by the process that runs
    <run>/_engine/<session>/            one folder per start: tmp, tries, journal, tickets

Every file is first written into its session's `tmp` folder and then renamed to its place. A new session removes the
`tmp` folders of all earlier ones before it looks at what is finished: from then on no rename of a worker that outlived
its driver can succeed, so nothing can be added behind the new session's back.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ipvg_ray import tables
from ipvg_ray.errors import UserError
from ipvg_ray.media.names import safe_name

ENGINE = "_engine"
FINGERPRINT = b"ipvg_ray.fingerprint"
MERGED = "merged"
"""In the names of parts that stand for several; their metadata lists them under `MERGED_FROM`."""
MERGED_FROM = b"ipvg_ray.merged_from"


class RunLockedError(UserError):
    """Another process is running in this directory."""


def new_session() -> str:
    """A name for one start of a run: sorts by time, never repeats."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{uuid.uuid4().hex[:6]}"


def batch_digest(keys: Sequence[str]) -> str:
    """Name of a batch: the same rows give the same name, so a repeated batch replaces itself."""
    return hashlib.blake2b("\n".join(keys).encode(), digest_size=10).hexdigest()


def row_seed(run_seed: int, key: str, stage: str) -> int:
    """A row's own seed in [0, 2^63), independent of order, batch, pool and resume."""
    digest = hashlib.blake2b(f"{run_seed}\0{stage}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Store:
    """One session's hand on a run directory. Plain paths, so that it travels to workers; see the module's docstring."""

    run_dir: Path
    session: str

    @property
    def engine_dir(self) -> Path:
        return self.run_dir / ENGINE

    @property
    def session_dir(self) -> Path:
        return self.engine_dir / self.session

    @property
    def tickets_dir(self) -> Path:
        return self.session_dir / "tickets"

    # -- sessions ------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Fence earlier sessions off and open this one's folders. Call with the lock held."""
        for old in self.engine_dir.glob("*/tmp"):
            old.rename(old.with_name(f"fenced-{uuid.uuid4().hex}"))  # one step: no file can slip in while it is removed
        for pattern in ("*/fenced-*", "*/tries", "*/tickets", "removed-*", "frozen-*"):
            for leftover in self.engine_dir.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)
        for folder in ("tmp", "tries", "journal", "tickets"):
            (self.session_dir / folder).mkdir(parents=True, exist_ok=True)
        self._remove_merged()

    def _remove_merged(self) -> None:
        """Remove parts that a merged part stands for, where whoever merged them was killed before."""
        for merged in self.run_dir.glob(f"*/part-*-{MERGED}-*.parquet"):
            names = (pq.read_schema(merged).metadata or {}).get(MERGED_FROM, b"[]")
            for name in json.loads(names):
                (merged.parent / name).unlink(missing_ok=True)

    def end(self) -> None:
        """Close this session's folders that serve only while it lasts; the journal stays, if it tells anything."""
        for folder in ("tmp", "tries", "tickets"):
            shutil.rmtree(self.session_dir / folder, ignore_errors=True)
        (self.session_dir / "stop").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            (self.session_dir / "journal").rmdir()
            self.session_dir.rmdir()

    def stop(self) -> None:
        """Ask this session's readers and workers to begin nothing more."""
        (self.session_dir / "stop").touch()

    def stopping(self) -> bool:
        """Whether that has been asked."""
        return (self.session_dir / "stop").exists()

    # -- files ---------------------------------------------------------------------------------------------------

    def publish_bytes(self, place: Path, data: bytes) -> None:
        """Put a file in its place whole. Raises FileNotFoundError where this session has been fenced off."""
        temporary = self.temporary()
        temporary.write_bytes(data)
        self.publish_file(temporary, place)

    def publish_table(self, name: str, part: str, table: pa.Table, fingerprint: str = "") -> Path:
        """Append `table` to the run's table `name` as the part file `part-<session>-<part>.parquet`."""
        metadata = {**(table.schema.metadata or {}), FINGERPRINT: fingerprint.encode()}
        temporary = self.temporary()
        pq.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd")
        place = self.part(name, part)
        self.publish_file(temporary, place)
        return place

    def part(self, name: str, part: str) -> Path:
        """Where this session's part of a table goes."""
        return self.run_dir / name / f"part-{self.session}-{part}.parquet"

    def publish(self, folder: str, identity_id: str, name: str, suffix: str, data: bytes) -> str:
        """Put a media file into the run; see `ipvg_ray.pipeline.stage.MediaWriter`."""
        relative = f"{folder}/{safe_name(identity_id)}/{safe_name(name)}{suffix}"
        self.publish_bytes(self.run_dir / relative, data)
        return relative

    def write_run(self, run: dict[str, Any]) -> None:
        """Replace run.json."""
        self.publish_bytes(self.run_dir / "run.json", json.dumps(run, indent=2, ensure_ascii=False).encode())

    def temporary(self) -> Path:
        """A new name in this session's `tmp` folder, for a file that will be published."""
        return self.session_dir / "tmp" / uuid.uuid4().hex

    @staticmethod
    def publish_file(temporary: Path, place: Path) -> None:
        """Give a finished temporary file its place. Raises FileNotFoundError where this session has been fenced off."""
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())  # before it gets its name: a power cut must not leave a torn part
        try:
            os.replace(temporary, place)
        except FileNotFoundError:
            if not temporary.exists():
                raise  # fenced off; making the target's folder would not help
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, place)

    # -- tries ---------------------------------------------------------------------------------------------------

    def begin_try(self, stage: str, batch: str) -> int:
        """Note ahead that a batch is begun; returns how many earlier tries never ended, because their worker died."""
        folder = self.session_dir / "tries" / stage
        folder.mkdir(exist_ok=True)
        begun = len(list(folder.glob(f"{batch}.*")))
        (folder / f"{batch}.{uuid.uuid4().hex[:8]}").touch()
        return begun

    def end_try(self, stage: str, batch: str) -> None:
        """Forget the tries of a batch that has ended, well or with a failure."""
        for file in (self.session_dir / "tries" / stage).glob(f"{batch}.*"):
            file.unlink()

    def begin_setup(self, stage: str) -> int:
        """Note ahead that this process begins to load a stage; returns how many on this host died while they did."""
        folder = self.session_dir / "tries" / stage
        folder.mkdir(exist_ok=True)
        died = len(self._dead_setups(stage))
        self._setup_mark(stage).touch()
        return died

    def end_setup(self, stage: str) -> None:
        """Note that this process has loaded the stage: it can be loaded, so earlier deaths are forgiven."""
        self._setup_mark(stage).unlink(missing_ok=True)
        for mark in self._dead_setups(stage):
            mark.unlink(missing_ok=True)

    def _dead_setups(self, stage: str) -> list[Path]:
        marks = (self.session_dir / "tries" / stage).glob(f"setup.{os.uname().nodename}.*")
        return [mark for mark in marks if not _alive(int(mark.name.rpartition(".")[2]))]

    def _setup_mark(self, stage: str) -> Path:
        return self.session_dir / "tries" / stage / f"setup.{os.uname().nodename}.{os.getpid()}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def lock(run_dir: Path) -> IO[bytes]:
    """Hold a run directory for this process; released when the returned file is closed or the process dies.

    Raises:
        RunLockedError: where another process holds it.
    """
    (run_dir / ENGINE).mkdir(parents=True, exist_ok=True)
    handle = (run_dir / ENGINE / "lock").open("a+b")
    for patience in (0.2, 0.2, 0.2, 0.0):  # `holder` takes the lock for an instant to see whether it is free
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            time.sleep(patience)
    else:
        handle.close()
        raise RunLockedError(f"{run_dir} is in use by {holder(run_dir)}; wait for it or stop it")
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {os.uname().nodename}".encode())
    handle.flush()
    return handle


def holder(run_dir: Path) -> str | None:
    """Who is at work in a run directory, or None."""
    path = run_dir / ENGINE / "lock"
    if not path.is_file():
        return None
    with path.open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return handle.read().decode(errors="replace").strip() or "another process"
    return None


def remove_table(run_dir: Path, name: str) -> None:
    """Remove a table of a run, in one step for its readers."""
    folder = run_dir / name
    if folder.is_dir():
        doomed = run_dir / ENGINE / f"removed-{uuid.uuid4().hex}"
        folder.rename(doomed)
        shutil.rmtree(doomed)


def failures_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of the failures table from dictionaries."""
    return pa.Table.from_pylist(rows, schema=tables.stored_schema("failures"))
