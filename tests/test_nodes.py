"""A cluster of several nodes that others started: the driver joins it and its workers spread over the nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_checks import check_complete
from test_chaos import DRIVER, counts_of

pytestmark = pytest.mark.slow

CLUSTER = """
import os, subprocess, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
for _ in range(2):
    cluster.add_node(num_cpus=2)
done = subprocess.run(sys.argv[1:], env=os.environ | {"RAY_ADDRESS": cluster.address})
cluster.shutdown()
sys.exit(done.returncode)
"""


def test_a_run_joins_a_cluster_of_several_nodes(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    driver = [sys.executable, str(DRIVER), str(run_dir), "--identities", "12", "--prompts", "2", "--workers", "3"]
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, *driver], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OUTCOME complete" in done.stdout
    check_complete(run_dir)


def test_a_job_that_is_stopped_drains_and_its_resubmission_goes_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    driver = [sys.executable, str(DRIVER), str(run_dir), "--identities", "12", "--prompts", "4", "--delay", "0.2"]
    program = Path(__file__).with_name("job_on_a_cluster.py")
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, str(program), str(run_dir), *driver],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["first"], told["outcome"]) == ("STOPPED", "interrupted"), done.stdout + done.stderr
    assert told["second"] == "SUCCEEDED", told["logs"]
    begun, ended = counts_of(run_dir)
    assert begun == ended, "what was in work when the job was stopped was finished, and nothing was begun twice"
    check_complete(run_dir)
