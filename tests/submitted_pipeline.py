"""The miniature pipeline as a job, from an identity set in S3 to a run in S3, on labelled nodes behind an idle head;
stopped in the middle, and submitted again.

usage: python submitted_pipeline.py MODELS IDENTITIES CONFIG
Prints one JSON object: how both submissions ended, what they said, and what the run then holds.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from job_on_a_cluster import free_port, wait_for_agent
from s3_server import s3_server

from ipvg_ray import tables
from ipvg_ray.storage import S3Path

ROOT = S3Path("runs", "mini")
STAGES = ("faces", "matting", "prompts", "text_states", "first_frame", "video", "evaluate")


def parts() -> dict[str, str]:
    """Part files of the run, with the version of each."""
    listed = ROOT._call("list_objects_v2", Prefix=f"{ROOT.key}/run/")
    return {o["Key"]: o["ETag"] for o in listed.get("Contents", []) if "/part-" in o["Key"]}


def submit(address: str, models: str, config: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ipvg_ray", "submit", "--address", address, "--"]
    command += [f"{ROOT}/identities", "--out", f"{ROOT}/run", "--profile", "cpu-mini", "-c", config]
    command += ["--set", f"models.root={models}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main() -> None:
    models, identities, config = sys.argv[1:]
    with pytest.MonkeyPatch.context() as environment, s3_server(environment):
        for file in Path(identities).rglob("*"):
            if file.is_file():
                (ROOT / f"identities/{file.relative_to(identities)}").upload(file)
        from ray.cluster_utils import Cluster  # after the environment is set: its processes inherit it
        from ray.job_submission import JobSubmissionClient

        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": 0}
        head |= {"dashboard_agent_listen_port": free_port()}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        for pool in ("one-gpu", "eight-gpu"):
            # Each with its own folder for packages, as machines have: one node's clearing up takes no other's away.
            cluster.add_node(num_cpus=2, labels={"ipvg-ray/pool": pool}, runtime_env_dir_name=f"packages-{pool}")
        address = f"http://{cluster.webui_url}"
        client = JobSubmissionClient(address)
        wait_for_agent(client)

        first = submit(address, models, config)
        while len([key for key in parts() if "/first_frame/" in key]) < 1 and first.poll() is None:
            time.sleep(0.3)
        for job in client.list_jobs():
            if job.submission_id and job.submission_id.startswith("ipvg-ray"):
                client.stop_job(job.submission_id)
        said = first.communicate(timeout=300)[0]
        kept = parts()
        second = submit(address, models, config)
        then = second.communicate(timeout=700)[0]
        ended = parts()
        keys = {
            stage: collections.Counter(
                key
                for part in tables.parts(ROOT / "run", stage)
                for key in tables.read_part(part)[tables.key_columns(stage)[-1]].to_pylist()
            )
            for stage in STAGES
        }
        told = {
            "first": first.returncode,
            "said": said,
            "second": second.returncode,
            "then": then,
            "kept": sum(ended.get(key) == tag for key, tag in kept.items()) == len(kept) and len(kept),
            "rows": {stage: sum(found.values()) for stage, found in keys.items()},
            "most": max(max(found.values(), default=0) for found in keys.values()),
            "videos": len(list((ROOT / "run/videos").rglob("*.mp4"))),
            "report": (ROOT / "run/report.html").is_file(),
            "outcomes": [session["outcome"] for session in tables.read_run(ROOT / "run")["sessions"]],
            "logs": [
                json.loads(line)["event"]
                for p in (ROOT / "run/_engine").rglob("log.jsonl")
                for line in p.read_text().splitlines()
            ],
        }
        print(json.dumps(told), flush=True)
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(0)


if __name__ == "__main__":
    main()
