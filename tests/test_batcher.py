"""Batches from the work of many rows: who shares one, who waits for whom, and how failures stay apart."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ipvg_ray.models.batcher import PATIENCE, Batcher, Procedure


class Machine:
    """Doubles numbers and notes its batches; 13 breaks it, and more than `most` at a time are too many."""

    def __init__(self, most: int = 100) -> None:
        self.batches: list[tuple[Any, list[int]]] = []
        self.most = most
        self.calls: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()

    def __call__(self, key: Any, jobs: list[int]) -> list[int]:
        self.begun.set()
        self.gate.wait(10)
        self.calls.append(len(jobs))
        if 13 in jobs or len(jobs) > self.most:
            raise RuntimeError("broken")
        self.batches.append((key, list(jobs)))
        return [2 * job for job in jobs]

    def sizes(self) -> list[int]:
        return [len(jobs) for _, jobs in self.batches]


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def batcher(machine: Machine) -> Iterator[Batcher]:
    made = Batcher(machine, size=4, linger_s=5)
    yield made
    machine.gate.set()
    made.close()
    assert not made._thread.is_alive()


def asking(*numbers: int, key: str = "k") -> Procedure[list[int]]:
    """A row that asks for one number after another."""
    results = []
    for number in numbers:
        results += yield [(key, number)]
    return results


def test_rows_of_one_call_share_batches_and_get_their_own_results(batcher, machine):
    ends = batcher.work([asking(i) for i in range(6)])
    assert ends == [[0], [2], [4], [6], [8], [10]]
    assert machine.sizes() == [4, 2]


def test_a_row_that_asks_again_is_served_beside_new_rows(batcher, machine):
    """Two calls at a time: the stubborn rows of the first go on in the batches of the second."""
    machine.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(batcher.work, [asking(1), asking(2), asking(3, 30, 31), asking(4, 40)])
        second = pool.submit(batcher.work, [asking(i) for i in range(5, 11)])
        while len(batcher._waiting) < 6:
            time.sleep(0.01)
        machine.gate.set()
        assert first.result()[2:] == [[6, 60, 62], [8, 80]]
        assert second.result() == [[2 * i] for i in range(5, 11)]
    assert sorted(machine.sizes()) == [1, 4, 4, 4]  # one call after the other would take 4, 2, 1, 4 and 2
    assert any({30, 40} <= set(jobs) and set(range(5, 11)) & set(jobs) for _, jobs in machine.batches)


def test_several_jobs_at_once_are_one_answer(batcher, machine):
    def faces() -> Procedure[list[int]]:
        return (yield [("k", 1), ("other", 2), ("k", 3)])

    assert batcher.work([faces()]) == [[2, 4, 6]]
    assert sorted(machine.batches) == [("k", [1, 3]), ("other", [2])]


def test_asking_for_nothing_is_answered(batcher, machine):
    def row() -> Procedure[int]:
        nothing = yield []
        (one,) = yield [("k", 1)]
        return one + len(nothing)

    assert batcher.work([row()]) == [2]
    assert batcher.work([]) == []


def test_an_incomplete_batch_waits_for_rows_at_work_and_no_longer(machine):
    """The second row reads a picture for a while: the first one's job waits for it, but for no row that is done."""
    batcher = Batcher(machine, size=4, linger_s=60)

    def slow() -> Procedure[list[int]]:
        machine.begun.wait(0.2)  # passes only where the first row's job is not waited with
        return (yield [("k", 9)])

    with ThreadPoolExecutor(1) as pool:
        ends = pool.submit(batcher.work, [asking(1), slow()])
        assert machine.begun.wait(30), "it waits on, though no row is at work"
        assert ends.result() == [[2], [18]]
    assert machine.batches == [("k", [1, 9])]
    batcher.close()


def test_lingering_has_an_end(machine):
    batcher = Batcher(machine, size=4, linger_s=0.1)
    at_work, answered = threading.Event(), threading.Event()
    events = []

    def busy() -> Procedure[int]:
        at_work.set()
        answered.wait(30)
        events.append("the busy row ends")
        return 0
        yield

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(batcher.work, [busy()])
        at_work.wait(30)
        assert batcher.work([asking(1)]) == [[2]]
        events.append("the other is answered")
        answered.set()
        other.result()
    assert events == ["the other is answered", "the busy row ends"]
    batcher.close()


def test_a_lonely_job_is_passed_over_only_so_often(batcher, machine):
    """Full batches come first, but a face of an odd size must not wait for the end of the run."""
    machine.gate.clear()
    rows = [asking(100 + i) for i in range(40)] + [asking(99, key="odd")]
    with ThreadPoolExecutor(1) as pool:
        ends = pool.submit(batcher.work, rows)
        while len(batcher._waiting) < 37:
            time.sleep(0.01)
        machine.gate.set()
        ends.result()
    assert 1 <= machine.batches.index(("odd", [99])) <= PATIENCE + 1


def test_a_guilty_job_fails_alone(batcher, machine):
    ends = batcher.work([asking(i) for i in (1, 2, 13, 4)])
    batcher.work([asking(i) for i in range(4)])
    assert machine.sizes()[-1] == 4  # it was not the size
    assert [end for end in ends if not isinstance(end, Exception)] == [[2], [4], [8]]
    assert isinstance(ends[2], RuntimeError)


def test_batches_that_are_too_large_are_halved():
    machine = Machine(most=2)
    batcher = Batcher(machine, size=8)
    assert batcher.work([asking(i) for i in range(8)]) == [[2 * i] for i in range(8)]
    assert machine.sizes() == [2, 2, 2, 2]
    assert machine.calls == [8, 4, 2, 2, 4, 2, 2]
    batcher.work([asking(i) for i in range(8)])
    assert machine.calls[7:] == [2, 2, 2, 2]  # once is enough to know
    batcher.close()


def test_a_row_may_mend_a_failure(batcher):
    def careful() -> Procedure[int]:
        try:
            yield [("k", 13), ("k", 1)]
        except RuntimeError:
            return (yield [("k", 5)])[0]
        return 0

    assert batcher.work([careful()]) == [10]


def test_a_rows_own_exception_is_its_end(batcher):
    def bad() -> Procedure[int]:
        yield [("k", 1)]
        raise ValueError("mine")

    ends = batcher.work([bad(), asking(2)])
    assert str(ends[0]) == "mine"
    assert ends[1] == [4]


def test_many_threads(batcher, machine):
    """400 rows from 8 threads, each asking three times: every row gets its own, and the batches are nearly full."""

    def call(thread: int) -> list[Any]:
        return batcher.work([asking(*(1000 * thread + 10 * row + i for i in range(3))) for row in range(50)])

    with ThreadPoolExecutor(8) as pool:
        for thread, ends in enumerate(pool.map(call, range(1, 9)), 1):
            assert ends == [[2 * (1000 * thread + 10 * row + i) for i in range(3)] for row in range(50)]
    assert sum(machine.sizes()) == 1200
    assert len(machine.batches) < 400
