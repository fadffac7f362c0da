"""Kill the driver and its workers at random moments: nothing is lost, nothing doubled, nothing finished done again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from engine_checks import check_complete, check_nothing_redone

from ipvg_ray import tables

pytestmark = [pytest.mark.slow, pytest.mark.chaos]
DRIVER = Path(__file__).with_name("engine_driver.py")
FIRE = Path(__file__).with_name("cluster_under_fire.py")
SIZE = ["--identities", "110", "--prompts", "9", "--batch", "4", "--workers", "2"]
POISON = [
    "second:id00005/prompt1=exit",
    "second:id00007/prompt8=segfault",
    "first:id00002=raise",
    "third:id00004/prompt0=row-error",
    "third:id00008/prompt3=hang",
]
FAILED = {
    "first": {"id00002"},
    "second": {"id00005/prompt1", "id00007/prompt8"},
    "third": {"id00004/prompt0", "id00008/prompt3"},
}
KINDS = {
    "id00002": ("error", "ValueError: bad input"),
    "id00005/prompt1": ("worker_died", "it ended itself with exit code 1"),
    "id00007/prompt8": ("worker_died", "signal SIGSEGV"),
    "id00004/prompt0": ("planted", "as asked"),
    "id00008/prompt3": ("timeout", "the row took longer than third.pool.time_limit_s 3 times"),
}
IN_FLIGHT = 2 * 3 * 2 * 4
"""Rows that one hit can catch at work: two workers of three stages, one batch in work and one about to be, of four."""


def start(run_dir: Path, bad: list[str]) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, str(DRIVER), str(run_dir), "--identities", "30", "--prompts", "3"]
    arguments += ["--delay", "0.04", "--batch", "2", "--workers", "2", "--bad", *bad]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def rows(run_dir: Path) -> int:
    return sum(len(tables.parts(run_dir, stage)) for stage in ("first", "second", "third"))


@pytest.mark.parametrize("chance", range(int(os.environ.get("IPVG_RAY_CHAOS_SEEDS", "2"))))
def test_whatever_dies_each_row_ends_once(tmp_path: Path, chance: int) -> None:
    """2,090 row-stages with poison among them, while nodes lose power and workers and drivers are killed."""
    run_dir = tmp_path / "run"
    command = [sys.executable, str(DRIVER), str(run_dir), *SIZE, "--delay", "0.02", "--cpus", "0.9", "--limit", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    done = subprocess.run(
        [sys.executable, str(FIRE), str(chance), "node,worker,driver", "6", *command, "--bad", *POISON],
        capture_output=True,
        text=True,
        timeout=580,
        env=environment,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["code"] == 0, done.stdout + done.stderr
    assert len(told["hits"]) >= 3
    check_complete(run_dir, FAILED)
    check_nothing_redone(run_dir)
    for failure in tables.read_table(run_dir, "failures").to_pylist():
        kind, words = KINDS[failure["sample_id"] or failure["identity_id"]]
        assert failure["kind"] == kind
        assert words in failure["message"] or "SIGKILL" in failure["message"], "killed by us at its last try"
    begun, ended = counts_of(run_dir)
    assert max(ended.values()) == 1, "nothing was finished twice, though Ray went through its lineage"
    again = sum(begun.values()) - len(begun)
    assert again <= (len(told["hits"]) + 3 * len(POISON)) * IN_FLIGHT


def counts_of(run_dir: Path) -> tuple[Counter[str], Counter[str]]:
    """How often each row of each stage was begun and ended, by the workers' journals."""
    begun: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    for journal in run_dir.glob("_engine/*/journal/*.jsonl"):
        for line in journal.read_text().splitlines():
            if line.endswith("}"):  # not cut off by a kill
                event = json.loads(line)
                names = [f"{journal.name.partition('-')[0]} {key}" for key in event["keys"]]
                (begun if event["event"] == "begin" else ended).update(names)
    return begun, ended


def test_killed_workers_are_replaced_within_the_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir, [])
    luck = random.Random(7)
    for goal in (3, 12, 24):
        while rows(run_dir) < goal and process.poll() is None:
            time.sleep(0.01)
        workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "MapWorker" in p.name()]
        if workers:
            luck.choice(workers).kill()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()
    check_complete(run_dir)


def test_sigterm_ends_the_run_and_it_can_go_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir, [])
    while rows(run_dir) < 10 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output.decode()
    assert b"rows in work have 30 s to finish" in output
    assert b"OUTCOME interrupted" in output
    began, ended = 0, 0
    for journal in run_dir.glob("_engine/*/journal/*.jsonl"):
        events = [json.loads(line)["event"] for line in journal.read_text().splitlines()]
        began, ended = began + events.count("begin"), ended + events.count("end")
    assert began == ended > 0, "what was in work was finished"
    assert tables.read_run(run_dir)["sessions"][-1]["outcome"] == "interrupted"
    process = start(run_dir, [])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()
    check_complete(run_dir)
    check_nothing_redone(run_dir)
