"""One worker of a stage: batch in, checkpoint written, batch out. Everything but the stage's own work, and no Ray.

What holds for every batch, whatever dies in between:
- a row's outcome is in a part file, of its stage or of the failures, before the row moves on;
- a batch that comes again (its worker or its node died, or Ray repeats a task) is read back as far as it was finished;
- an exception fails the one row that raises it, as each row of the batch is then tried alone;
- a row that took its worker process down `max_deaths` times, or hung as often, is set aside as a failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from ipvg_ray import tables
from ipvg_ray.errors import UserError
from ipvg_ray.pipeline.deaths import Death, LastWords, inquest
from ipvg_ray.pipeline.ledger import Event, Ledger, Who
from ipvg_ray.pipeline.plan import ATTEMPT, QUEUED, SAMPLES, Step
from ipvg_ray.pipeline.scratch import RunScratch, owner_of
from ipvg_ray.pipeline.stage import Group, Row, RowError, Stage, StageContext, WorkerBrokenError
from ipvg_ray.pipeline.staging import node_age, take_models
from ipvg_ray.pipeline.store import FencedError, Store, batch_digest, failures_table, row_seeds
from ipvg_ray.pipeline.turns import Turns
from ipvg_ray.secrets import redact
from ipvg_ray.storage import StorageError

if TYPE_CHECKING:
    from ipvg_ray.pipeline.traces import Tracer, Traces

_KEYS = ("identity_id", "sample_id", "prompt_id")
_BROKEN = re.compile(r"CUDA error|CUDA failure|cuDNN error|CUDNN_STATUS|CUBLAS_STATUS|illegal memory access")
"""How torch and onnxruntime tell that a CUDA context may be lost; a card that is only full is not."""
_FULL = re.compile(r"out of memory|Failed to allocate memory|ALLOC_FAILED")


class WorkerStartError(UserError):
    """A stage's worker cannot start; the run cannot go on."""


class Ranked(Group, Protocol):
    """A group whose ranks can be started."""

    def start(self) -> None:
        """Make the ranks, which load their models. Raises what they raise."""
        ...


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker needs to be made on another machine."""

    step: Step
    store: Store
    run_seed: int
    fingerprint: str
    max_deaths: int = 3
    traces: Traces | None = None


@dataclass(frozen=True)
class Outcome:
    """Finished rows of a batch, as the stage's table stores them, and failure rows."""

    finished: pa.Table
    failures: list[dict[str, Any]]


