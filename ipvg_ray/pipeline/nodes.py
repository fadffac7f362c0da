"""What kinds of nodes a cluster may have, read from its file: that of Ray's launcher, or a KubeRay manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ipvg_ray.errors import UserError
from ipvg_ray.pipeline.stage import Resources

_MARKET = "ray.io/market-type"
_CARD = "accelerator_type:"


class ClusterFileError(UserError, ValueError):
    """A cluster file from which a run cannot be planned; names the node type and the field."""


@dataclass(frozen=True)
class Kind:
    """Nodes that are alike but for how they are bought, such as spot and on demand.

    Attributes:
        types: names of the node types, the one that is tried first at the front.
        cpus, gpus: of one node.
        labels: without the one that says how it is bought.
        cards: names of its accelerators, as Ray knows them.
        most: nodes of the first type at most.
        spot: whether the first type can be taken away.
    """

    types: tuple[str, ...]
    cpus: float
    gpus: float
    labels: tuple[tuple[str, str], ...] = ()
    cards: tuple[str, ...] = ()
    most: int = 1
    spot: bool = False

    def fits(self, asks: Resources) -> bool:
        """Whether one worker fits on such a node. Selectors other than plain values are taken to fit."""
        plain = {key: v for key, v in asks.label_selector.items() if not v.startswith(("!", "in("))}
        right = plain.items() <= dict(self.labels).items()
        right = right and (asks.accelerator_type is None or asks.accelerator_type in self.cards)
        return right and self.room(asks) > 0

    def room(self, asks: Resources) -> int:
        """Workers that an empty node holds: shares of a card never span two, groups of cards never two nodes."""
        by_cpu = int(self.cpus / asks.cpus + 1e-9) if asks.cpus else 10**6
        if not asks.gpus:
            return by_cpu
        by_gpu = int(self.gpus // asks.gpus) if asks.gpus >= 1 else int(self.gpus) * int(1 / asks.gpus + 1e-9)
        return min(by_cpu, by_gpu)


def one_machine(gpus: float, cpus: float = 1e6) -> list[Kind]:
    """A single node, for plans without a cluster file."""
    return [Kind(("gpus",), cpus, gpus)]


def read_cluster(file: Path) -> tuple[list[Kind], str]:
    """The kinds of nodes in a cluster file, those with fewer cards first, and the name of the head's type.

    Raises:
        ClusterFileError: for a file that is no cluster file, or whose node types do not say what they have.
    """
    try:
        tree = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ClusterFileError(f"cannot read the cluster file {file}: {error}") from error
    if isinstance(tree, dict) and tree.get("kind") == "RayCluster":
        head, types = "head", _of_manifest(tree["spec"])
    elif isinstance(tree, dict) and "available_node_types" in tree:
        head, types = str(tree.get("head_node_type")), dict(tree["available_node_types"])
    else:
        raise ClusterFileError(f"{file} has no available_node_types and is no RayCluster manifest")
    types.pop(head, None)
    for name, node in types.items():
        if "CPU" not in node.get("resources", {}):
            raise ClusterFileError(f"{file}: node type {name} must say its CPU (and GPU) under resources")
    return _kinds(types), head


def _kinds(types: Mapping[str, Any]) -> list[Kind]:
    alike: dict[Any, list[str]] = {}
    for name, node in types.items():
        labels = {key: value for key, value in node.get("labels", {}).items() if key != _MARKET}
        what = (tuple(sorted(labels.items())), tuple(sorted(node["resources"].items())))
        alike.setdefault(what, []).append(name)
    kinds = []
    for (labels, resources), names in alike.items():
        names.sort(key=lambda name: -types[name].get("priority", 0))
        first, has = types[names[0]], dict(resources)
        kinds.append(
            Kind(
                types=tuple(names),
                cpus=float(has["CPU"]),
                gpus=float(has.get("GPU", 0)),
                labels=labels,
                cards=tuple(key.removeprefix(_CARD) for key in has if key.startswith(_CARD)),
                most=int(first.get("max_workers", 1)),
                spot=first.get("labels", {}).get(_MARKET) == "spot",
            )
        )
    return sorted(kinds, key=lambda kind: kind.gpus)


def _of_manifest(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Worker groups of a RayCluster as the launcher's node types."""
    types = {}
    for group in spec.get("workerGroupSpecs", []):
        limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
        resources = {key: float(value) for key, value in group.get("resources", {}).items()}
        if "cpu" in limits:
            resources.setdefault("CPU", _cores(limits["cpu"]))
        resources.setdefault("GPU", float(limits.get("nvidia.com/gpu", 0)))
        types[group["groupName"]] = {
            "resources": resources,
            "labels": group.get("labels", {}),
            "max_workers": group["maxReplicas"] * group.get("numOfHosts", 1),
            "priority": group.get("priority", 0),
        }
    return types


def _cores(quantity: str | float) -> float:
    text = str(quantity)
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def places(stages: Mapping[str, Resources], kinds: Sequence[Kind]) -> dict[str, Kind]:
    """The kind of node each stage goes to: of those it fits on the one with the fewest cards.

    Raises:
        ClusterFileError: for a stage that fits on none.
    """
    found = {}
    for name, asks in stages.items():
        fitting = [kind for kind in kinds if kind.fits(asks)]
        if not fitting:
            wants = (
                f"{asks.cpus:g} CPU, {asks.gpus:g} GPU {asks.accelerator_type or ''} {dict(asks.label_selector) or ''}"
            )
            raise ClusterFileError(f"{name} asks for {wants.strip()}, and no node type of the cluster file has that")
        found[name] = fitting[0]
    return found
