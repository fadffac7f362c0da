"""A cluster of several nodes that others started: the driver joins it and its workers spread over the nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_checks import check_complete
from test_chaos import DRIVER

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
