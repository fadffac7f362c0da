"""Batches for one model from the work of many rows that are each at another point of theirs. Knows no model.

What has to be done for a row is written as a *procedure*: a generator that yields the jobs it needs done, is sent their
results and returns what it made of them. Jobs of all rows, whichever threads they came from, wait in one place, and a
thread of the batcher's own runs them in batches of like jobs. A row that asks again is thereby served beside rows that
have just begun.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Job = tuple[Hashable, Any]
"""What is to be done, and how: only jobs whose first part is equal can share a batch."""

Procedure = Generator[Sequence[Job], list[Any], Result]

PATIENCE = 3
"""How many batches of other jobs may be run before a job that waits for company is run with what company it has."""


class BatcherEndedError(RuntimeError):
    """A job for a batcher whose thread has ended."""


@dataclass(eq=False)
class _Row:
    procedure: Procedure[Any]
    inbox: queue.SimpleQueue[_Row]
    results: list[Any] = field(default_factory=list)
    error: BaseException | None = None
    open: int = 0
    end: Any = None


@dataclass(eq=False)
class _Waiting:
    number: int
    row: _Row
    place: int
    key: Hashable
    job: Any
    passed_over: int = 0


class Batcher:
    """Runs procedures; `work` may be called from several threads at a time.

    Args:
        run: (key, jobs) to their results, in order. Called from one thread only. Where it raises for several jobs, the
            halves are tried apart, so that a guilty job fails alone. Where both halves then work, the batch was too
            large (for the memory, it may be supposed), and later ones of that key are no larger than a half.
        size: jobs in a batch at most.
        linger_s: how long an incomplete batch waits for rows that are at work elsewhere (they read or write a picture)
            and may soon have a job for it.
    """

    def __init__(self, run: Callable[[Any, Sequence[Any]], Sequence[Any]], size: int, linger_s: float = 0.25) -> None:
        self._run = run
        self._size = size
        self._fitting: dict[Hashable, int] = {}
        self._linger_s = linger_s
        self._changed = threading.Condition()
        self._waiting: list[_Waiting] = []
        self._numbers = itertools.count()
        self._at_work = 0  # rows that are neither waiting for a result nor at their end
        self._closed = False
        self._ended: str | None = None  # why the thread serves no more
        self._running: set[_Waiting] = set()  # of the batch in work, those without a result
        self._thread = threading.Thread(target=self._serve, name="batcher", daemon=True)
        self._thread.start()

    def work(self, procedures: Sequence[Procedure[Result]]) -> list[Result | Exception]:
        """Run procedures to their ends.

        Returns:
            What each returned, in order, or the exception that it ended with. An exception of `run` is raised inside
            the procedure, where it waits for its results; so is BatcherEndedError where the thread has ended.

        Raises:
            BatcherEndedError: after `close`.
        """
        inbox: queue.SimpleQueue[_Row] = queue.SimpleQueue()
        rows = [_Row(procedure, inbox) for procedure in procedures]
        with self._changed:
            if self._closed:
                raise BatcherEndedError("the batcher was closed; make a new one")
            self._at_work += len(rows)
        unfinished = 0
        for row in rows:
            unfinished += self._forward(row, first=True)
        while unfinished:
            unfinished -= not self._forward(inbox.get())
        return [row.end for row in rows]

    def close(self) -> None:
        """End the thread once nothing waits any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    # -- rows --------------------------------------------------------------------------------------------------------

    def _forward(self, row: _Row, first: bool = False) -> bool:
        """Send a row its results and take its next jobs; False where it came to its end instead."""
        try:
            jobs: Sequence[Job] = []
            while not jobs:  # asking for nothing is answered at once
                jobs = self._next(row, first)
                first, row.results, row.error = False, [], None
        except StopIteration as stop:
            row.end = stop.value
        except Exception as error:
            row.end = error
        else:
            self._submit(row, jobs)
            return True
        with self._changed:
            self._at_work -= 1
            self._changed.notify_all()
        return False

    def _next(self, row: _Row, first: bool) -> Sequence[Job]:
        if first:
            return next(row.procedure)
        if row.error is not None:
            return row.procedure.throw(row.error)
        return row.procedure.send(row.results)

    def _submit(self, row: _Row, jobs: Sequence[Job]) -> None:
        row.results, row.open = [None] * len(jobs), len(jobs)
        with self._changed:
            if self._ended is not None:
                row.error = BatcherEndedError(self._ended)
                row.inbox.put(row)
                return
            for place, (key, job) in enumerate(jobs):
                self._waiting.append(_Waiting(next(self._numbers), row, place, key, job))
            self._at_work -= 1
            self._changed.notify_all()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        ended = "the batcher was closed before this job's turn"
        try:
            while batch := self._next_batch():
                self._running = set(batch)
                self._try(batch)
        except BaseException as error:  # SystemExit too: whoever waits must hear of it
            ended = f"the batcher's thread ended with {error!r}"
            log.exception("the batcher's thread ends; whoever waits or asks later gets an error")
        with self._changed:
            self._ended = ended
            left, self._waiting = [*self._running, *self._waiting], []
        for each in left:
            self._deliver(each, None, BatcherEndedError(ended))

    def _next_batch(self) -> list[_Waiting]:
        """The next batch's jobs, [] after `close`."""
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return []
                self._changed.wait()
            self._changed.wait_for(lambda: self._full() or not self._at_work or self._closed, self._linger_s)
            batch = self._chosen()
            taken = set(map(id, batch))
            self._waiting = [each for each in self._waiting if id(each) not in taken]
            for each in self._waiting:
                each.passed_over += each.key != batch[0].key
            return batch

    def _groups(self) -> list[list[_Waiting]]:
        groups: dict[Hashable, list[_Waiting]] = {}
        for each in self._waiting:
            groups.setdefault(each.key, []).append(each)
        return list(groups.values())

    def _full(self) -> bool:
        return any(len(group) >= self._most(group) for group in self._groups())

    def _most(self, group: list[_Waiting]) -> int:
        return self._fitting.get(group[0].key, self._size)

    def _chosen(self) -> list[_Waiting]:
        """The group that was passed over too often, else the largest; of equals, the one that waits longest."""
        groups = self._groups()
        late = [group for group in groups if group[0].passed_over >= PATIENCE]
        best = max(late or groups, key=lambda group: (0 if late else min(len(group), self._size), -group[0].number))
        return best[: self._most(best)]

    def _try(self, batch: list[_Waiting]) -> bool:
        """Run a batch, or in halves what fails as a whole; whether every job got its result."""
        try:
            results = self._run(batch[0].key, [each.job for each in batch])
            if len(results) != len(batch):
                raise ValueError(f"{len(results)} results came back for {len(batch)} jobs")
        except Exception as error:
            alone = error if len(batch) == 1 else None
        else:
            for each, result in zip(batch, results, strict=True):
                self._deliver(each, result, None)
            return True
        if alone is not None:
            self._deliver(batch[0], None, alone)
            return False
        # Out of the except clause: while its error lives, so does all that the failed call held in the GPU's memory.
        half = len(batch) // 2
        worked = [self._try(batch[:half]), self._try(batch[half:])]
        if all(worked):
            key = batch[0].key
            self._fitting[key] = min(half, self._fitting.get(key, half))
            log.warning("batches of %d fail where halves do not; from now on %d for %s", len(batch), half, key)
        return all(worked)

    def _deliver(self, each: _Waiting, result: Any, error: BaseException | None) -> None:
        self._running.discard(each)
        row = each.row
        row.results[each.place] = result
        row.error = row.error or error
        row.open -= 1
        if not row.open:
            with self._changed:
                self._at_work += 1
            row.inbox.put(row)
