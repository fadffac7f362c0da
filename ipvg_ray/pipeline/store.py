"""A run directory on disk: part files that appear whole or not at all, and a fence against workers of dead sessions.

    <run>/run.json                      configuration, fingerprints, sessions
    <run>/identities/ samples/          the frozen identity set
    <run>/<stage>/part-*.parquet        one file per finished batch
    <run>/failures/part-*.parquet       rows that could not be finished
    <run>/videos/<identity>/<prompt>.mp4
    <run>/_engine/lock                  held by the process that runs
    <run>/_engine/<session>/            one folder per session: tmp, journal, tickets, traces, tries

On disk every file is first written into its session's `tmp` folder and then renamed to its place. A new session removes
the `tmp` folders of all earlier ones before it looks at what is finished: from then on no rename of a worker that
outlived its driver can succeed, so nothing can be added behind the new session's back.

In S3 objects appear whole by themselves, and the fence is an object `tmp/open` that must be there when one is written.
Between that look and the end of the writing a cut-off worker of an old session can still add a part. Its rows are then
in two parts: readers take the first of each, and the next start removes parts that only repeat others.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ipvg_ray import tables
from ipvg_ray.media.names import safe_name
from ipvg_ray.storage import RunPath, StorageError, folders, make_folder, parquet, remove_folder

ENGINE = "_engine"
TRIES = "tries"
"""Folder of a session in which its processes note their tries; see `ipvg_ray.pipeline.desk`."""
FINGERPRINT = b"ipvg_ray.fingerprint"
MERGED = "merged"
"""In the names of parts that stand for several; their metadata lists them under `MERGED_FROM`."""
MERGED_FROM = b"ipvg_ray.merged_from"


class FencedError(FileNotFoundError):
    """This session may not write any more: another one has begun."""


def new_session() -> str:
    """A name for one start of a run: sorts by time, never repeats."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{uuid.uuid4().hex[:6]}"


def batch_digest(keys: Sequence[str]) -> str:
    """Name of a batch: the same rows give the same name, so a repeated batch replaces itself."""
    return hashlib.blake2b("\n".join(keys).encode(), digest_size=10).hexdigest()


def row_seeds(run_seed: int, keys: Sequence[str], stage: str) -> list[int]:
    """The rows' own seeds in [0, 2^63), independent of order, batch, pool and resume."""
    begun = hashlib.blake2b(f"{run_seed}\0{stage}\0".encode(), digest_size=8)
    seeds = []
    for key in keys:
        digest = begun.copy()
        digest.update(key.encode())
        seeds.append(int.from_bytes(digest.digest(), "big") >> 1)
    return seeds


