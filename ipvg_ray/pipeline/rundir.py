"""Open a run directory: freeze its identity set, agree on fingerprints, fork it, make parts of it again."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ipvg_ray import tables
from ipvg_ray.config import DatasetConfig
from ipvg_ray.errors import UserError
from ipvg_ray.pipeline import fingerprint as fp
from ipvg_ray.pipeline import scratch
from ipvg_ray.pipeline.lease import lock
from ipvg_ray.pipeline.plan import PlanError, Step, make_steps
from ipvg_ray.pipeline.stage import Stage
from ipvg_ray.pipeline.store import Store, new_session, remove_table
from ipvg_ray.pipeline.survey import Counts, Survey, survey
from ipvg_ray.storage import (
    RunPath,
    StorageError,
    TornPartError,
    copy_file,
    folders,
    make_folder,
    parquet,
    remove_folder,
)

Freeze = Callable[[Path], dict[str, Any]]
"""Writes the identity set's tables below a folder and returns what run.json keeps of it under `dataset`."""
FROZEN = ("identities", "samples", "failures")
_DATASET_DEFAULTS = DatasetConfig().model_dump(mode="json")


class ChangedError(UserError):
    """The configuration is not the one this run directory was made with; the message says which fields differ."""


class ForeignFilesError(UserError):
    """A folder where a table must go holds somebody else's files."""


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        config: the whole configuration as plain values, kept in run.json.
        seed: the run's seed.
        stages: all stages, in order, to the last one wanted.
        redo_from: remove this stage's and all later results first.
        retry_failures: try rows that failed again.
        in_turn: run stages in groups that fit the nodes there are now, also on a cluster that others started.
        max_deaths: worker deaths after which a row is set aside.
        grace_s: seconds that rows in work have to finish when the run is asked to stop.
        traces: whether the rows' way is traced; see `ipvg_ray.pipeline.traces`.
    """

    run_dir: RunPath
    config: dict[str, Any]
    seed: int
    stages: Sequence[Stage]
    redo_from: str | None = None
    retry_failures: bool = False
    in_turn: bool = False
    max_deaths: int = 3
    grace_s: float = 30.0
    traces: bool = False


@dataclass
class Opened:
    """A run directory that is ready: its fingerprints agreed on, surveyed.

    Attributes:
        store: the session that may write into it; another one after `renew`.
        lost: whether this process has lost its hold on the directory to another.
        stopping: whether the run was asked to end.
    """

    store: Store
    steps: list[Step]
    prints: dict[str, fp.Fingerprint]
    run: dict[str, Any]
    found: Survey
    lost: bool = False
    stopping: bool = False

    def survey(self) -> Survey:
        """What is done by now."""
        return survey(self.store, self.steps, _digests(self.prints))

    def stop(self) -> None:
        """Ask readers and workers, of this session and of those that may follow, to begin nothing more."""
        self.stopping = True
        self.store.stop()

    def tidy(self, counts: Mapping[str, Counts]) -> None:
        """Remove work in progress that nobody will go on from; `counts` say how the stages stand now."""
        done = [name for name, count in counts.items() if count.done == count.total]
        if not self.lost:
            with suppress(StorageError):  # the next start removes it
                scratch.tidy(self.store, _digests(self.prints), done)

    def renew(self) -> None:
        """Begin a session anew: workers of the last one that may still live can write nothing more."""
        old, new = self.store, Store(self.store.run_dir, new_session())
        new.begin()
        self.store = new
        if self.stopping:
            new.stop()
        old.end()
        self.found = _cleaned(new, self.steps, self.prints)


@contextmanager
def opened(request: Request, freeze: Freeze) -> Iterator[Opened]:
    """Lock a run directory, freeze the identity set if it is new, and survey it.

    Raises:
        PlanError: for stages that do not fit together, or models that are missing.
        ChangedError: where fingerprints differ from those of finished rows and `redo_from` does not reach far enough.
        ForeignFilesError: where the directory of a new run holds folders of others by the tables' names.
        RunLockedError: where another process is at work in it.
    """
    steps = make_steps(request.stages)
    require_models(request.stages)
    run_dir = request.run_dir.resolve()  # workers may have another working directory
    held = lock(run_dir, lambda: on_lost())
    store = Store(run_dir, new_session())
    this: Opened | None = None

    def on_lost() -> None:
        if this is not None:
            this.lost = True
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        store.begin()
        _put_torn_failures_aside(store)
        run = _read_or_freeze(store, request, freeze)
        prints = fp.fingerprints(request.stages, request.seed, run["dataset"]["digest"])
        _agree(store, run, prints, request)
        store.write_run(run)
        this = Opened(store, steps, prints, run, _cleaned(store, steps, prints))
        yield this
    finally:
        (this.store if this else store).end()
        held.close()


def _digests(prints: dict[str, fp.Fingerprint]) -> dict[str, str]:
    return {name: made.digest for name, made in prints.items()}


def _cleaned(store: Store, steps: Sequence[Step], prints: dict[str, fp.Fingerprint]) -> Survey:
    """What is done, once parts that are torn are out of the way and those that only repeat others are removed."""
    while True:
        try:
            found = survey(store, steps, _digests(prints))
        except TornPartError as error:
            _put_aside(store, error.part)
            continue
        if not found.repeats:
            return found
        for part, own in found.repeats:
            _drop_rows(store, part, own)


def _drop_rows(store: Store, part: RunPath, own: np.ndarray) -> None:
    """Leave only some rows in a part, or nothing of it where there are none."""
    if not own.any():
        part.unlink(missing_ok=True)
        return
    buffer = io.BytesIO()
    pq.write_table(tables.read_part(part).filter(pa.array(own)), buffer, compression="zstd")
    store.publish_bytes(part, buffer.getvalue())


def _put_aside(store: Store, part: RunPath) -> None:
    aside = store.engine_dir / "torn" / part.parent.name
    make_folder(aside)
    part.rename(aside / part.name)  # type: ignore[arg-type] # of one kind


def _put_torn_failures_aside(store: Store) -> None:
    for part in tables.parts(store.run_dir, "failures"):
        try:
            parquet(part).close()
        except TornPartError:
            _put_aside(store, part)


def require_models(stages: Sequence[Stage]) -> None:
    """Raise PlanError where a model that a stage names is not there."""
    missing = [f"{s.name}.{f}: {p}" for s in stages for f, p in s.models().items() if not p.exists()]
    if missing:
        raise PlanError(
            "models are missing:\n  " + "\n  ".join(missing) + "\n"
            "make the miniature ones with `ipvg-ray models make-mini`, fetch real ones with `ipvg-ray models pull`"
        )


def _read_or_freeze(store: Store, request: Request, freeze: Freeze) -> dict[str, Any]:
    if (store.run_dir / "run.json").is_file():
        run = tables.read_run(store.run_dir)
        _same_dataset(run, request)
        return run
    _refuse_foreign(store.run_dir, request.stages)
    with _staging(store) as staging:
        dataset = freeze(staging)
        for name in FROZEN:
            remove_table(store.run_dir, name)  # left by a start that died before run.json was there
            if not (staging / name).is_dir():
                continue
            target = store.run_dir / name
            if isinstance(target, Path):
                (staging / name).rename(target)
            else:
                for file in sorted((staging / name).iterdir()):
                    copy_file(file, target / file.name)
    run = {"version": 1, "id": uuid.uuid4().hex, "created": now(), "config": request.config}
    run |= {"stages": {}, "sessions": []}
    run["dataset"] = {**dataset, "digest": dataset_digest(store.run_dir)}
    store.write_run(run)
    return run


@contextmanager
def _staging(store: Store) -> Iterator[Path]:
    """A local folder for the identity set's tables: where the run lies on disk, beside their places."""
    if isinstance(store.engine_dir, Path):
        folder = store.engine_dir / f"frozen-{uuid.uuid4().hex}"
        yield folder
        remove_folder(folder)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary) / "frozen"


