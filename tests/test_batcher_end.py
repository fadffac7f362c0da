"""Nobody waits for a batcher whose thread has ended, however it ended."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from ipvg_ray.models.batcher import Batcher, BatcherEndedError, Procedure


def asking(*jobs: Any, key: Any = "k") -> Procedure[list[Any]]:
    return (yield [(key, job) for job in jobs])


def ends(batcher: Batcher, *procedures: Procedure[Any]) -> list[Any]:
    """What `work` returns; fails where it does not return."""
    found: queue.Queue[list[Any]] = queue.Queue()
    threading.Thread(target=lambda: found.put(batcher.work(procedures)), daemon=True).start()
    return found.get(timeout=10)


def test_a_wrong_number_of_results_is_the_jobs_error_and_the_thread_lives() -> None:
    batcher = Batcher(lambda key, jobs: jobs if key == "good" else [], size=4)
    first, second = ends(batcher, asking(1), asking(2))
    assert "0 results came back for 1 jobs" in str(first)
    assert isinstance(second, ValueError)
    assert ends(batcher, asking(3, key="good")) == [[3]]
    batcher.close()


def _ends_at_13(key: Any, jobs: Sequence[Any]) -> Sequence[Any]:
    if len(jobs) > 1:
        raise RuntimeError("too many")
    if 13 in jobs:
        raise SystemExit("over")
    return jobs


def test_when_the_thread_ends_all_who_wait_and_all_who_come_get_an_error() -> None:
    batcher = Batcher(_ends_at_13, size=3, linger_s=5)
    first, *others = ends(batcher, asking(1), asking(13), asking(3), asking(4, key="other"))
    assert first == [1], "it was done before"
    assert [type(end) for end in others] == [BatcherEndedError] * 3
    assert "SystemExit('over')" in str(others[0])
    (later,) = ends(batcher, asking(5))
    assert isinstance(later, BatcherEndedError)
    batcher.close()


def test_a_job_that_cannot_be_sorted_leaves_nobody_waiting() -> None:
    batcher = Batcher(lambda key, jobs: jobs, size=2)
    (end,) = ends(batcher, asking(1, key=["unhashable"]))
    assert isinstance(end, BatcherEndedError)


def test_work_after_close_is_refused() -> None:
    batcher = Batcher(lambda key, jobs: jobs, size=2)
    batcher.close()
    with pytest.raises(BatcherEndedError, match="closed"):
        batcher.work([asking(1)])


def test_a_row_that_asks_again_after_close_gets_an_error() -> None:
    batcher = Batcher(lambda key, jobs: jobs, size=2)

    def late() -> Procedure[list[Any]]:
        batcher.close()
        return (yield [("k", 1)])

    (end,) = ends(batcher, late())
    assert isinstance(end, BatcherEndedError)