@dataclass(frozen=True)
class Store:
    """One session's hand on a run directory. Plain paths, so that it travels to workers; see the module's docstring."""

    run_dir: RunPath
    session: str

    @property
    def engine_dir(self) -> RunPath:
        return self.run_dir / ENGINE

    @property
    def session_dir(self) -> RunPath:
        return self.engine_dir / self.session

    @property
    def tickets_dir(self) -> RunPath:
        return self.session_dir / "tickets"

    # -- sessions ------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Fence earlier sessions off and open this one's folders. Call with the run directory held."""
        for name in folders(self.engine_dir):
            old = self.engine_dir / name
            if name.startswith(("removed-", "frozen-")):
                remove_folder(old)
            elif name != self.session:
                _close(old)
        for folder in ("tmp", "apart", "journal", "tickets", "traces", TRIES):
            make_folder(self.session_dir / folder)
        if not isinstance(self.run_dir, Path):
            (self.session_dir / "tmp" / "open").touch()
        self._remove_merged()

    def is_open(self) -> bool:
        """Whether this session may still write; False too where a machine does not see the run directory."""
        tmp = self.session_dir / "tmp"
        return tmp.is_dir() if isinstance(tmp, Path) else (tmp / "open").is_file()

    def _remove_merged(self) -> None:
        """Remove parts that a merged part stands for, where whoever merged them was killed before."""
        for table in folders(self.run_dir):
            found: list[RunPath] = list((self.run_dir / table).glob(f"part-*-{MERGED}-*.parquet"))
            for merged in found:
                with contextlib.suppress(FileNotFoundError):  # it was itself merged into another, and removed by that
                    with parquet(merged) as file:
                        names = (file.schema_arrow.metadata or {}).get(MERGED_FROM, b"[]")
                    for name in json.loads(names):
                        (merged.parent / name).unlink(missing_ok=True)

    def end(self) -> None:
        """Close this session's folders that serve only while it lasts; the journal stays, if it tells anything."""
        _close(self.session_dir)
        (self.session_dir / "stop").unlink(missing_ok=True)
        if isinstance(self.session_dir, Path):
            with contextlib.suppress(OSError):  # not empty
                (self.session_dir / "journal").rmdir()
                self.session_dir.rmdir()

    def stop(self) -> None:
        """Ask this session's readers and workers to begin nothing more."""
        (self.session_dir / "stop").touch()

    def stopping(self) -> bool:
        """Whether that has been asked."""
        return (self.session_dir / "stop").is_file()

    # -- batches that were taken apart ---------------------------------------------------------------------------

    def take_apart(self, stage: str, batch: str) -> None:
        """Note for good that some rows of a batch may be finished alone: it must never be tried as a whole again."""
        self._apart(stage, batch).touch()

    def was_taken_apart(self, stage: str, batch: str) -> bool:
        """Whether that has been noted in this session."""
        return self._apart(stage, batch).is_file()

    def _apart(self, stage: str, batch: str) -> RunPath:
        return self.session_dir / "apart" / f"{stage}-{batch}"

    # -- files ---------------------------------------------------------------------------------------------------

    def publish_bytes(self, place: RunPath, data: bytes) -> None:
        """Put a file in its place whole. Raises FencedError, StorageError."""
        if not isinstance(place, Path):
            self._require_open()
            place.write_bytes(data)
            return
        temporary = self.temporary()
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())  # before it gets its name: a power cut must not leave a torn part
            _place(temporary, place)
        except FileNotFoundError:
            raise self._fenced() from None
        except OSError as error:  # the disk is full, or gone
            raise StorageError(f"cannot write {place}: {error}") from error

    def publish_table(self, name: str, part: str, table: pa.Table, fingerprint: str = "") -> RunPath:
        """Append `table` to the run's table `name` as the part file `part-<session>-<part>.parquet`."""
        metadata = {**(table.schema.metadata or {}), FINGERPRINT: fingerprint.encode()}
        buffer = io.BytesIO()
        pq.write_table(table.replace_schema_metadata(metadata), buffer, compression="zstd", use_dictionary=False)
        place = self.part(name, part)
        self.publish_bytes(place, buffer.getvalue())
        return place

    def part(self, name: str, part: str) -> RunPath:
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
        """A new name for a local file that will be published: beside its place on disk, else on this machine."""
        if isinstance(self.session_dir, Path):
            return self.session_dir / "tmp" / uuid.uuid4().hex
        return Path(tempfile.mkdtemp(prefix="ipvg_ray-")) / "file"

    def publish_file(self, temporary: Path, place: RunPath) -> None:
        """Give a finished temporary file its place. Raises FencedError, StorageError."""
        if not isinstance(place, Path):
            self._require_open()
            place.upload(temporary)
            temporary.unlink()
            temporary.parent.rmdir()
            return
        try:
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            _place(temporary, place)
        except FileNotFoundError:
            raise self._fenced() from None

    def _require_open(self) -> None:
        if not self.is_open():
            raise self._fenced()

    def _fenced(self) -> FencedError:
        return FencedError(f"{self.session_dir} is closed: another start of the run has begun")


def _close(session_dir: RunPath) -> None:
    """Fence a session off and remove what served only while it lasted."""
    _fence(session_dir / "tmp")
    for name in folders(session_dir):
        if name in ("apart", "traces", "tickets", TRIES) or name.startswith("fenced-"):
            remove_folder(session_dir / name)


def _fence(tmp: RunPath) -> None:
    """Take a session the right to write, in one step: no file can slip in while its folder is emptied."""
    if isinstance(tmp, Path):
        if tmp.is_dir():
            doomed = tmp.with_name(f"fenced-{uuid.uuid4().hex}")
            tmp.rename(doomed)
            remove_folder(doomed)
    else:
        (tmp / "open").unlink()


def _place(temporary: Path, place: Path) -> None:
    try:
        os.replace(temporary, place)
    except FileNotFoundError:
        if not temporary.exists():
            raise  # fenced off; making the target's folder would not help
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, place)


def remove_table(run_dir: RunPath, name: str) -> None:
    """Remove a table of a run; on disk in one step for its readers."""
    folder = run_dir / name
    if isinstance(folder, Path) and folder.is_dir():
        doomed = folder.parent / ENGINE / f"removed-{uuid.uuid4().hex}"
        folder.rename(doomed)
        folder = doomed
    remove_folder(folder)


def failures_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of the failures table from dictionaries."""
    return pa.Table.from_pylist(rows, schema=tables.stored_schema("failures"))
