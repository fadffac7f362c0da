"""The cluster files are ones that the installed Ray accepts, and stages find their nodes in them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from ipvg_ray import config

ROOT = Path(__file__).parent.parent
LAUNCHED = ["cluster.yaml", "deploy/cluster-gcp.yaml"]
KUBERAY = ROOT / "deploy/kuberay"


def load(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / name).read_text()))


def node_types(name: str) -> dict[str, Any]:
    """Node types by name, as Ray's autoscaler reads them from any of the files."""
    if name in LAUNCHED:
        from ray.autoscaler._private.util import prepare_config

        return dict(prepare_config(load(name))["available_node_types"])
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as read

    types = dict(read(load(name))["available_node_types"])
    types["head"] = types.pop("headgroup")
    return types


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_launcher_takes_the_file_and_nothing_runs_on_the_head(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = load(name)
    validate_config(prepare_config(cluster))
    assert cluster["available_node_types"][cluster["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}
    assert any("RAY_enable_autoscaler_v2=1" in line for line in cluster["head_start_ray_commands"]), "for priorities"
    assert all("0.0.0.0" not in line for line in cluster["head_start_ray_commands"]), "ports are bound to loopback"


@pytest.mark.parametrize("name", [*LAUNCHED, "deploy/kuberay/raycluster.yaml"])
def test_spot_nodes_come_first_and_on_demand_nodes_are_alike(name: str) -> None:
    types = node_types(name)
    assert types["head"]["resources"]["CPU"] == types["head"]["resources"].get("GPU", 0) == 0
    assert {"cpu", "head"} < set(types)
    for kind, cards in (("one-gpu", 1), ("eight-gpu", 8)):
        spot, other = types[f"{kind}-spot"], types[f"{kind}-on-demand"]
        assert spot["resources"] == other["resources"]
        assert spot["resources"]["GPU"] == cards
        assert spot["priority"] > other["priority"]
        assert spot["labels"] == {"ipvg-ray/pool": kind, "ray.io/market-type": "spot"}
        assert other["labels"] == {"ipvg-ray/pool": kind, "ray.io/market-type": "on-demand"}
        assert spot["min_workers"] == other["min_workers"] == 0, "an idle cluster is its head alone"


@pytest.mark.parametrize("name", [*LAUNCHED, "deploy/kuberay/raycluster.yaml"])
def test_every_stage_of_the_pools_file_fits_a_kind_of_node(name: str) -> None:
    from ipvg_ray.stages import make_stages

    for stage in make_stages(config.load("gpu", file=ROOT / "deploy/pools.yaml")):
        asks = stage.resources()
        fits = [
            kind
            for kind, node in node_types(name).items()
            if asks.label_selector.items() <= node["labels"].items()
            and asks.cpus <= node["resources"]["CPU"]
            and asks.gpus <= node["resources"].get("GPU", 0)
            and (not asks.accelerator_type or f"accelerator_type:{asks.accelerator_type}" in node["resources"])
        ]
        assert len(fits) == 2, f"{stage.name} finds its spot and its on-demand nodes in {name}"


def test_manifests_name_only_fields_that_kuberay_has() -> None:
    known = load("tests/kuberay_fields.yaml")
    known = {place: set(fields) for place, fields in known.items()}

    def check(value: Any, place: str) -> None:
        shown = place[place.index("template.") :] if "template." in place else place
        if isinstance(value, list):
            for entry in value:
                check(entry, place)
        elif isinstance(value, dict):
            if shown in known:
                assert set(value) <= known[shown], place
            for key, below in value.items():
                check(below, f"{place}.{key}")

    for kind, name in (("RayCluster", "raycluster"), ("RayJob", "rayjob")):
        manifest = yaml.safe_load((KUBERAY / f"{name}.yaml").read_text())
        assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
        check(manifest, kind)


def test_the_cluster_runs_the_ray_that_is_pinned() -> None:
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    version = pinned.partition("==")[2]
    cluster = load("deploy/kuberay/raycluster.yaml")
    assert cluster["spec"]["rayVersion"] == version
    assert cluster["spec"]["autoscalerOptions"]["version"] == "v2"
    for name in LAUNCHED:
        commands = load(name)["head_setup_commands"] + load(name)["worker_setup_commands"]
        assert all(f"=={version}" in line for line in commands)


def test_the_manifest_of_the_job_calls_the_command_as_it_is() -> None:
    from typer.main import get_command

    from ipvg_ray.cli import app

    job = load("deploy/kuberay/rayjob.yaml")["spec"]
    words = shlex.split(job["entrypoint"])
    assert words[0] == "ipvg-ray"
    command = get_command(app)
    name, found, rest = command.resolve_command(command.make_context("ipvg-ray", [], resilient_parsing=True), words[1:])
    assert name == "run"
    found.make_context(name, rest)  # raises for an option that is not there
    wait = yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    assert float(wait) > config.Config().stop_grace_s, "Ray would kill before the grace is over"


@pytest.mark.parametrize("path", [ROOT / "cluster.yaml", *sorted((ROOT / "deploy").rglob("*.yaml"))], ids=str)
def test_no_file_holds_a_key(path: Path) -> None:
    text = path.read_text()
    for mark in ("AKIA", "aws_secret_access_key", "PRIVATE KEY", "ssh_private_key", "password"):
        assert mark not in text


def test_there_is_a_job_for_the_pipeline_and_each_stage() -> None:
    from ipvg_ray.stages import NAMES

    assert {p.stem for p in (ROOT / "jobs").glob("*.py")} == {"run_pipeline", *NAMES}