class Worker:
    """Wraps one stage in one process. Several threads may call it at once, if the stage's `process` may be called so.

    Args:
        spec: what to run, and into which run directory.
        device: where the stage's models go, `cpu` or `cuda`.
        ledger: where tries are noted ahead, and their ends.
        who: this process, as the ledger knows it.
        last_words: what this process leaves when it dies, and ends it when a row takes too long; without it no time
            limit holds.
        group: the ranks that it leads, if any.
        gpus: ids of the cards that it was given, for traces.

    Raises:
        WorkerStartError: where `setup` raises, or has taken its process down `max_deaths` times.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        device: str,
        ledger: Ledger,
        who: Who,
        last_words: LastWords | None = None,
        group: Ranked | None = None,
        gpus: Sequence[str] = (),
    ) -> None:
        self.spec = spec
        self.step = spec.step
        self.stage = spec.step.stage
        self.store = spec.store
        self.ledger = ledger
        self.who = who
        self.fresh = True
        self.last_words = last_words
        self.turns = Turns() if spec.step.stage.resources().concurrency > 1 else None
        self.stored = tables.stored_schema(self.step.table)
        if not self.store.is_open():
            where = f"{self.store.run_dir} is not seen on {os.uname().nodename}, or another start has taken it over"
            raise WorkerStartError(f"{where}; put run directory and models on storage that all nodes share")
        self.journal = Journal(self.store, self.stage.name)
        self.tracer = _tracer(spec, who, gpus)
        self._setup(device, group)

    def _setup(self, device: str, group: Ranked | None) -> None:
        name, asks = self.stage.name, self.stage.resources()
        died, restarts = self.ledger.begin_setup(name, self.who)
        if len(died) >= self.spec.max_deaths:
            death = self._inquest(died[-1])
            raise WorkerStartError(
                f"starting {name} killed its process {len(died)} times: {death.words}\n{death.stack}"
            )
        # Each worker may at the same time be held up by a row that kills it in its batch, beside others, and alone.
        if restarts > 2 * (self.spec.max_deaths + 1) * asks.max_workers * asks.concurrency:
            raise WorkerStartError(f"{name}'s workers died {restarts} times without one batch coming to an end")
        try:
            take_models([self.stage])
            if group:
                group.start()
            scratch = RunScratch(self.store, owner_of(name, self.spec.fingerprint))
            run_dir = str(self.store.run_dir)
            self.stage.setup(StageContext(device, asks.threads, self.store, run_dir, scratch, group))
        except StorageError:
            raise  # may pass
        except Exception as error:
            raise WorkerStartError(f"{name} cannot start: {error}") from error
        finally:
            self.ledger.end_setup(name, self.who)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Run a batch of schema `step.arriving`; returns the finished rows as the next stage wants them."""
        keys: list[str] = batch[self.step.key].to_pylist()
        # Rows that are not begun because the run is to stop stay undone, and are done by the next start.
        begun = keys and not self.store.stopping()
        return self._leaving(batch, self._checkpointed(batch, keys) if begun else self.stored.empty_table())

    # -- one batch -----------------------------------------------------------------------------------------------

    def _checkpointed(self, batch: pa.Table, keys: list[str], mates: int = 0) -> pa.Table:
        """The rows that are finished once the batch's outcome is on disk, as stored; `mates` were taken from it."""
        digest = batch_digest(keys)
        over = Event(self.stage.name, digest, ended=True)  # told for a worker that died before it could
        with contextlib.suppress(FileNotFoundError):
            # The same batch again: its outcome was written, only the answer got lost, or what became of it.
            finished = tables.read_part(self.store.part(self.stage.name, digest)).select(self.stored.names)
            self.ledger.end(over)
            return finished
        if judged := self._failed_before(digest):
            # A worker died between writing the batch's failures and its finished rows: only those are owed.
            self.ledger.end(over)
            rest = [i for i, key in enumerate(keys) if key not in judged]
            return self._checkpointed(batch.take(rest), [keys[i] for i in rest]) if rest else self.stored.empty_table()
        died = self._begin(digest, len(keys), alone=not self.turns)
        return self._tried(batch, keys, digest, died, mates)

    def _begin(self, digest: str, rows: int, alone: bool) -> list[Who]:
        age, self.fresh = node_age() if self.fresh else 0.0, False
        event = Event(
            self.stage.name, digest, began=rows, alone=alone, at=time.time(), node=self.who.node, node_age=age
        )
        return self.ledger.begin(event, self.who)

    def _failed_before(self, digest: str) -> set[str]:
        try:
            part = tables.read_part(self.store.part("failures", f"{self.stage.name}-{digest}"), [self.step.key])
        except FileNotFoundError:
            return set()
        return set(part[self.step.key].to_pylist())

    def _tried(self, batch: pa.Table, keys: list[str], digest: str, died: list[Who], mates: int) -> pa.Table:
        """Finish a batch, as a whole or row by row; `mates` rows of the batch that it was taken from run without it."""
        started, begun = time.perf_counter(), time.time()
        if self.tracer and died:
            self.tracer.died(batch, died[-1])
        apart = len(keys) > 1 and (bool(died) or self.store.was_taken_apart(self.stage.name, digest))
        outcome = None if apart else self._outcome(batch, digest, died, mates)
        if outcome is not None:
            self._publish(keys, digest, outcome, time.perf_counter() - started)
            if self.tracer:
                self.tracer.ended(batch, outcome.failures, begun, waited=not (died or mates))
            return outcome.finished
        if self.tracer and not apart:
            self.tracer.ended(batch, [], begun, waited=True, apart=True)
        # Delivered again, for whatever reason, it must be taken apart again and read back row by row.
        self.store.take_apart(self.stage.name, digest)
        self.ledger.end(Event(self.stage.name, digest, ended=True))
        alone = [self._checkpointed(batch.slice(i, 1), [key], len(keys) - 1) for i, key in enumerate(keys)]
        return pa.concat_tables(table.replace_schema_metadata() for table in alone)

    def _outcome(self, batch: pa.Table, digest: str, died: list[Who], mates: int) -> Outcome | None:
        """Try the batch; None where its rows must be tried alone, because it raised."""
        with self._turn(digest, died):
            guilty = [who for who in died if who.alone]
            if len(guilty) >= self.spec.max_deaths:
                return Outcome(self.stored.empty_table(), [self._set_aside(batch, guilty, mates)])
            try:
                seeded = with_seeds(batch, self.stage, self.spec.run_seed)
                return self._judge(seeded, *self._process(rows_of(seeded, self.stage)))
            except (StorageError, FencedError):
                raise  # the run's place cannot be written, which is no row's fault
            except Exception as error:  # a model may raise anything; the traceback is kept with the row
                self._leave_if_broken(error)
                alone = batch.num_rows == 1
                return Outcome(self.stored.empty_table(), [self._failure(batch, 0, error)]) if alone else None

    @contextlib.contextmanager
    def _turn(self, digest: str, died: list[Who]) -> Iterator[None]:
        """Beside other batches, where the worker has several in work; a row that may kill waits until it is alone."""
        if not self.turns:
            yield
        elif died:
            with self.turns.alone():
                self._begin(digest, 1, alone=True)
                yield
        else:
            with self.turns.shared():
                yield

    def _publish(self, keys: list[str], digest: str, outcome: Outcome, seconds: float) -> None:
        if outcome.failures:  # first, so that a batch whose part exists is complete
            self.store.publish_table("failures", f"{self.stage.name}-{digest}", failures_table(outcome.failures))
        self.store.publish_table(self.stage.name, digest, outcome.finished, self.spec.fingerprint)
        done, failed = outcome.finished.num_rows, len(outcome.failures)
        self.journal.note("end", keys, done=done, failed=failed, seconds=round(seconds, 4))
        ended = Event(self.stage.name, digest, ended=True, closed=True, done=done, failed=failed, seconds=seconds)
        self.ledger.end(ended)

    def _process(self, rows: list[Row]) -> tuple[Sequence[Row | RowError], float]:
        """What the stage makes of the rows, and the seconds it took."""
        key = self.step.key
        self.journal.note("begin", [row[key] for row in rows])
        started = time.perf_counter()
        limit = self.stage.resources().time_limit_s * len(rows)
        with self.last_words.time_limit(limit) if self.last_words else contextlib.nullcontext():
            results = self.stage.process(rows)
        if len(results) != len(rows):
            raise TypeError(f"{self.stage.name}.process got {len(rows)} rows and gave {len(results)} back")
        return results, time.perf_counter() - started

    def _set_aside(self, batch: pa.Table, died: list[Who], mates: int) -> dict[str, Any]:
        """The failure of a batch's only row, which took its worker down too often, with all that is known of how."""
        deaths = [self._inquest(who) for who in died]
        last = next((death for death in reversed(deaths) if death.stack), deaths[-1])
        cleared = f"; the {mates} rows it came with are run without it" if mates else ""
        if last.hung:
            why = f"the row took longer than {self.stage.name}.pool.time_limit_s {len(died)} times{cleared}; "
            error = RowError("timeout", f"{why}raise that if it may, else look at the traceback")
        else:
            why = f"processing this row ended its worker process {len(died)} times ({last.words}){cleared}; "
            error = RowError("worker_died", f"{why}it is set aside")
        return self._failure(batch, 0, error) | {"traceback": _text(last.stack) if last.stack else None}

    def _inquest(self, who: Who) -> Death:
        return inquest(who, self.who.host, self.store.session_dir / "traces")

    def _judge(self, batch: pa.Table, results: Sequence[Row | RowError], seconds: float) -> Outcome:
        """Part results from failures, and check the results against the schema while it is known whose they are."""
        failures = [self._failure(batch, i, r) for i, r in enumerate(results) if isinstance(r, RowError)]
        share = seconds / batch.num_rows
        if failures:
            kept = [i for i, result in enumerate(results) if not isinstance(result, RowError)]
            batch = batch.take(pa.array(kept, pa.int64()))  # may be none
            results = [result for result in results if not isinstance(result, RowError)]
        columns = self.step.table.columns
        if unknown := set().union(*results) - columns.keys():  # type: ignore[arg-type]
            gave = ", ".join(sorted(unknown))
            raise TypeError(f"{self.stage.name}.process gave {gave}, which its schema does not have")
        added = pa.Table.from_pylist(results, schema=pa.schema(list(columns.values())))
        if missing := [c for c, f in columns.items() if not f.nullable and added[c].null_count]:
            raise TypeError(f"{self.stage.name}.process left out {', '.join(missing)}")
        values = {"seconds": pa.repeat(share, len(results))}
        values |= {name: batch[name] for name in batch.column_names} | {name: added[name] for name in columns}
        finished = pa.table([values[name] for name in self.stored.names], names=self.stored.names)
        return Outcome(finished.cast(self.stored), failures)

    def _leave_if_broken(self, error: BaseException) -> None:
        """End this process where every later row would fail in it too. Counts as a death."""
        if isinstance(error, WorkerBrokenError) or context_lost(error):
            traceback.print_exc()
            if self.last_words:
                self.last_words.leave(1, traceback.format_exc())
            os._exit(1)

    # -- rows in and out -----------------------------------------------------------------------------------------

    def _leaving(self, batch: pa.Table, finished: pa.Table) -> pa.Table:
        """Rows for the next stage: what it and its successors need, one per sample where the grain changes."""
        keys = batch[self.step.key]
        whole = finished[self.step.key].equals(keys)
        passed = batch if whole else batch.take(pc.index_in(finished[self.step.key], value_set=keys.combine_chunks()))
        columns: dict[str, Any] = {name: passed[name] for name in passed.column_names}
        columns[ATTEMPT] = pa.repeat(pa.scalar(1, pa.int32()), passed.num_rows)
        columns[QUEUED] = pa.repeat(time.time(), passed.num_rows)
        columns |= {name: finished[name] for name in self.step.leaving.names if name in self.step.table.columns}
        table = pa.table([columns[n] for n in self.step.leaving.names], names=self.step.leaving.names)
        table = table.cast(self.step.leaving)
        return explode(table, self.step.passing) if self.step.explodes else table

    def _failure(self, batch: pa.Table, place: int, error: BaseException) -> dict[str, Any]:
        """A row of the failures table, of the row at `place` of a batch."""
        (row,) = batch.slice(place, 1).select([n for n in (*_KEYS, ATTEMPT) if n in batch.column_names]).to_pylist()
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


