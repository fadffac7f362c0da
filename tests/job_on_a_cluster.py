"""A cluster with its dashboard, on which a run is submitted as a job, stopped in the middle, and submitted again.

usage: python job_on_a_cluster.py RUN DRIVER...
Prints one JSON object: the status of both jobs, and the tail of the second one's logs.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster
from ray.job_submission import JobStatus, JobSubmissionClient


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def wait_for_agent(client: JobSubmissionClient) -> None:
    """The agent that takes jobs comes up some seconds after the dashboard."""
    for _ in range(240):
        try:
            client.submit_job(entrypoint="true")
            return
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            time.sleep(0.5)
    raise TimeoutError("the cluster's job agent does not come up")


def submit(client: JobSubmissionClient, command: str, environment: dict[str, str]) -> str:
    return client.submit_job(entrypoint=command, runtime_env={"env_vars": environment})


def wait(client: JobSubmissionClient, job: str) -> JobStatus:
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.2)
    return client.get_job_status(job)


def main() -> None:
    run_dir, command = Path(sys.argv[1]), " ".join(sys.argv[2:])
    head = {"num_cpus": 3, "include_dashboard": True, "dashboard_port": 0, "dashboard_agent_listen_port": free_port()}
    client = JobSubmissionClient(f"http://{Cluster(initialize_head=True, head_node_args=head).webui_url}")
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": "60", "PYTHONPATH": os.environ["PYTHONPATH"]}
    wait_for_agent(client)
    first = submit(client, command, environment)
    while len(list(run_dir.glob("second/part-*"))) < 5 and not client.get_job_status(first).is_terminal():
        time.sleep(0.05)
    client.stop_job(first)
    stopped = wait(client, first)
    outcome = json.loads((run_dir / "run.json").read_text())["sessions"][-1]["outcome"]
    second = submit(client, command, environment)
    told = {"first": stopped, "outcome": outcome, "second": wait(client, second)}
    print(json.dumps(told | {"logs": client.get_job_logs(second)[-2000:]}), flush=True)
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(0)


if __name__ == "__main__":
    main()
