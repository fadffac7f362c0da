"""A cluster of several nodes on one machine, of which one after another loses its power, while a driver runs on it.

usage: python cluster_under_fire.py SEED SHOTS EVENTS DRIVER...
SEED decides what is hit and when; SHOTS names what may be hit (node,worker,driver); EVENTS is how often. A node that
is hit is replaced; a driver that is hit is started again. Prints one JSON object: what was hit, and the exit code.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

CORES = 3


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all below it at once, as when the power goes."""
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue


def raylet(node: object) -> int:
    processes = node.all_processes  # type: ignore[attr-defined]
    return int(processes["raylet"][0].process.pid)


def finished(run_dir: Path) -> int:
    """Part files of the run: how far it is."""
    return sum(1 for stage in ("first", "second", "third") for _ in (run_dir / stage).glob("part-*"))


def main() -> None:
    luck, events = random.Random(int(sys.argv[1])), int(sys.argv[3])
    shots = (sys.argv[2].split(",") * events)[:events]  # each kind as often
    luck.shuffle(shots)
    command, run_dir = sys.argv[4:], Path(sys.argv[6])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CORES, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=CORES) for _ in range(2)]
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    hits: list[str] = []
    driver = subprocess.Popen(command, env=environment)
    goal = luck.randint(5, 60)
    deadline = time.monotonic() + 540
    while time.monotonic() < deadline:
        if driver.poll() is not None:
            break
        if len(hits) >= events or finished(run_dir) < goal:
            time.sleep(0.02)
            continue
        goal = finished(run_dir) + luck.randint(10, 90)
        time.sleep(luck.random() * 0.5)
        hits.append(shots[len(hits)])
        if hits[-1] == "node":
            lost = nodes.pop(luck.randrange(len(nodes)))
            kill_tree(raylet(lost))
            cluster.worker_nodes.discard(lost)
            nodes.append(cluster.add_node(num_cpus=CORES, wait=False))
        elif hits[-1] == "driver":
            kill_tree(driver.pid)
            driver.wait()
            driver = subprocess.Popen(command, env=environment)
        else:
            lists = [psutil.Process(raylet(n)).children() for n in (cluster.head_node, *nodes)]
            workers = [p for family in lists for p in family if "MapWorker" in p.name()]
            if workers:
                luck.choice(workers).kill()
    code = driver.poll()
    kill_tree(driver.pid)
    print(json.dumps({"hits": hits, "code": code}), flush=True)
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(0)  # Cluster would mourn its dead nodes for minutes


if __name__ == "__main__":
    main()
