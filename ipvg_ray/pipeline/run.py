"""One start of a run: see what is missing, do it, say what came of it."""

from __future__ import annotations

import functools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from ipvg_ray.pipeline import progress as shown
from ipvg_ray.pipeline.deaths import trace_folder
from ipvg_ray.pipeline.lease import RunLockedError
from ipvg_ray.pipeline.metrics import Meters
from ipvg_ray.pipeline.plan import Step
from ipvg_ray.pipeline.rundir import ChangedError, Freeze, Opened, Request, fork, now, opened, require_models
from ipvg_ray.pipeline.runlog import RunLog, progress_of
from ipvg_ray.pipeline.stall import StallWatch
from ipvg_ray.pipeline.survey import Counts
from ipvg_ray.pipeline.tickets import write_tickets
from ipvg_ray.pipeline.worker import WorkerSpec

__all__ = ["ChangedError", "Freeze", "Interrupted", "Opened", "Request", "Result"]
__all__ += ["fork", "opened", "require_models", "run", "specs"]


_IDLE_LOSSES = 3
"""Executions that may break off one after another without a single row finished, before the run ends."""


class Interrupted(KeyboardInterrupt):
    """The run is to end now. Like Ctrl-C it must pass through every `except Exception` on its way."""


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
        """Rows of the last stage that are neither finished nor failed, there or on the way."""
        return list(self.counts.values())[-1].waiting


def run(request: Request, freeze: Freeze) -> Result:
    """Do everything that is missing. Raises what `opened` raises, WorkerStartError and ResourceError."""
    started = time.monotonic()
    with opened(request, freeze) as this:
        counts, grains = this.found.counts, {s.name: s.stage.grain for s in this.steps}
        prompts = len(this.found.owner) / max(1, len(this.found.identities.keys))
        seen = shown.Progress(counts, grains, prompts)
        session: dict[str, Any] = {"started": now(), "host": os.uname().nodename, "outcome": "running", "ended": None}
        this.run.setdefault("sessions", []).append(session)
        this.store.write_run(this.run)
        result = Result(counts, this.run["dataset"]["problems"], 0.0)
        words, log = trace_folder(this.store.session_dir).with_name("ray.log"), RunLog(this.store.session_dir)
        try:
            if any(len(rows) for rows in this.found.entry.values()):
                log.note("start", run=str(this.store.run_dir), stages=progress_of(seen))
                with shown.own_terminal(words) as terminal, _signals(this, request.grace_s, terminal):
                    _execute(this, request, seen, terminal, log)
            result.outcome = "interrupted" if this.stopping else "complete"
        except KeyboardInterrupt:
            result.outcome = "interrupted"
            if this.lost:
                raise RunLockedError(f"{request.run_dir} was taken over by another start; this one has ended") from None
        except BaseException as error:
            result.outcome = "failed"
            error.add_note(f"Ray's own words are in {words}")
            log.note("note", message=f"{type(error).__name__}: {error}")
            raise
        finally:
            result.seconds = time.monotonic() - started
            result.stages = _tally(seen, this.steps)
            session |= {"ended": now(), "seconds": round(result.seconds, 1), "outcome": result.outcome}
            session["stages"] = result.stages
            if seen.lost.total():
                session["lost"] = dict(seen.lost)
            if log.file.is_file():  # a start that had something to do
                log.note("end", outcome=result.outcome, seconds=session["seconds"], stages=progress_of(seen))
            if not this.lost:
                this.store.write_run(this.run)
                log.close()
        result.counts = this.survey().counts
        this.tidy(result.counts)
        return result


def specs(this: Opened, request: Request) -> dict[str, WorkerSpec]:
    """How each stage's workers are made. Raises TracesError where traces are asked for that cannot be sent."""
    traces: Mapping[str, Any] = {}
    if request.traces:
        from ipvg_ray.pipeline.traces import traces_of  # only where they are wanted

        traces = traces_of(this.steps, this.run.get("id") or this.run["created"])
    return {
        step.name: WorkerSpec(
            step, this.store, request.seed, this.prints[step.name].digest, request.max_deaths, traces.get(step.name)
        )
        for step in this.steps
    }