def _refuse_foreign(run_dir: RunPath, stages: Sequence[Stage]) -> None:
    """A new run must not take over, and later remove, folders that only happen to have its tables' names."""
    for name in FROZEN:
        for file in (run_dir / name).glob("*"):
            if not (file.name.startswith("part-") and file.suffix == ".parquet"):
                raise ForeignFilesError(
                    f"{run_dir / name} is not a run's table; name a new or empty directory with --out"
                )
    for name in [*(s.name for s in stages), *(folder for s in stages for folder in s.media)]:
        if (run_dir / name).exists():
            raise ForeignFilesError(
                f"{run_dir / name} is there, but no run.json; name a new or empty directory with --out"
            )


def dataset_digest(run_dir: RunPath) -> str:
    """Hash of the frozen identity set: ids, pictures and prompts, one part file in memory at a time."""
    digest = hashlib.sha256()
    for name, columns in (("identities", ["identity_id", "image_sha256"]), ("samples", ["sample_id", "prompt"])):
        for part in tables.parts(run_dir, name):
            table = tables.read_part(part, columns)
            for column in columns:
                digest.update("\0".join(table[column].to_pylist()).encode())
    return digest.hexdigest()[:16]


# -- what changed ------------------------------------------------------------------------------------------------


def _same_dataset(run: dict[str, Any], request: Request) -> None:
    # Fields that the run's version did not have yet stand at their defaults.
    frozen, asked = (_DATASET_DEFAULTS | config["dataset"] for config in (run["config"], request.config))
    asked["strict"] = frozen["strict"]  # only ever decides whether a run begins
    if lines := fp.differences("dataset", {"settings": frozen}, {"settings": asked}):
        raise ChangedError(
            f"the identity set of {request.run_dir} was frozen when its run began, and another is asked for:\n  "
            + "\n  ".join(lines)
            + "\nleave these options out to go on, or start a new run with another --out"
        )


