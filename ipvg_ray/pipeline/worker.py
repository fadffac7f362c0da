"""One worker of a stage: batch in, checkpoint written, batch out. Everything but the stage's own work, and no Ray.

What holds for every batch, whatever dies in between:
- a row's outcome is in a part file, of its stage or of the failures, before the row moves on;
- a batch that comes again (its worker died, or Ray repeats a task) is read back as far as it was finished;
- an exception fails the one row that raises it, as each row of the batch is then tried alone;
- a row that took its worker process down `max_deaths` times, or hung as often, is set aside as a failure.
"""

from __future__ import annotations

import faulthandler
import json
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ipvg_ray import tables
from ipvg_ray.errors import UserError
from ipvg_ray.pipeline.plan import ATTEMPT, SAMPLES, Step
from ipvg_ray.pipeline.stage import Row, RowError, Stage, StageContext
from ipvg_ray.pipeline.store import Store, batch_digest, failures_table, row_seed


class WorkerStartError(UserError):
    """A stage's worker cannot start; the run cannot go on."""


@dataclass(frozen=True)
class Event:
    """What a worker tells of a batch: that it begins, with so many rows; or that it has ended, with what came of it."""

    stage: str
    batch: str
    began: int = 0
    ended: bool = False
    done: int = 0
    failed: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker needs to be made on another machine."""

    step: Step
    store: Store
    run_seed: int
    fingerprint: str
    max_deaths: int = 3


@dataclass
class Outcome:
    """Finished rows (added columns by key) and failure rows of a batch."""

    added: dict[str, Row] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)


class Worker:
    """Wraps one stage in one process.

    Args:
        spec: what to run, and into which run directory.
        device: where the stage's models go, `cpu` or `cuda`.
        report: called with an `Event` when a batch begins and when it ends.

    Raises:
        WorkerStartError: where `setup` raises, or has taken its process down `max_deaths` times.
    """

    def __init__(self, spec: WorkerSpec, device: str, report: Callable[[Event], None] = lambda event: None) -> None:
        self.spec = spec
        self.step = spec.step
        self.stage = spec.step.stage
        self.store = spec.store
        self.report = report
        self.stored = tables.stored_schema(self.step.table)
        if not self.store.session_dir.is_dir():
            where = f"{self.store.run_dir} is not seen on {os.uname().nodename}"
            raise WorkerStartError(f"{where}; put run directory and models on storage that all nodes share")
        journal = self.store.session_dir / "journal" / f"{self.stage.name}-{os.uname().nodename}-{os.getpid()}.jsonl"
        self.journal = journal.open("a", buffering=1)
        self._setup(device)

    def _setup(self, device: str) -> None:
        deaths = self.store.begin_setup(self.stage.name)
        if deaths >= self.spec.max_deaths:
            raise WorkerStartError(
                f"starting {self.stage.name} killed its process {deaths} times; is memory too small?"
            )
        threads = self.stage.resources().threads
        try:
            self.stage.setup(StageContext(device, threads, self.store, str(self.store.run_dir)))
        except Exception as error:
            raise WorkerStartError(f"{self.stage.name} cannot start: {error}") from error
        finally:
            self.store.end_setup(self.stage.name)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Run a batch of schema `step.arriving`; returns the finished rows as the next stage wants them."""
        keys: list[str] = batch[self.step.key].to_pylist()
        # Rows that are not begun because the run is to stop stay undone, and are done by the next start.
        added = self._checkpointed(batch, keys) if keys and not self.store.stopping() else {}
        finished = [i for i, key in enumerate(keys) if key in added]
        passed = batch.take(pa.array(finished, pa.int64()))
        return self._leaving(passed, [added[keys[i]] for i in finished])

    # -- one batch -----------------------------------------------------------------------------------------------

    def _checkpointed(self, batch: pa.Table, keys: list[str]) -> dict[str, Row]:
        """Added columns by key of all rows that are finished once the batch's outcome is on disk."""
        digest = batch_digest(keys)
        part = self.store.part(self.stage.name, digest)
        if part.exists():  # the same batch again: its outcome was written, only the answer got lost
            return {row[self.step.key]: row for row in pq.read_table(part, partitioning=None).to_pylist()}
        if judged := self._failed_before(digest):
            # A worker died between writing the batch's failures and its finished rows: only those are owed.
            rest = [i for i, key in enumerate(keys) if key not in judged]
            return self._checkpointed(batch.take(rest), [keys[i] for i in rest]) if rest else {}
        return self._tried(batch, keys, digest, self.store.begin_try(self.stage.name, digest))

    def _failed_before(self, digest: str) -> set[str]:
        part = self.store.part("failures", f"{self.stage.name}-{digest}")
        if not part.exists():
            return set()
        return set(pq.read_table(part, columns=[self.step.key], partitioning=None)[self.step.key].to_pylist())

    def _tried(self, batch: pa.Table, keys: list[str], digest: str, deaths: int) -> dict[str, Row]:
        self.report(Event(self.stage.name, digest, began=len(keys)))
        started = time.perf_counter()
        outcome = self._outcome(batch, keys, digest, deaths)
        seconds = time.perf_counter() - started
        if outcome is not None:
            self._publish(batch, keys, digest, outcome, seconds)
            self.store.end_try(self.stage.name, digest)
            return outcome.added
        self.report(Event(self.stage.name, digest, ended=True))
        # The try stays open: should this batch be delivered again, it must be taken apart again and read back.
        added: dict[str, Row] = {}
        for i, key in enumerate(keys):
            added |= self._checkpointed(batch.slice(i, 1), [key])
        return added

    def _outcome(self, batch: pa.Table, keys: list[str], digest: str, deaths: int) -> Outcome | None:
        """Try the batch; None where its rows must be tried alone: it raised, or has killed a worker before."""
        rows = rows_of(batch, self.stage, self.spec.run_seed)
        if len(rows) > 1 and deaths:
            return None
        if deaths >= self.spec.max_deaths:
            return Outcome(failures=[self._set_aside(rows[0], digest, deaths)])
        try:
            return self._judge(rows, self._process(rows, digest))
        except Exception as error:  # a model may raise anything; the traceback is kept with the row
            _leave_if_broken(error)
            return None if len(rows) > 1 else Outcome(failures=[self._failure(rows[0], error)])

    def _publish(self, batch: pa.Table, keys: list[str], digest: str, outcome: Outcome, seconds: float) -> None:
        if outcome.failures:  # first, so that a batch whose part exists is complete
            self.store.publish_table("failures", f"{self.stage.name}-{digest}", failures_table(outcome.failures))
        stored = self._stored(batch, keys, outcome, seconds)
        self.store.publish_table(self.stage.name, digest, stored, self.spec.fingerprint)
        done, failed = len(outcome.added), len(outcome.failures)
        self._note("end", keys, done=done, failed=failed, seconds=round(seconds, 4))
        self.report(Event(self.stage.name, digest, done=done, failed=failed, seconds=seconds, ended=True))

    def _process(self, rows: list[Row], digest: str) -> Sequence[Row | RowError]:
        self._note("begin", [row[self.step.key] for row in rows])
        with time_limit(self._stack_file(digest), self.stage.resources().time_limit_s * len(rows)):
            results = self.stage.process(rows)
        if len(results) != len(rows):
            raise TypeError(f"{self.stage.name}.process got {len(rows)} rows and gave {len(results)} back")
        return results

    def _stack_file(self, digest: str) -> Path:
        return self.store.session_dir / "journal" / f"{self.stage.name}-{digest}.stack"

    def _set_aside(self, row: Row, digest: str, deaths: int) -> dict[str, Any]:
        """The failure of a row that took its worker down too often, with where it hung if that is what it did."""
        stack = self._stack_file(digest)
        hung = stack.read_text(errors="replace") if stack.exists() else ""
        if hung:
            limit = f"{self.stage.name}.pool.time_limit_s"
            why = f"the row took longer than {limit} {deaths} times; raise that if it may, else look at the traceback"
            return self._failure(row, RowError("timeout", why)) | {"traceback": hung}
        why = f"processing this row ended its worker process {deaths} times; it is set aside"
        return self._failure(row, RowError("worker_died", why))

    def _judge(self, rows: list[Row], results: Sequence[Row | RowError]) -> Outcome:
        outcome = Outcome()
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, RowError):
                outcome.failures.append(self._failure(row, result))
            else:
                outcome.added[row[self.step.key]] = self._complete(result)
        return outcome

    def _complete(self, result: Row) -> Row:
        """Check a result against the schema now, while it is known which row it belongs to."""
        columns = self.step.table.columns
        if missing := [c for c, f in columns.items() if result.get(c) is None and not f.nullable]:
            raise TypeError(f"{self.stage.name}.process left out {', '.join(missing)}")
        if unknown := [c for c in result if c not in columns]:
            raise TypeError(f"{self.stage.name}.process gave {', '.join(unknown)}, which its schema does not have")
        return {column: pa.scalar(result.get(column), type=f.type).as_py() for column, f in columns.items()}

    # -- rows in and out -----------------------------------------------------------------------------------------

    def _stored(self, batch: pa.Table, keys: list[str], outcome: Outcome, seconds: float) -> pa.Table:
        identities = batch["identity_id"].to_pylist()
        rows = []
        for key, identity in zip(keys, identities, strict=True):
            if key in outcome.added:
                seed = row_seed(self.spec.run_seed, key, self.stage.name)
                extra = {"identity_id": identity, self.step.key: key, "seed": seed, "seconds": seconds / len(keys)}
                rows.append({**outcome.added[key], **extra})
        return pa.Table.from_pylist(rows, schema=self.stored)

    def _leaving(self, passed: pa.Table, added: list[Row]) -> pa.Table:
        """Rows for the next stage: what it and its successors need, one per sample where the grain changes."""
        columns: dict[str, Any] = {name: passed[name] for name in passed.column_names}
        columns[ATTEMPT] = pa.array([1] * passed.num_rows, pa.int32())
        for name in self.step.leaving.names:
            if name in self.step.table.columns:
                columns[name] = pa.array([row[name] for row in added], self.step.leaving.field(name).type)
        table = pa.table([columns[n] for n in self.step.leaving.names], schema=self.step.leaving)
        return explode(table, self.step.passing) if self.step.explodes else table

    def _failure(self, row: Row, error: BaseException) -> dict[str, Any]:
        known = isinstance(error, RowError)
        trace = "".join(traceback.format_exception(error))
        return {
            "stage": self.stage.name,
            "identity_id": row["identity_id"],
            "sample_id": row.get("sample_id"),
            "kind": error.kind if isinstance(error, RowError) else "error",
            "message": _text(error.message if isinstance(error, RowError) else f"{type(error).__name__}: {error}"),
            "traceback": _text(trace) if not known or error.__cause__ else None,
            "where": None,
            "attempt": row[ATTEMPT],
            "failed_at": datetime.now(UTC),
        }

    def _note(self, event: str, keys: Iterable[str], **values: Any) -> None:
        self.journal.write(json.dumps({"t": time.time(), "event": event, "keys": list(keys), **values}) + "\n")


