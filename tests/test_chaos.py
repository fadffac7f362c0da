"""Kill the driver and its workers at random moments: nothing is lost, nothing doubled, nothing finished done again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from engine_checks import check_complete, check_nothing_redone

from ipvg_ray import tables

pytestmark = [pytest.mark.slow, pytest.mark.chaos]
DRIVER = Path(__file__).with_name("engine_driver.py")
POISON = ["second:id00005/prompt1=exit", "first:id00002=raise", "third:id00004/prompt0=row-error"]
FAILED = {"second": {"id00005/prompt1"}, "first": {"id00002"}, "third": {"id00004/prompt0"}}


def start(run_dir: Path, bad: list[str]) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, str(DRIVER), str(run_dir), "--identities", "30", "--prompts", "3"]
    arguments += ["--delay", "0.04", "--batch", "2", "--workers", "2", "--bad", *bad]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def kill_family(process: subprocess.Popen[bytes], driver_only: bool) -> None:
    family = [] if driver_only else psutil.Process(process.pid).children(recursive=True)
    for member in [psutil.Process(process.pid), *family]:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()


def rows(run_dir: Path) -> int:
    return sum(len(tables.parts(run_dir, stage)) for stage in ("first", "second", "third"))


@pytest.mark.parametrize("chance", range(int(os.environ.get("IPVG_RAY_CHAOS_SEEDS", "3"))))
def test_killed_runs_end_complete(tmp_path: Path, chance: int) -> None:
    luck = random.Random(chance)
    run_dir = tmp_path / "run"
    for kill in range(2):
        process = start(run_dir, POISON)
        patience = time.monotonic() + 120
        before = rows(run_dir)
        goal = before + luck.randint(1, 40)
        while rows(run_dir) < goal and process.poll() is None and time.monotonic() < patience:
            time.sleep(0.01)
        time.sleep(luck.random() * 0.3)
        kill_family(process, driver_only=kill == 1 and chance % 2 == 1)
    process = start(run_dir, POISON)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()
    check_complete(run_dir, FAILED)
    assert check_nothing_redone(run_dir) > 0


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
