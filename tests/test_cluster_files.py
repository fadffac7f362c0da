"""The cluster file is one that the installed Ray's launcher accepts."""

from __future__ import annotations

from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent


def test_cluster_yaml_is_valid_and_its_head_runs_no_work() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(cluster))
    assert cluster["available_node_types"][cluster["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}


def test_there_is_a_job_for_the_pipeline_and_each_stage() -> None:
    from ipvg_ray.stages import NAMES

    assert {p.stem for p in (ROOT / "jobs").glob("*.py")} == {"run_pipeline", *NAMES}
