"""A run on a cluster that scales itself, on this machine: an idle head, nodes with one fake GPU and nodes with eight,
by Ray's fake multi-node provider under the second autoscaler. One eight-GPU node is killed on the way.

usage: python fake_autoscaler.py FOLDER ROWS
Prints one JSON object: the outcome, where each row was worked on, and how many nodes of each type there were over time.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
from cluster_under_fire import kill_tree
from engine_driver import FakeConfig, FakeSection, _table, freeze_fake
from job_on_a_cluster import free_port

from ipvg_ray import schema, tables
from ipvg_ray.config import PoolConfig
from ipvg_ray.pipeline import run as engine
from ipvg_ray.pipeline.stage import Row, RowError, Stage

HEAD = "f" * 51 + "00000"
"""The node id that the fake provider takes for its head."""
LABEL = "ipvg-ray/pool"
WATCH = """
import collections, json, sys, time, ray
ray.init(log_to_driver=False, logging_level="ERROR")
last = None
while True:
    now = dict(collections.Counter(n["Labels"].get("ipvg-ray/pool", "head") for n in ray.nodes() if n["Alive"]))
    if now != last:
        print(json.dumps(now), flush=True)
        last = now
    time.sleep(0.3)
"""


class Cut(Stage):
    """The light stage: one fake GPU a worker."""

    name, grain, needs = "first", "sample", ("prompt",)
    seconds = 0.2

    @classmethod
    def table(cls) -> schema.Table:
        return _table(cls.name, "sample", **{f"{cls.name}_node": pa.string(), f"{cls.name}_gpus": pa.int32()})

    def fingerprint_settings(self) -> dict[str, Any]:
        return {}

    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        time.sleep(self.seconds * len(rows))
        gpus = len(os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))
        node = os.environ.get("RAY_NODE_TYPE_NAME", "head")
        return [{f"{self.name}_node": node, f"{self.name}_gpus": gpus} for _ in rows]


class Film(Cut):
    """The heavy stage: a group of eight fake GPUs a worker."""

    name, needs = "second", ("first_node",)
    seconds = 3.0


def request(run_dir: Path) -> engine.Request:
    pools = [
        PoolConfig(cpus=0, gpus=gpus, max_workers=2, label_selector={LABEL: name})
        for name, gpus in (("light", 1), ("video", 8))
    ]
    config = FakeConfig(first=FakeSection(pool=pools[0]), second=FakeSection(pool=pools[1]))
    stages = [stage(config) for stage in (Cut, Film)]  # type: ignore[arg-type]
    return engine.Request(run_dir, {"dataset": {"path": "fake", "strict": False}}, 1, stages)


def start_head(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """A head with the autoscaler, and no node beside it."""
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "launch_multiple": True,
        "head_node_id": HEAD,
        "gcs_address": f"127.0.0.1:{port}",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    types = {
        name: {"resources": {"CPU": 1, "GPU": gpus}, "labels": {LABEL: name}, "max_workers": 2, "node_config": {}}
        for name, gpus in (("light", 1), ("video", 8))
    }
    head = {"resources": {"CPU": 0, "GPU": 0}, "node_config": {}, "max_workers": 0}
    empty: list[str] = []
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    config = {
        "cluster_name": "fake",
        "max_workers": 4,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 100,
        "provider": provider,
        "available_node_types": {"ray.head.default": head, **types},
        "head_node_type": "ray.head.default",
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": empty,
        "file_mounts_sync_continuously": False,
        "rsync_exclude": empty,
        "rsync_filter": empty,
        **{f"{name}_commands": empty for name in commands},
    }
    (folder / "autoscaling.json").write_text(json.dumps(config))
    environment = os.environ | {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
    }
    command = ["ray", "start", "--head", f"--port={port}", f"--autoscaling-config={folder / 'autoscaling.json'}"]
    command += ["--num-cpus=0", "--num-gpus=0", "--include-dashboard=false", "--disable-usage-stats", "--block"]
    command += [f"--ray-client-server-port={free_port()}", f"--temp-dir={os.environ['FAKE_TMP']}"]
    command += ["--object-store-memory=200000000"]
    with (folder / "head.log").open("wb") as log:
        head_process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while "Ray runtime started" not in (folder / "head.log").read_text():
        if time.monotonic() > deadline or head_process.poll() is not None:
            raise TimeoutError((folder / "head.log").read_text())
        time.sleep(0.3)
    return head_process


def kill_a_node(kind: str, port: int) -> bool:
    """SIGKILL to one node of a type and all below it."""
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] != "raylet" or f"127.0.0.1:{port}" not in " ".join(process.info["cmdline"] or []):
            continue
        if process.environ().get("RAY_NODE_TYPE_NAME") == kind:
            kill_tree(process.pid)
            return True
    return False


def main() -> None:
    folder, rows = Path(sys.argv[1]), int(sys.argv[2])
    port = free_port()
    head = start_head(folder, port)
    os.environ["RAY_ADDRESS"] = f"127.0.0.1:{port}"
    with (folder / "nodes.jsonl").open("wb") as seen:
        watch = subprocess.Popen([sys.executable, "-c", WATCH], stdout=seen)
    run_dir = folder / "run"
    driver = subprocess.Popen([sys.executable, __file__, "driver", str(run_dir), str(rows)], stdout=sys.stderr)
    killed, deadline = False, time.monotonic() + 400
    while driver.poll() is None and time.monotonic() < deadline:
        if not killed and len(list(run_dir.glob("second/part-*"))) >= rows // 4:
            killed = kill_a_node("video", port)
        time.sleep(0.2)
    driver.kill()
    while time.monotonic() < deadline + 60 and nodes(folder)[-1:] != [{"head": 1}]:
        time.sleep(0.3)
    table = tables.read_table(run_dir, Film.table()).to_pylist()
    first = tables.read_table(run_dir, Cut.table()).to_pylist()
    told = {
        "code": driver.returncode,
        "killed": killed,
        "rows": len(table),
        "cut": collections.Counter(f"{row['first_node']} {row['first_gpus']}" for row in first),
        "film": collections.Counter(f"{row['second_node']} {row['second_gpus']}" for row in table),
        "nodes": nodes(folder),
        "lost": tables.read_run(run_dir)["sessions"][-1].get("lost", {}),
    }
    print(json.dumps(told), flush=True)
    watch.kill()
    for process in (*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)):
        process.kill()
    for process in psutil.process_iter(["name", "cmdline"]):  # nodes are nobody's children once their starter is gone
        if f"127.0.0.1:{port}" in " ".join(process.info["cmdline"] or []):
            process.kill()


def nodes(folder: Path) -> list[dict[str, int]]:
    """Nodes of each type, one entry for each change, in order of time."""
    lines = (folder / "nodes.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]  # Ray writes there too


if __name__ == "__main__":
    if sys.argv[1] == "driver":
        result = engine.run(request(Path(sys.argv[2])), freeze_fake(int(sys.argv[3]), 1))
        sys.exit(0 if result.outcome == "complete" else 1)
    main()
