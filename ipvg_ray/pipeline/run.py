"""One start of a run: open or resume its directory, see what is missing, do it, say what came of it."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import pyarrow.parquet as pq

from ipvg_ray import tables
from ipvg_ray.errors import UserError
from ipvg_ray.pipeline import fingerprint as fp
from ipvg_ray.pipeline import progress as shown
from ipvg_ray.pipeline.plan import PlanError, Step, make_steps
from ipvg_ray.pipeline.stage import Stage
from ipvg_ray.pipeline.store import ENGINE, Store, lock, new_session, remove_table
from ipvg_ray.pipeline.survey import Counts, Survey, survey
from ipvg_ray.pipeline.tickets import write_tickets
from ipvg_ray.pipeline.worker import WorkerSpec

Freeze = Callable[[Path], dict[str, Any]]
"""Writes the identity set's tables below a folder and returns what run.json keeps of it under `dataset`."""


class ChangedError(UserError):
    """The configuration is not the one this run directory was made with; the message says which fields differ."""


class Interrupted(Exception):  # noqa: N818 - not an error: somebody asked for it
    """SIGTERM or Ctrl-C."""


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        config: the whole configuration as plain values, kept in run.json.
        seed: the run's seed.
        stages: all stages, in order, to the last one wanted.
        redo_from: remove this stage's and all later results first.
        retry_failures: try rows that failed again.
        max_deaths: worker deaths after which a row is set aside.
    """

    run_dir: Path
    config: dict[str, Any]
    seed: int
    stages: Sequence[Stage]
    redo_from: str | None = None
    retry_failures: bool = False
    max_deaths: int = 3


@dataclass
class Result:
    """What came of a start: counts per stage afterwards, dataset problems, seconds, and how it ended."""

    counts: dict[str, Counts]
    problems: int
    seconds: float
    outcome: str = "complete"
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """Failure rows that stand, those of the identity set included."""
        return self.problems + sum(c.failed for c in self.counts.values())

    @property
    def waiting(self) -> int:
        return sum(c.waiting for c in self.counts.values())


@dataclass(frozen=True)
class Opened:
    """A run directory that is ready: surveyed, its fingerprints agreed on."""

    store: Store
    steps: list[Step]
    prints: dict[str, fp.Fingerprint]
    run: dict[str, Any]
    found: Survey

    def survey(self) -> Survey:
        """What is done by now."""
        return survey(self.store, self.steps, {name: p.digest for name, p in self.prints.items()})

    def specs(self, request: Request) -> dict[str, WorkerSpec]:
        """How each stage's workers are made."""
        return {
            step.name: WorkerSpec(step, self.store, request.seed, self.prints[step.name].digest, request.max_deaths)
            for step in self.steps
        }


@contextmanager
def opened(request: Request, freeze: Freeze) -> Iterator[Opened]:
    """Lock a run directory, freeze the identity set if it is new, and survey it.

    Raises:
        PlanError: for stages that do not fit together, or models that are missing.
        ChangedError: where fingerprints differ from those in run.json and `redo_from` does not reach far enough back.
        RunLockedError: where another process is at work in it.
    """
    steps = make_steps(request.stages)
    require_models(request.stages)
    run_dir = request.run_dir.resolve()  # workers may have another working directory
    handle = lock(run_dir)
    try:
        store = Store(run_dir, new_session())
        store.begin()
        run = _read_or_freeze(store, request, freeze)
        prints = fp.fingerprints(request.stages, request.seed, run["dataset"]["digest"])
        if request.redo_from is not None:
            _remove_from(store, request)
        _refuse_changes(run, prints, request)
        if request.retry_failures:
            _set_failures_aside(store, [step.name for step in steps])
        run["stages"] |= {name: {"fingerprint": p.digest, "inputs": p.inputs} for name, p in prints.items()}
        run["config"] = request.config
        store.write_run(run)
        found = survey(store, steps, {name: p.digest for name, p in prints.items()})
        yield Opened(store, steps, prints, run, found)
    finally:
        store.end()
        handle.close()


def require_models(stages: Sequence[Stage]) -> None:
    """Raise PlanError where a model that a stage names is not there."""
    missing = [f"{s.name}.{f}: {p}" for s in stages for f, p in s.models().items() if not p.exists()]
    if missing:
        raise PlanError(
            "models are missing:\n  " + "\n  ".join(missing) + "\n"
            "make the miniature ones with `ipvg-ray models make-mini`, fetch real ones with `ipvg-ray models pull`"
        )


