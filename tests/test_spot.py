"""A spot node that is to be taken away leaves in good order: what is begun is finished, the rest is done elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from engine_checks import check_complete
from test_chaos import DRIVER, counts_of

from ipvg_ray import tables
from ipvg_ray.pipeline.spot import Metadata, Notice, Watch


class Cloud:
    """What a node's metadata address says."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.taken = False

    def answer(self, method: str, path: str, headers: dict[str, str]) -> str | None:
        if self.kind == "aws":
            if (method, path) == ("PUT", "/latest/api/token") and headers.get("x-aws-ec2-metadata-token-ttl-seconds"):
                return "secret-token"
            asked = path == "/latest/meta-data/spot/instance-action"
            if asked and self.taken and headers.get("x-aws-ec2-metadata-token") == "secret-token":
                return json.dumps({"action": "terminate", "time": "2099-01-02T03:04:05Z"})
            return None
        asked = path == "/computeMetadata/v1/instance/preempted" and headers.get("metadata-flavor") == "Google"
        return ("TRUE" if self.taken else "FALSE") if asked and method == "GET" else None


@contextmanager
def metadata(kind: str) -> Iterator[tuple[Cloud, str]]:
    cloud = Cloud(kind)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said = cloud.answer(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
            self.send_response(404 if said is None else 200)
            self.end_headers()
            self.wfile.write((said or "").encode())

        do_PUT = do_GET  # noqa: N815 - a name of http.server

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield cloud, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("kind", ["aws", "gcp"])
def test_a_notice_is_heard(kind: str) -> None:
    with metadata(kind) as (cloud, address):
        node = Metadata(address)
        assert node.cloud() == kind
        assert node.notice(kind) is None
        cloud.taken = True
        heard = node.notice(kind)
    assert heard is not None
    assert heard.cloud == kind
    if kind == "aws":
        assert heard.deadline == datetime(2099, 1, 2, 3, 4, 5, tzinfo=UTC).timestamp()
    else:
        assert 20 < heard.deadline - time.time() <= 30


def test_elsewhere_nobody_is_asked_again() -> None:
    assert Metadata("http://127.0.0.1:9", timeout=0.5).cloud() is None
    watch = Watch(pytest.fail, pytest.fail, "off")
    assert not [t for t in threading.enumerate() if t.name == "spot"]
    with watch.batch():
        pass


def test_the_notice_of_another_node_counts_as_its_own() -> None:
    heard: list[Notice] = []
    left = threading.Event()
    asked = iter([None, None, Notice("gcp", 1.0, "another node")])
    watch = Watch(heard.append, left.set, "off", every=0.01, others=lambda: next(asked))
    with watch.batch():
        while not watch.leaving:
            time.sleep(0.01)
        assert not left.is_set(), "a batch is still in work"
    assert left.wait(5)
    assert [notice.node for notice in heard] == ["another node"]


def test_a_worker_leaves_when_no_batch_is_in_work_and_begins_none_meanwhile() -> None:
    heard: list[Notice] = []
    begun: list[str] = []
    left = threading.Event()

    def late() -> None:
        with watch.batch():
            begun.append("late")

    with metadata("aws") as (cloud, address):
        watch = Watch(heard.append, left.set, address, every=0.05)
        with watch.batch():
            cloud.taken = True
            while not watch.leaving:
                time.sleep(0.01)
            threading.Thread(target=late, daemon=True).start()
            assert not left.wait(1.5), "a batch is still in work"
        assert left.wait(5)
    assert len(heard) == 1
    assert begun == [], "what came late is for another process"


def test_a_node_that_cannot_be_drained_works_on() -> None:
    def refused(notice: Notice) -> None:
        raise RuntimeError("no")

    with metadata("gcp") as (cloud, address):
        cloud.taken = True
        watch = Watch(refused, pytest.fail, address, every=0.05)
        time.sleep(0.3)
        with watch.batch():
            pass
    assert not watch.leaving


CLUSTER = """
import os, subprocess, sys, time, urllib.request
import psutil
from pathlib import Path
from ray.cluster_utils import Cluster
address, run_dir, flag = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
# What is left must hold all workers and the tasks that deal rows to them: a smaller one would wait for nodes.
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 6, "include_dashboard": False})
doomed = cluster.add_node(num_cpus=2, env_vars={"IPVG_RAY_METADATA": address})
raylet = psutil.Process(doomed.all_processes["raylet"][0].process.pid)
working = lambda: [p for p in raylet.children() if "MapWorker" in p.name()]
driver = subprocess.Popen(sys.argv[4:], env=os.environ | {"RAY_ADDRESS": cluster.address})
most = 0
while len(list(run_dir.glob("second/part-*"))) < 6 and driver.poll() is None:
    most = max(most, len(working()))
    time.sleep(0.1)
flag.touch()
deadline = time.monotonic() + 60
while working() and driver.poll() is None and time.monotonic() < deadline:
    time.sleep(0.1)
emptied = not working() and driver.poll() is None
driver.wait()
print("WORKED", most > 0, "EMPTIED", emptied, flush=True)
cluster.shutdown()
sys.exit(driver.returncode)
"""


@pytest.mark.slow
def test_a_node_with_a_notice_is_left_and_nothing_is_done_twice(tmp_path: Path) -> None:
    run_dir, flag = tmp_path / "run", tmp_path / "notice"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    driver = [sys.executable, str(DRIVER), str(run_dir), "--identities", "20", "--prompts", "3"]
    driver += ["--delay", "0.5", "--workers", "2", "--cpus", "0.6"]
    with metadata("aws") as (cloud, address):
        command = [sys.executable, "-c", CLUSTER, address, str(run_dir), str(flag), *driver]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment | {"IPVG_RAY_METADATA": "off"},
        )
        while not flag.exists() and process.poll() is None:
            time.sleep(0.1)
        cloud.taken = True
        output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert "WORKED True EMPTIED True" in output, "workers left the node before the run's end"
    check_complete(run_dir)
    begun, ended = counts_of(run_dir)
    assert begun == ended, "what was begun was finished where it was begun"
    assert max(begun.values()) == 1
    assert tables.read_run(run_dir)["sessions"][-1]["lost"] == {"batches": 0, "notices": 1}
