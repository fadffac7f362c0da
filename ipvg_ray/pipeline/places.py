"""Room for groups that span nodes: placement groups, made and removed by the driver.

Made by a worker they would outlive it for as long as the job lasts, and hold their cards; so the driver makes one for
each worker that a stage may have, and a worker that comes takes one that is free.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ipvg_ray.pipeline.plan import Step
from ipvg_ray.pipeline.stage import Resources

logger = logging.getLogger(__name__)

_ASK_SECONDS = 2.0
_TELL_SECONDS = 60.0
_LEAVE_SECONDS = 600.0
"""In which a node with a notice is gone; the clouds' notices are of two minutes at most."""


@ray.remote(num_cpus=0)
class _Places:
    """Which worker of a stage has which placement group."""

    def __init__(self, places: list[Any]) -> None:
        self.free = places
        self.held: dict[str, tuple[Any, Any]] = {}

    def claim(self, worker: str, handle: Any) -> Any:
        """A placement group for this worker: after a restart its own again, else a free one, or a dead worker's.

        None where all are held by workers that live.
        """
        if worker not in self.held:
            dead = next((w for w, (_, h) in self.held.items() if _dead(h)), None) if not self.free else None
            if not self.free and dead is None:
                return None
            self.held[worker] = (self.held.pop(dead)[0] if dead else self.free.pop(), handle)
        return self.held[worker][0]


def _dead(worker: Any) -> bool:
    """Whether this actor is gone for good; one that works does not answer, and lives."""
    done, _ = ray.wait([worker.__ray_ready__.remote()], timeout=_ASK_SECONDS)
    try:
        ray.get(done)
    except ray.exceptions.ActorDiedError:
        return True
    except ray.exceptions.RayError:
        return False
    return False


@contextmanager
def places(steps: Sequence[Step]) -> Iterator[dict[str, Any]]:
    """For each step whose groups may span nodes, the actor that gives its workers their places.

    The placement groups are removed at the end, however it comes; a driver that is killed takes them with it.
    """
    # Beside the driver, as the desk: a worker's node that is lost must not take it along.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    made: list[Any] = []
    offices: dict[str, Any] = {}
    try:
        for step in steps:
            ranks, asks = step.stage.ranks(), step.stage.resources()
            if ranks is None or not ranks.across_nodes:
                continue
            labels = [dict(asks.label_selector)] * ranks.size if asks.label_selector else None
            own = [
                placement_group([rank_asks(asks)] * ranks.size, strategy="PACK", bundle_label_selector=labels)  # type: ignore[arg-type]
                for _ in range(asks.max_workers)
            ]
            made += own
            offices[step.name] = _Places.options(scheduling_strategy=here).remote(own)  # type: ignore[attr-defined]
        yield offices
    finally:
        for office in offices.values():
            ray.kill(office)
        for place in made:
            remove_placement_group(place)


def rank_asks(asks: Resources) -> dict[str, float]:
    """What one rank of a group that may span nodes takes, by Ray's names; `asks` are its stage's."""
    unit = {"GPU": 1.0} if asks.gpus else {"CPU": max(asks.cpus, 0.01)}
    if asks.accelerator_type:
        unit[f"accelerator_type:{asks.accelerator_type}"] = 0.001
    return unit


@dataclass(frozen=True)
class Room:
    """A worker's placement group, a bundle for each rank.

    Attributes:
        place: the placement group.
        lost: whether a node, by Ray's id, is gone or about to be taken away.
        waiting: entered while the nodes are waited for.
    """

    place: Any
    lost: Callable[[str], bool] = lambda node: False
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext

    def wait(self) -> None:
        """Come back when all of it is there, also after it has lost a node; as long as that takes.

        Ray looks for another node only when the lost one is gone; until then what is begun there would be lost with it.
        A node that stays though it was to be taken away is used again after a while.
        """
        with self.waiting():
            deadline = 0.0
            while True:
                while not self.place.wait(_TELL_SECONDS):
                    logger.warning("a group waits for the nodes of its ranks")
                deadline = deadline or time.monotonic() + _LEAVE_SECONDS
                if time.monotonic() > deadline or not any(self.lost(node) for node in set(_nodes(self.place).values())):
                    return
                time.sleep(_ASK_SECONDS)

    def bundles(self) -> list[int]:
        """The bundles' numbers, those of one node side by side, so that neighbouring ranks share a node."""
        nodes = _nodes(self.place)
        return sorted(nodes, key=lambda bundle: (nodes[bundle], bundle))


def _nodes(place: Any) -> dict[int, str]:
    nodes: dict[int, str] = placement_group_table(place)["bundles_to_node_id"]
    return nodes


def claimed(office: Any) -> Any:
    """This worker's placement group.

    Raises:
        RuntimeError: where other workers hold all there are.
    """
    here = ray.get_runtime_context()
    place = ray.get(office.claim.remote(here.get_actor_id(), here.current_actor))
    if place is None:
        raise RuntimeError("there are more workers than places for their groups")
    return place