def run(request: Request, freeze: Freeze) -> Result:
    """Do everything that is missing. Raises what `opened` raises, and WorkerStartError."""
    from ipvg_ray.pipeline import execute  # Ray takes a second to import; `plan` and `status` do without it

    started = time.monotonic()
    with opened(request, freeze) as this:
        counts, grains = this.found.counts, {s.name: s.stage.grain for s in this.steps}
        prompts = len(this.found.owner) / max(1, len(this.found.identities.keys))
        seen = shown.Progress(counts, grains, prompts)
        session: dict[str, Any] = {"started": _now(), "host": os.uname().nodename, "outcome": "running", "ended": None}
        this.run.setdefault("sessions", []).append(session)
        this.store.write_run(this.run)
        result = Result(counts, this.run["dataset"]["problems"], 0.0)
        log = this.store.session_dir / "ray.log"
        try:
            if any(len(rows) for rows in this.found.entry.values()):
                with shown.own_terminal(log) as terminal, _signals():
                    _execute(execute, this, request, seen, terminal)
        except (KeyboardInterrupt, Interrupted):
            result.outcome = "interrupted"
        except BaseException as error:
            result.outcome = "failed"
            error.add_note(f"Ray's own words are in {log}")
            raise
        finally:
            result.seconds = time.monotonic() - started
            result.stages = _tally(seen, this.steps)
            session |= {"ended": _now(), "seconds": round(result.seconds, 1), "outcome": result.outcome}
            session["stages"] = result.stages
            this.store.write_run(this.run)
        result.counts = this.survey().counts
        return result


def _execute(execute: Any, this: Opened, request: Request, seen: shown.Progress, terminal: TextIO) -> None:
    try:
        execute.connect()
        with _signals():  # again: ray.init puts its own handlers in place
            groups = execute.phases(this.steps)
            if len(groups) > 1:
                order = " | ".join(", ".join(step.name for step in group) for group in groups)
                print(f"this machine cannot hold all stages at once; one group after another: {order}", file=terminal)
            with shown.Display(seen, terminal) as display:

                def on_events(events: Sequence[Any]) -> None:
                    seen.add(events)
                    display.tick()

                for number, group in enumerate(groups):
                    names = {step.name for step in group}
                    found = this.found if number == 0 else this.survey()
                    tickets = {
                        step.name: write_tickets(this.store, this.steps, i, found)
                        for i, step in enumerate(this.steps)
                        if step.name in names and len(found.entry[step.name])
                    }
                    execute.execute(group, this.specs(request), tickets, on_events)
    finally:
        execute.shutdown()


def _tally(seen: shown.Progress, steps: Sequence[Step]) -> dict[str, dict[str, Any]]:
    return {
        step.name: {
            "rows": seen.stages[step.name].done,
            "failed": seen.stages[step.name].failed,
            "busy_seconds": round(seen.stages[step.name].busy, 2),
            "workers": step.stage.resources().max_workers,
        }
        for step in steps
    }


# -- opening -----------------------------------------------------------------------------------------------------


