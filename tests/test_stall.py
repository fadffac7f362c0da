"""A run that stands still says so, and begins again where its stages then fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ipvg_ray.pipeline.ledger import Event
from ipvg_ray.pipeline.stall import Room, StallWatch

FULL = Room(frozenset({"n"}), 4.0, 0.2)


class Scene:
    """A watch, its clock, and what it said and gave up."""

    def __init__(self, room: Room, gives_up: bool = True) -> None:
        self.now, self.room, self.asked = 0.0, room, 0
        self.said: list[str] = []
        self.given_up: list[str] = []
        give_up = self.given_up.append if gives_up else None
        self.watch = StallWatch(self._room, 1.0, self.said.append, give_up, lambda: self.now)

    def _room(self) -> Room:
        self.asked += 1
        return self.room

    def wait(self, seconds: int, *events: Event) -> None:
        self.watch.look(events)
        for _ in range(seconds):
            self.now += 1
            self.watch.look([])


def test_a_full_cluster_in_which_nothing_is_in_work_is_named_then_given_up() -> None:
    scene = Scene(FULL)
    scene.wait(59)
    assert not scene.asked, "the cluster is not asked while all is well"
    scene.wait(2)
    assert len(scene.said) == 1
    assert "of the cluster's 4 CPUs no node has 1 free" in scene.said[0]
    scene.wait(480)
    assert (len(scene.said), scene.given_up) == (1, [])
    scene.wait(60)
    assert len(scene.given_up) == 1


def test_where_nodes_may_come_it_is_named_and_waited_for() -> None:
    scene = Scene(FULL, gives_up=False)
    scene.wait(1000)
    assert len(scene.said) == 1
    assert "go on with --in-turn or smaller pools" in scene.said[0]
    scene.wait(100, Event("s", "b", began=1, node="n"), Event("s", "b", ended=True))
    assert len(scene.said) == 2, "once each time"


def test_long_rows_loading_workers_and_free_cpus_are_no_stall() -> None:
    working = Scene(FULL)
    working.wait(1000, Event("s", "b", began=1, node="n"))
    loading = Scene(Room(frozenset({"n"}), 4.0, 1.0))
    loading.wait(1000)
    slowly = Scene(FULL)
    slowly.watch.restart(lambda: ["n"])
    slowly.wait(1000)
    assert not slowly.said + slowly.given_up
    assert not working.said + loading.said + working.given_up + loading.given_up


def test_work_on_a_lost_node_does_not_count() -> None:
    scene = Scene(FULL)
    scene.wait(700, Event("s", "b", began=1, node="lost"))
    assert len(scene.given_up) == 1


def test_where_others_fill_the_cluster_it_is_waited_for() -> None:
    scene = Scene(FULL)
    scene.watch.restart(whole=4.0)
    scene.wait(1000)
    assert (len(scene.said), scene.given_up) == (1, []), "it has all the CPUs that it had"
    scene.watch.restart(whole=8.0)
    scene.wait(700)
    assert len(scene.given_up) == 1, "it has lost some"
    assert "lower the stages' pools" in scene.given_up[0]


PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import ray
from engine_driver import freeze_fake, request
from ipvg_ray.pipeline import execute, run, stall
stall._NAMED_S, stall._GIVEN_UP_S, stall._EVERY_S = 5.0, 10.0, 1.0
asked = request(Path(sys.argv[2]), cpus=1.0)  # three workers and the one CPU that deals rows: all four

@ray.remote(num_cpus=1)
class Hog:
    # Takes the CPU that deals rows, as if its node were lost.
    def ready(self): return True

def crowded():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    crowded.hog = Hog.remote()
    ray.get(crowded.hog.ready.remote())
execute.connect = crowded
go = run._execute_once
def once(*args):
    once.tries += 1
    if once.tries == 2:
        ray.kill(crowded.hog)
    return go(*args)
once.tries = 0
run._execute_once = once
result = run.run(asked, freeze_fake(4, 2))
print("OUTCOME", result.outcome, once.tries, result.counts["third"].done)
"""


@pytest.mark.slow
def test_a_real_run_that_stands_still_begins_again(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nothing moves: no row is in work" in done.stderr
    assert "going on from the checkpoints (GivenUpError" in done.stderr
    assert "OUTCOME complete 2 8" in done.stdout
