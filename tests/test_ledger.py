"""The ledger of tries: who is to blame for a death, and who is not; and what a dying process still says."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ipvg_ray.pipeline import deaths
from ipvg_ray.pipeline.deaths import inquest
from ipvg_ray.pipeline.ledger import Event, TryLedger, Who
from ipvg_ray.pipeline.turns import Turns


def who(process: str, worker: str = "w", node: str = "n") -> Who:
    return Who(worker, process, node, "host", "/nowhere")


def test_tries_that_never_ended_are_deaths_until_the_batch_ends() -> None:
    ledger = TryLedger()
    assert ledger.begin(Event("s", "b"), who("1")) == []
    assert ledger.begin(Event("s", "b"), who("1")) == [], "the same process again: its answer got lost"
    assert [w.process for w in ledger.begin(Event("s", "b"), who("2"))] == ["1"]
    assert [w.process for w in ledger.begin(Event("s", "b"), who("3"))] == ["1", "2"]
    assert ledger.begin(Event("s", "other"), who("3")) == []
    ledger.end(Event("s", "b", ended=True, closed=True))
    assert ledger.begin(Event("s", "b"), who("4")) == []


def test_a_lost_node_is_nobodys_fault() -> None:
    lost = {"far"}
    ledger = TryLedger(lambda node: node in lost)
    ledger.begin(Event("s", "b"), who("1", node="far"))
    ledger.begin(Event("s", "b"), who("2", node="near"))
    assert [w.process for w in ledger.begin(Event("s", "b"), who("3"))] == ["2"]
    assert ledger.lost_tries == 1
    ledger.begin_setup("s", who("1", "w1", "far"))
    assert ledger.begin_setup("s", who("2", "w1", "near")) == ([], 0)


def test_deaths_while_loading_are_counted_per_worker_and_forgiven_once_it_loads() -> None:
    ledger = TryLedger()
    assert ledger.begin_setup("s", who("1")) == ([], 0)
    died, restarts = ledger.begin_setup("s", who("2"))
    assert ([w.process for w in died], restarts) == (["1"], 1)
    assert ledger.begin_setup("s", who("1", worker="another")) == ([], 1), "it loads at the same time, and lives"
    died, restarts = ledger.begin_setup("s", who("3"))
    assert ([w.process for w in died], restarts) == (["1", "2"], 2)
    ledger.end_setup("s", who("3"))
    assert ledger.begin_setup("s", who("4")) == ([], 3)
    ledger.end(Event("s", "b", ended=True, closed=True))
    assert ledger.begin_setup("s", who("5"))[1] == 1, "a batch that ends shows that the stage can work"


DYING = """
import ctypes, os, sys, threading, time
from ipvg_ray.pipeline.deaths import LastWords
words = LastWords(sys.argv[1])
def the_guilty_line():
    how = sys.argv[2]
    if how == "segfault": ctypes.string_at(0)
    if how == "abort": os.abort()
    if how == "exit": os._exit(7)
    if how == "kill": os.kill(os.getpid(), 9)
    if how == "fork":
        if os.fork() == 0: os._exit(3)
        os.wait()
        os.kill(os.getpid(), 9)
    with words.time_limit(0.3): time.sleep(60)
the_guilty_line()
"""


@pytest.mark.parametrize(
    ("how", "words", "hung"),
    [
        ("segfault", "signal SIGSEGV, a segmentation fault", False),
        ("abort", "signal SIGABRT, an abort", False),
        ("exit", "it ended itself with exit code 7", False),
        ("hang", "it took too long", True),
    ],
)
def test_last_words(tmp_path: Path, how: str, words: str, hung: bool) -> None:
    subprocess.run([sys.executable, "-c", DYING, str(tmp_path / "trace"), how], check=False, capture_output=True)
    death = inquest(dataclasses.replace(who("1"), trace=str(tmp_path / "trace")), "host", tmp_path)
    assert (death.words, death.hung) == (words, hung)
    assert "the_guilty_line" in death.stack


@pytest.mark.parametrize("how", ["kill", "fork"])
def test_a_killed_process_leaves_no_trace(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([sys.executable, "-c", DYING, str(tmp_path / "trace"), how], check=False, capture_output=True)
    dead = dataclasses.replace(who("1"), trace=str(tmp_path / "trace"))
    assert inquest(dead, "another host", tmp_path).words.startswith("it left no trace")
    monkeypatch.setattr(deaths, "oom_kills", lambda: 1)
    assert "want of memory" in inquest(dead, "host", tmp_path).words


SHARED = """
import sys, threading, time
from ipvg_ray.pipeline.deaths import LastWords
words = LastWords(sys.argv[1])
def rows(seconds, limit):
    with words.time_limit(limit): time.sleep(seconds)
threads = [threading.Thread(target=rows, args=pair) for pair in ((0.1, 9), (0.6, 9), (0.2, 5), (%s, 4.0))]
for t in threads: t.start()
for t in threads: t.join()
"""


@pytest.mark.parametrize(("slowest", "code"), [(0.3, 0), (30, 1)])
def test_one_watch_serves_several_threads(tmp_path: Path, slowest: float, code: int) -> None:
    started = time.monotonic()
    program = [sys.executable, "-c", SHARED % slowest, str(tmp_path / "trace")]
    assert subprocess.run(program, check=False, capture_output=True).returncode == code
    assert time.monotonic() - started < 25


PAUSED = """
import sys, threading, time
from ipvg_ray.pipeline.deaths import LastWords
words = LastWords(sys.argv[1])
def wait():
    with words.pause(): time.sleep(2)
def row(waited, seconds):
    with words.time_limit(1.0):
        if waited: wait()
        time.sleep(seconds)
threads = [threading.Thread(target=row, args=pair) for pair in ((True, 0.1), (True, %s), (False, 0.1))]
for t in threads: t.start()
time.sleep(0.5)
row(False, 0.3)  # begins while others wait
for t in threads: t.join()
"""


@pytest.mark.parametrize(("seconds", "code"), [(0.1, 0), (30, 1)])
def test_what_is_waited_for_counts_towards_no_limit(tmp_path: Path, seconds: float, code: int) -> None:
    started = time.monotonic()
    program = [sys.executable, "-c", PAUSED % seconds, str(tmp_path / "trace")]
    assert subprocess.run(program, check=False, capture_output=True).returncode == code
    assert 2 < time.monotonic() - started < 25


def test_turns_are_shared_or_had_alone() -> None:
    turns, inside, most, alone = Turns(), 0, 0, []
    lock = threading.Lock()

    def share() -> None:
        nonlocal inside, most
        for _ in range(30):
            with turns.shared():
                with lock:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.001)
                with lock:
                    inside -= 1

    def have_alone() -> None:
        for _ in range(10):
            with turns.alone():
                alone.append(inside)
                time.sleep(0.001)

    threads = [threading.Thread(target=target) for target in (share, share, share, have_alone, have_alone)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert alone == [0] * 20
    assert most > 1