def _execute(this: Opened, request: Request, seen: shown.Progress, terminal: TextIO, log: RunLog) -> None:
    from ipvg_ray.pipeline import execute, lead, space  # Ray takes a second to import; `status` does without it

    def say(line: str) -> None:
        print(line, file=terminal, flush=True)
        log.note("note", message=line)

    try:
        execute.connect()
        meters = Meters(this.steps, str(this.store.run_dir))
        stays = request.in_turn or not os.environ.get("RAY_ADDRESS")
        stall = StallWatch(space.room, space.HELPER_CPUS, say, lead.give_up if stays else None)
        # Signals again: ray.init puts its own handlers in place.
        with _signals(this, request.grace_s, terminal), shown.Display(seen, terminal) as display:

            def on_events(events: Sequence[Any]) -> None:
                seen.add(events)
                meters.add(events, seen)
                display.tick()
                log.tick(seen)
                stall.look(events)

            _go_on_after_losses(this, lambda: _execute_once(this, request, on_events, say, seen, stall), seen, say)
        if request.traces:
            from ipvg_ray.pipeline.traces import linger

            linger()
    finally:
        execute.shutdown()


def _execute_once(
    this: Opened,
    request: Request,
    on_events: Callable[[Sequence[Any]], None],
    say: Callable[[str], None],
    seen: shown.Progress,
    stall: StallWatch,
) -> None:
    """Do what is missing, in as many executions as the machine needs."""
    from ipvg_ray.pipeline import execute, space
    from ipvg_ray.pipeline.desk import loading, lost, make_desk

    first = next((i for i, step in enumerate(this.steps) if len(this.found.entry[step.name])), len(this.steps))
    for number, group in enumerate(space.phases(this.steps[first:], request.in_turn, say)):
        if this.stopping:
            return
        names = {step.name for step in group}
        found = this.found if number == 0 else this.survey()
        tickets = {
            step.name: write_tickets(this.store.tickets_dir, this.steps, i, found)
            for i, step in enumerate(this.steps)
            if step.name in names and len(found.entry[step.name])
        }
        # A ledger for each: what broke off before says nothing of the rows that were in work then.
        desk = make_desk()
        shared = bool(os.environ.get("RAY_ADDRESS"))
        stall.restart(functools.partial(loading, desk), space.room().cpus if shared else math.inf)
        try:
            execute.execute(group, specs(this, request), tickets, on_events, desk)
        finally:
            seen.lost.update(lost(desk))


def _go_on_after_losses(
    this: Opened, execute_once: Callable[[], None], seen: shown.Progress, say: Callable[[str], None]
) -> None:
    """Where Ray cannot mend what a lost node took along, begin again from the checkpoints, as long as that helps."""
    from ipvg_ray.pipeline.execute import LossError

    idle = 0
    while True:
        before = _finished(this.found.counts)
        try:
            return execute_once()
        except LossError as error:
            if this.stopping:
                return None
            this.renew()
            seen.restart(this.found.counts)
            seen.lost["executions"] += 1
            idle = 0 if _finished(this.found.counts) > before else idle + 1
            if idle >= _IDLE_LOSSES:
                raise
            say(f"nodes or workers were lost; going on from the checkpoints ({error})")


def _finished(counts: dict[str, Counts]) -> int:
    return sum(c.done + c.failed for c in counts.values())


def _tally(seen: shown.Progress, steps: Sequence[Step]) -> dict[str, dict[str, Any]]:
    return {
        step.name: {
            **dict(zip(("rows", "failed"), seen.done_here(step.name), strict=True)),
            "busy_seconds": round(seen.stages[step.name].busy, 2),
            "first_row_seconds": round(seen.stages[step.name].first_row, 1),
            "workers": step.stage.resources().max_workers,
        }
        for step in steps
    }


@contextmanager
def _signals(this: Opened, grace: float, terminal: TextIO) -> Iterator[None]:
    """On SIGTERM or Ctrl-C let rows in work finish, for `grace` seconds at most; a second signal ends it at once."""

    asked = False

    def stop(number: int, frame: Any) -> None:
        nonlocal asked
        if this.lost or asked or not grace:
            raise Interrupted
        asked = True
        signal.setitimer(signal.ITIMER_REAL, grace)
        # In a thread: the run's storage may be slow, or in use by the very call that this signal has interrupted.
        threading.Thread(target=this.stop, name="stop", daemon=True).start()
        print(f"stopping: rows in work have {grace:g} s to finish; once more ends them now", file=terminal, flush=True)

    def abandon(number: int, frame: Any) -> None:
        raise Interrupted

    handlers = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGALRM: abandon}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