def _tracer(spec: WorkerSpec, who: Who, gpus: Sequence[str]) -> Tracer | None:
    """What traces a worker's rows, where that is asked for. Raises WorkerStartError."""
    if spec.traces is None:
        return None
    try:
        from ipvg_ray.pipeline.traces import Tracer  # only where they are wanted

        return Tracer(spec.traces, spec.step, spec.store, who, gpus)
    except UserError as error:
        raise WorkerStartError(str(error)) from error
    except Exception as error:  # OpenTelemetry refuses settings of its own in many ways
        raise WorkerStartError(
            f"{spec.step.name} cannot trace its rows: {type(error).__name__}: {error}; look at the OTEL_ variables, or "
            "set traces to false"
        ) from error


class Journal:
    """What a worker began and ended, one line of JSON each, for people and tests; only where the run lies on disk."""

    def __init__(self, store: Store, stage: str) -> None:
        self.file = None
        self.lock = threading.Lock()
        folder = store.session_dir / "journal"
        if isinstance(folder, Path):
            self.file = (folder / f"{stage}-{os.uname().nodename}-{os.getpid()}.jsonl").open("a", buffering=1)

    def note(self, event: str, keys: Sequence[str], **values: Any) -> None:
        """Write one line."""
        if self.file is not None:
            with self.lock:
                self.file.write(json.dumps({"t": time.time(), "event": event, "keys": list(keys), **values}) + "\n")


