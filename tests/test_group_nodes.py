"""A group that spans nodes, one of which is a spot node that its cloud takes away."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from group_ranks import Adder, asking, journal
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from test_spot import Cloud, metadata

from ipvg_ray.pipeline.groups import LedGroup
from ipvg_ray.pipeline.places import Room
from ipvg_ray.pipeline.spot import Notice

pytestmark = pytest.mark.slow


@ray.remote(num_cpus=0, max_concurrency=2)
class Leader:
    """A stage's worker as far as its group is concerned; it holds `lost` to be leaving."""

    def __init__(self, folder: Path, place: Any) -> None:
        self.lost: set[str] = set()
        room = Room(place, lost=lambda node: node in self.lost)
        self.group = LedGroup(asking(functools.partial(Adder, folder), across_nodes=True), "cpu", 1, room)

    def run(self, *args: Any) -> Any:
        return self.group.run("add", *args)

    def lose(self, node: str) -> None:
        self.lost.add(node)

    def notice(self) -> Notice | None:
        return self.group.notice()

    def close(self) -> None:
        self.group.close()


@pytest.fixture
def cluster() -> Iterator[tuple[Cluster, Any, Cloud]]:
    """A head with room for one rank, and a spot node with room for the other."""
    with metadata("aws") as (cloud, address):
        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "include_dashboard": False, "env_vars": {"IPVG_RAY_METADATA": "off"}},
        )
        doomed = made.add_node(num_cpus=1, env_vars={"IPVG_RAY_METADATA": address})
        ray.init(address=made.address, log_to_driver=False)
        yield made, doomed, cloud
        ray.shutdown()
        made.shutdown()


def test_the_leader_hears_the_notice_of_its_rank_s_node_and_waits_for_another(
    cluster: tuple[Cluster, Any, Cloud], tmp_path: Path
) -> None:
    made, doomed, cloud = cluster
    place = placement_group([{"CPU": 1}] * 2, strategy="PACK")
    here = NodeAffinitySchedulingStrategy(made.head_node.node_id, soft=False)
    leader = Leader.options(scheduling_strategy=here).remote(tmp_path, place)
    expected = ray.get(leader.run.remote(5, 4))
    assert ray.get(leader.notice.remote()) is None
    cloud.taken = True
    notice = ray.get(leader.notice.remote())
    assert (notice.cloud, notice.node) == ("aws", doomed.node_id)

    ray.get([leader.close.remote(), leader.lose.remote(doomed.node_id)])
    running = leader.run.remote(5, 4)
    before = len(journal(tmp_path))
    time.sleep(3)
    assert len(journal(tmp_path)) == before, "nothing is begun on a node that is about to go"
    made.add_node(num_cpus=1, env_vars={"IPVG_RAY_METADATA": "off"})
    made.remove_node(doomed)
    assert ray.get(running, timeout=120) == expected
    assert ray.get(leader.notice.remote()) is None, "no rank is on the node that went"
    remove_placement_group(place)
