"""Pools fetch the nodes that their backlog needs, of the right type, and give them back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_from_the_head_alone_to_the_maximum_and_back_with_a_node_lost_on_the_way(tmp_path: Path) -> None:
    program = Path(__file__).with_name("fake_autoscaler.py")
    with tempfile.TemporaryDirectory(prefix="r") as short:  # Ray's socket paths must be short
        done = subprocess.run(
            [sys.executable, str(program), str(tmp_path), "32"],
            capture_output=True,
            text=True,
            timeout=560,
            env=os.environ | {"FAKE_TMP": short, "RAY_AUTH_MODE": "disabled"},
        )
    assert done.stdout.strip(), done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["code"], told["rows"], told["killed"]) == (0, 32, True), done.stderr[-3000:]
    assert set(told["cut"]) == {"light 1"}, "every row of the light stage ran on a node with one GPU"
    assert set(told["film"]) == {"video 8"}, "every group had the eight GPUs of one node, none ran on the head"
    assert sum(told["lost"].values()) >= 1, "run.json counts what the lost node had in work"
    seen = told["nodes"]
    assert seen[0] == seen[-1] == {"head": 1}
    most = {kind: max(now.get(kind, 0) for now in seen) for kind in ("head", "light", "video")}
    assert most["head"] == 1
    assert 1 <= most["light"] <= 2
    assert most["video"] == 2
    videos = [now.get("video", 0) for now in seen]
    top = videos.index(2)
    assert 2 in videos[top + videos[top:].index(1) :], "the node that was lost was replaced"
    assert any(now.get("video") and not now.get("light") for now in seen[top:]), (
        "nodes of the light stage went when it was done, while videos were still made"
    )