def _read_or_freeze(store: Store, request: Request, freeze: Freeze) -> dict[str, Any]:
    if (store.run_dir / "run.json").is_file():
        run = tables.read_run(store.run_dir)
        frozen, asked = run["config"]["dataset"], request.config["dataset"]
        if lines := fp.differences(
            "dataset", {"settings": frozen}, {"settings": asked | {"strict": frozen.get("strict")}}
        ):
            raise ChangedError(_refusal(store.run_dir, lines, None))
        return run
    staging = store.engine_dir / f"frozen-{uuid.uuid4().hex}"
    try:
        dataset = freeze(staging)
        for name in ("identities", "samples", "failures"):
            remove_table(store.run_dir, name)  # left by a start that died before run.json was there
            if (staging / name).is_dir():
                (staging / name).rename(store.run_dir / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    run = {"version": 1, "created": _now(), "config": request.config, "stages": {}, "sessions": []}
    run["dataset"] = {**dataset, "digest": dataset_digest(store.run_dir)}
    store.write_run(run)
    return run


def dataset_digest(run_dir: Path) -> str:
    """Hash of the frozen identity set: ids, pictures and prompts, one part file in memory at a time."""
    digest = hashlib.sha256()
    for name, columns in (("identities", ["identity_id", "image_sha256"]), ("samples", ["sample_id", "prompt"])):
        for part in tables.parts(run_dir, name):
            table = pq.read_table(part, columns=columns, partitioning=None)
            for column in columns:
                digest.update("\0".join(table[column].to_pylist()).encode())
    return digest.hexdigest()[:16]


def _refuse_changes(run: dict[str, Any], prints: dict[str, fp.Fingerprint], request: Request) -> None:
    lines: list[str] = []
    first: str | None = None
    for name, new in prints.items():
        old = run["stages"].get(name)
        if old is not None and old["fingerprint"] != new.digest:
            first = first or name
            lines += fp.differences(name, old["inputs"], new.inputs)
    names = list(prints)
    if first and not (request.redo_from and names.index(request.redo_from) <= names.index(first)):
        raise ChangedError(_refusal(request.run_dir, list(dict.fromkeys(lines)), first))


def _refusal(run_dir: Path, lines: Sequence[str], first: str | None) -> str:
    changed = "\n  ".join(lines) or "(an upstream stage changed)"
    text = f"{run_dir} was made with another configuration:\n  {changed}\n"
    text += "go on with the old one (leave the options out: it is kept in run.json), or use\n"
    text += "  --fork NEW         to start a new run directory that reuses what is still valid\n"
    if first:
        text += f"  --redo-from {first}  to remove the results of {first} and of all later stages, and make them again"
    return text.rstrip()


def _remove_from(store: Store, request: Request) -> None:
    """Remove tables back to front, so that a kill in between leaves a run that can go on."""
    names = [stage.name for stage in request.stages]
    if request.redo_from not in names:
        raise PlanError(f"--redo-from {request.redo_from}: there is no such stage; there are {', '.join(names)}")
    known = list(tables.read_run(store.run_dir)["stages"])
    doomed = [*names[names.index(request.redo_from) :], *(n for n in known if n not in names)]
    _set_failures_aside(store, doomed)
    media = [folder for stage in request.stages if stage.name in doomed for folder in stage.media]
    for name in [*reversed(doomed), *media]:
        remove_table(store.run_dir, name)


def _set_failures_aside(store: Store, stages: Sequence[str]) -> None:
    """Move failures of these stages out of the table; they stay readable, to count tries by."""
    retried = store.engine_dir / "retried" / "failures"
    retried.mkdir(parents=True, exist_ok=True)
    for part in tables.parts(store.run_dir, "failures"):
        if set(pq.read_table(part, columns=["stage"])["stage"].to_pylist()) <= set(stages):
            part.rename(retried / part.name)


def fork(old: Path, new: Path, stages: Sequence[Stage], seed: int) -> list[str]:
    """Begin a run directory from another: its identity set, and the results of stages whose fingerprints still hold.

    Files are linked where the file system can, else copied. Returns the names of the stages taken over.

    Raises:
        ChangedError: where `new` already holds a run.
    """
    if (new / "run.json").exists():
        raise ChangedError(f"{new} already holds a run; name a new directory")
    run = tables.read_run(old)
    known = run["stages"]
    prints = fp.fingerprints(stages, seed, run["dataset"]["digest"])
    kept = [n for n, p in prints.items() if n in known and known[n]["fingerprint"] == p.digest]
    new.mkdir(parents=True, exist_ok=True)
    media = [folder for stage in stages if stage.name in kept for folder in stage.media]
    for name in ["identities", "samples", *kept, *media]:
        _link_folder(old / name, new / name)
    for part in tables.parts(old, "failures"):
        if set(pq.read_table(part, columns=["stage"])["stage"].to_pylist()) <= {"dataset", *kept}:
            _link(part, new / "failures" / part.name)
    run |= {"stages": {n: known[n] for n in kept}, "sessions": [], "created": _now(), "forked_from": str(old.resolve())}
    (new / ENGINE / "x" / "tmp").mkdir(parents=True)
    Store(new, "x").write_run(run)
    return kept


def _link_folder(source: Path, target: Path) -> None:
    for file in sorted(source.rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            _link(file, target / file.relative_to(source))


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


# -- signals -----------------------------------------------------------------------------------------------------


@contextmanager
def _signals() -> Iterator[None]:
    """Turn SIGTERM into `Interrupted`, as Ctrl-C is turned into KeyboardInterrupt."""

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted

    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