def _text(words: str) -> str:
    """Words that Parquet can hold: lone surrogates, which Python allows, become question marks."""
    return words.encode("utf-8", "replace").decode()


def _leave_if_broken(error: Exception) -> None:
    """End this process where its CUDA context is lost: every later row would fail in it. The try counts as a death."""
    words = str(error)
    if type(error).__name__ == "AcceleratorError" or ("CUDA error" in words and "out of memory" not in words):
        traceback.print_exc()
        os._exit(1)


@contextmanager
def time_limit(stack: Path, seconds: float) -> Iterator[None]:
    """End this process if the block takes longer than `seconds` (0: no limit), leaving its Python stacks in a file.

    The watch is faulthandler's own C thread, so that it also ends code that hangs while it holds the interpreter.
    """
    if not seconds:
        yield
        return
    with stack.open("w") as file:
        faulthandler.dump_traceback_later(seconds, exit=True, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            stack.unlink()


def rows_of(batch: pa.Table, stage: Stage, run_seed: int) -> list[Row]:
    """The rows as `stage.process` wants them: keys, needed columns, how often each was tried, and each one's seed."""
    keys = [name for name in ("identity_id", "sample_id", "prompt_id") if name in batch.column_names]
    columns = [name for name in batch.column_names if name in stage.needs and name not in keys]
    rows: list[Row] = batch.select([*keys, *columns, ATTEMPT]).to_pylist()
    for row in rows:
        row["seed"] = row_seed(run_seed, row.get("sample_id") or row["identity_id"], stage.name)
    return rows


def explode(table: pa.Table, into: pa.Schema) -> pa.Table:
    """Identity rows to sample rows of schema `into`: each sample gets its identity's columns."""
    lists = table[SAMPLES].combine_chunks()
    samples = pc.list_flatten(lists)
    identity = table.drop_columns([SAMPLES]).take(pc.list_parent_indices(lists))
    columns = {name: identity[name] for name in identity.column_names}
    columns |= {samples.type.field(i).name: samples.field(i) for i in range(samples.type.num_fields)}
    return pa.table([columns[name] for name in into.names], names=into.names).cast(into)