def _text(words: str) -> str:
    """Words that Parquet can hold and anybody may read: lone surrogates become question marks, secrets are cut out."""
    return redact(words.encode("utf-8", "replace").decode())


def context_lost(error: BaseException) -> bool:
    """Whether an error says that the process's CUDA context is gone; a card that is only full still works."""
    words = str(error)
    return type(error).__name__ == "AcceleratorError" or bool(_BROKEN.search(words) and not _FULL.search(words))


def with_seeds(batch: pa.Table, stage: Stage, run_seed: int) -> pa.Table:
    """A batch with each row's own seed for a stage."""
    key = "sample_id" if "sample_id" in batch.column_names else "identity_id"
    seeds = row_seeds(run_seed, batch[key].to_pylist(), stage.name)
    return batch.append_column("seed", pa.array(seeds, pa.int64()))


def rows_of(seeded: pa.Table, stage: Stage) -> list[Row]:
    """The rows as `stage.process` wants them: keys, needed columns and seed."""
    wanted = {*_KEYS, *stage.needs, "seed"}
    rows: list[Row] = seeded.select([name for name in seeded.column_names if name in wanted]).to_pylist()
    return rows


def explode(table: pa.Table, into: pa.Schema) -> pa.Table:
    """Identity rows to sample rows of schema `into`: each sample gets its identity's columns."""
    # One at a time: Arrow copies at most 2 GiB of pictures into one array.
    return pa.concat_tables([into.empty_table(), *(_exploded(table.slice(i, 1), into) for i in range(len(table)))])


def _exploded(table: pa.Table, into: pa.Schema) -> pa.Table:
    lists = table[SAMPLES].combine_chunks()
    samples = pc.list_flatten(lists)
    identity = table.drop_columns([SAMPLES]).take(pc.list_parent_indices(lists))
    columns = {name: identity[name] for name in identity.column_names}
    columns |= {samples.type.field(i).name: samples.field(i) for i in range(samples.type.num_fields)}
    return pa.table([columns[name] for name in into.names], names=into.names).cast(into)
