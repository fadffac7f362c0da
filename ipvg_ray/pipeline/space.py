"""Which stages a machine or a cluster can hold at once: their smallest pools against what is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import ray

from ipvg_ray.errors import UserError
from ipvg_ray.pipeline.places import rank_asks
from ipvg_ray.pipeline.plan import Step
from ipvg_ray.pipeline.stage import Ranks
from ipvg_ray.pipeline.stall import Room

HELPER_CPUS = 1.0
"""What Ray Data's own tasks, which cut streams into batches, want free on one node; it cannot be lowered."""


class ResourceError(UserError):
    """The machine cannot hold a stage's smallest pool."""


def phases(steps: Sequence[Step], in_turn: bool, say: Callable[[str], None]) -> list[list[Step]]:
    """The steps in groups whose smallest pools fit this machine together, each to be one streaming execution.

    Where all fit, that is one group. Ray Data would wait for ever on pools that do not: so a machine with one GPU runs
    stage after stage through the checkpoints. A cluster that others started may grow, so there all stages run at once
    unless `in_turn`.

    Args:
        say: told where stages run in turn, or wait for nodes.

    Raises:
        ResourceError: where a stage does not even fit alone; names what it asks for and what is there.
    """
    there = ray.cluster_resources()
    cards = [node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]]
    if os.environ.get("RAY_ADDRESS") and not in_turn:
        if lacking := _lacking(steps, there, cards):
            say(f"waiting for nodes: the smallest pools want {lacking} now; if no nodes will come, use --in-turn")
        return [list(steps)]
    groups: list[list[Step]] = [[]]
    for step in steps:
        if lacking := _lacking([step], there, cards):
            raise ResourceError(f"{step.name} asks for {lacking}; lower {step.name}.pool, or use a larger machine")
        if _lacking([*groups[-1], step], there, cards):
            groups.append([])
        groups[-1].append(step)
    if len(groups) > 1:
        order = " | ".join(", ".join(step.name for step in group) for group in groups)
        say(f"this machine cannot hold all stages at once; one group after another: {order}")
    return groups


def room() -> Room:
    """What the cluster has now. What is free on each node Ray tells only to developers (ray < 2.64)."""
    alive = {node["NodeID"]: node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]}
    free = ray._private.state.available_resources_per_node()  # type: ignore[attr-defined]
    most = max((free.get(node, {}).get("CPU", 0.0) for node in alive), default=0.0)
    return Room(frozenset(alive), sum(alive.values()), most)


def _lacking(steps: Sequence[Step], there: dict[str, float], cards: Sequence[float]) -> str:
    """What these steps' smallest pools, and Ray Data's own tasks, want beyond what is there; empty where they fit."""
    pools = [step.stage.resources() for step in steps]
    wanted = {"CPU": HELPER_CPUS + sum(p.cpus * p.min_workers for p in pools) + sum(map(_rank_cpus, steps))}
    wanted["memory"] = sum(p.memory_gb * 2**30 * p.min_workers for p in pools)
    wanted["GPU"] = sum(sum(_card_asks(step)) for step in steps)
    short = [
        f"{need / 2**30:.0f} GiB of memory, and there are {there.get(kind, 0) / 2**30:.0f}"
        if kind == "memory"
        else f"{need:g} {kind}s, and there are {there.get(kind, 0):g}"
        for kind, need in wanted.items()
        if need > there.get(kind, 0) + 1e-6
    ]
    if not short and not _pack([ask for step in steps for ask in _card_asks(step)], cards):
        short.append(f"GPU shares that do not fit whole into {sum(cards):g} cards")
    types = {p.accelerator_type for p in pools if p.accelerator_type}
    short += [f"a card of type {t}, and there is none" for t in sorted(types) if not there.get(f"accelerator_type:{t}")]
    labels = [node.get("Labels", {}) for node in ray.nodes() if node["Alive"]]
    for key, value in sorted({item for p in pools for item in p.label_selector.items()}):
        if value[:1] != "!" and not any(seen.get(key, "") in _values(value) for seen in labels):
            short.append(f"a node with the label {key}={value}, and there is none")
    return " and ".join(short)


def _card_asks(step: Step) -> list[float]:
    """What a step's smallest pool asks of cards, in portions that must each lie on one node.

    Groups that may span nodes have their places reserved before the first row, for as many workers as there may be.
    """
    asks = step.stage.resources()
    return [1.0] * int(asks.gpus) * asks.max_workers if _spanning(step) else [asks.gpus] * asks.min_workers


def _rank_cpus(step: Step) -> float:
    """What the places of groups that may span nodes reserve of CPUs, beside what their leaders ask for."""
    asks, ranks = step.stage.resources(), _spanning(step)
    return rank_asks(asks).get("CPU", 0.0) * ranks.size * asks.max_workers if ranks else 0.0


def _spanning(step: Step) -> Ranks | None:
    """The ranks of a step's groups, where those may span nodes."""
    ranks = step.stage.ranks()
    return ranks if ranks and ranks.across_nodes else None


def _values(selector: str) -> list[str]:
    """The label values that a selector without a `!` stands for: `a`, or `in(a,b)`."""
    if selector.startswith("in(") and selector.endswith(")"):
        return [value.strip() for value in selector[3:-1].split(",")]
    return [selector]


def _pack(asks: Sequence[float], nodes: Sequence[float]) -> bool:
    """Whether shares and groups of cards fit: a share never spans two cards, a group never two nodes. First fit."""
    free = [[1.0] * int(cards) for cards in nodes]
    for ask in sorted(asks, reverse=True):
        if ask <= 0:
            continue
        if ask >= 1:
            node = next((n for n in free if sum(card == 1.0 for card in n) >= ask), None)
            taken = [i for i, card in enumerate(node or []) if card == 1.0][: int(ask)]
            share = 1.0
        else:
            node = next((n for n in free if any(card >= ask - 1e-9 for card in n)), None)
            taken = [i for i, card in enumerate(node or []) if card >= ask - 1e-9][:1]
            share = ask
        if node is None:
            return False
        for i in taken:
            node[i] -= share
    return True