def _agree(store: Store, run: dict[str, Any], prints: dict[str, fp.Fingerprint], request: Request) -> None:
    """Make run.json say what this start will do; refuse first, remove afterwards."""
    if request.redo_from is not None and request.redo_from not in prints:
        raise PlanError(f"--redo-from {request.redo_from}: there is no such stage; there are {', '.join(prints)}")
    _refuse_changes(store.run_dir, run, prints, request.redo_from)
    if request.redo_from is not None:
        _remove_from(store, run, list(prints), request.redo_from)
    if request.retry_failures:
        _set_failures_aside(store, list(prints))
    kept = {name: run["config"].get(name) for name in run["stages"] if name not in prints}
    run["config"] = request.config | {name: section for name, section in kept.items() if section is not None}
    for stage in request.stages:
        made = prints[stage.name]
        run["stages"][stage.name] = {"fingerprint": made.digest, "inputs": made.inputs, "media": list(stage.media)}


def _refuse_changes(run_dir: RunPath, run: dict[str, Any], prints: dict[str, fp.Fingerprint], redo: str | None) -> None:
    """Only a stage that has rows can be contradicted: a plan, or a start that never reached it, binds nobody."""
    lines: list[str] = []
    first: str | None = None
    for name, new in prints.items():
        old = run["stages"].get(name)
        if old is not None and old["fingerprint"] != new.digest and tables.parts(run_dir, name):
            first = first or name
            lines += fp.differences(name, old["inputs"], new.inputs)
    names = list(prints)
    if first is None or (redo is not None and names.index(redo) <= names.index(first)):
        return
    changed = "\n  ".join(dict.fromkeys(lines)) or "(an upstream stage changed)"
    raise ChangedError(
        f"{run_dir} was made with another configuration:\n  {changed}\n"
        "go on with the old one (leave the options out: it is kept in run.json), or use\n"
        "  --fork NEW         to start a new run directory that reuses what is still valid\n"
        f"  --redo-from {first}  to remove the results of {first} and of all later stages, and make them again"
    )


def _remove_from(store: Store, run: dict[str, Any], names: list[str], redo_from: str) -> None:
    """Remove results back to front, so that a kill in between leaves a run that can go on."""
    doomed = [*names[names.index(redo_from) :], *(name for name in run["stages"] if name not in names)]
    _set_failures_aside(store, doomed)
    media = [folder for name in doomed for folder in run["stages"].get(name, {}).get("media", [])]
    for name in [*reversed(doomed), *media]:
        remove_table(store.run_dir, name)
        run["stages"].pop(name, None)


def _set_failures_aside(store: Store, stages: Sequence[str]) -> None:
    """Move failures of these stages out of the table; they stay readable, to count tries by."""
    retried = store.engine_dir / "retried" / "failures"
    make_folder(retried)
    for part in tables.parts(store.run_dir, "failures"):
        if _stages_of(part) <= set(stages):
            part.rename(retried / part.name)  # type: ignore[arg-type] # of one kind


def _stages_of(part: RunPath) -> set[str]:
    return set(tables.read_part(part, ["stage"])["stage"].to_pylist())


# -- forks -------------------------------------------------------------------------------------------------------


def fork(old: RunPath, request: Request) -> list[str]:
    """Begin the run directory `request.run_dir` from another: its identity set, and the results of stages whose
    fingerprints still hold.

    Files are linked where the file system can, else copied. The old run may be at work meanwhile. Returns the names of
    the stages taken over.

    Raises:
        ChangedError: where the new directory is not empty, or another identity set is asked for.
    """
    new = request.run_dir
    if any(new.glob("*")) or folders(new):
        raise ChangedError(f"{new} is not empty; name a new directory")
    run = tables.read_run(old)
    _same_dataset(run, request)
    known = run["stages"]
    prints = fp.fingerprints(request.stages, request.seed, run["dataset"]["digest"])
    kept = [n for n, p in prints.items() if n in known and known[n]["fingerprint"] == p.digest]
    # On disk made beside its place and renamed; in S3 in its place, where run.json, which makes it a run, comes last.
    made = new.with_name(f".{new.name}.fork-{uuid.uuid4().hex[:8]}") if isinstance(new, Path) else new
    try:
        for name in [*reversed(kept), "samples", "identities"]:  # rows of later stages first: see `survey`
            _copy_folder(old / name, made / name)
        for folder in (folder for stage in request.stages if stage.name in kept for folder in stage.media):
            _copy_folder(old / folder, made / folder)
        for part in tables.parts(old, "failures"):
            if _stages_of(part) <= {"dataset", *kept}:
                copy_file(part, made / "failures" / part.name)
        run |= {"config": request.config, "stages": {name: known[name] for name in kept}, "sessions": []}
        run |= {"id": uuid.uuid4().hex, "created": now(), "forked_from": str(old.resolve())}
        store = Store(made, new_session())
        store.begin()
        store.write_run(run)
        store.end()
        if isinstance(made, Path) and isinstance(new, Path):
            if new.exists():
                new.rmdir()
            made.rename(new)
    except BaseException:
        remove_folder(made)
        raise
    return kept


def _copy_folder(source: RunPath, target: RunPath) -> None:
    if source.is_dir():
        for file in source.rglob("*"):
            if file.is_file() and not file.name.startswith("."):
                copy_file(file, target / str(file.relative_to(source)))  # type: ignore[arg-type] # of one kind


def now() -> str:
    """The time in UTC, ISO 8601, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")
