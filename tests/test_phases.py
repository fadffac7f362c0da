"""Which stages fit a machine together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from ipvg_ray.pipeline.space import _pack


@pytest.mark.parametrize(
    ("asks", "nodes", "fits"),
    [
        ([0.1, 0.1, 0.8], [1], True),
        ([0.6, 0.6, 0.6], [2], False),
        ([0.6, 0.6, 0.4], [2], True),
        ([8], [4, 4], False),
        ([4, 4], [4, 4], True),
        ([2, 0.5, 0.5], [3], True),
        ([2, 1, 0.5], [3], False),
        ([], [], True),
        ([0.1], [], False),
    ],
)
def test_shares_stay_on_a_card_and_groups_on_a_node(asks: list[float], nodes: list[float], fits: bool) -> None:
    assert _pack(asks, nodes) is fits


def test_a_label_that_no_node_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine_driver import STAGES, FakeConfig, FakeSection

    from ipvg_ray.config import PoolConfig
    from ipvg_ray.pipeline import space
    from ipvg_ray.pipeline.plan import make_steps

    def lacking(value: str) -> str:
        section = FakeSection(pool=PoolConfig(cpus=1, label_selector={"ipvg-ray/pool": value}))
        return space._lacking(make_steps([STAGES[0](FakeConfig(first=section))]), {"CPU": 4.0}, [])  # type: ignore[arg-type]

    node = {"Alive": True, "Labels": {"ipvg-ray/pool": "cpu"}, "Resources": {"CPU": 4.0}}
    monkeypatch.setattr(
        space.ray, "nodes", lambda: [node, node | {"Alive": False, "Labels": {"ipvg-ray/pool": "gone"}}]
    )
    assert lacking("cpu") == lacking("in(gpu, cpu)") == lacking("!gpu") == ""
    assert "a node with the label ipvg-ray/pool=gpu, and there is none" in lacking("gpu")
    assert "ipvg-ray/pool=gone" in lacking("gone")


@pytest.mark.parametrize(("gpus", "kind"), [(2.0, "GPU"), (0.0, "CPU")])
def test_places_of_groups_that_span_nodes_are_counted_for_all_workers(
    gpus: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their placement groups are made for max_workers at once, and a pool beside them would wait for ever."""
    from ipvg_ray.pipeline import space
    from ipvg_ray.pipeline.stage import Ranks, Resources

    def lacking(there: float, across: bool) -> str:
        asks = Resources(cpus=1, gpus=gpus, max_workers=3)
        stage = SimpleNamespace(resources=lambda: asks, ranks=lambda: Ranks(2, lambda context: None, across))
        cards = [there] if kind == "GPU" else []
        return space._lacking([SimpleNamespace(stage=stage)], {"CPU": 2.0, kind: there}, cards)  # type: ignore[list-item]

    monkeypatch.setattr(space.ray, "nodes", list)
    needed = 6.0 if gpus else 1 + 1 + 6.0
    assert lacking(needed, across=True) == ""
    assert lacking(needed - 1, across=True) == f"{needed:g} {kind}s, and there are {needed - 1:g}"
    assert lacking(2.0, across=False) == ""


def test_places_are_on_nodes_with_the_pool_s_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    from ipvg_ray.pipeline import places
    from ipvg_ray.pipeline.stage import Ranks, Resources

    made: list[dict[str, Any]] = []
    where: list[str] = []
    office = SimpleNamespace(remote=list)
    monkeypatch.setattr(places, "placement_group", lambda bundles, **asked: made.append(asked | {"bundles": bundles}))
    monkeypatch.setattr(places, "remove_placement_group", lambda place: None)
    monkeypatch.setattr(places.ray, "kill", lambda actor: None)
    monkeypatch.setattr(places.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "a" * 56))
    monkeypatch.setattr(
        places,
        "_Places",
        SimpleNamespace(options=lambda scheduling_strategy: where.append(scheduling_strategy.node_id) or office),
    )
    asks = Resources(gpus=2, max_workers=2, label_selector={"ipvg-ray/pool": "eight-gpu"})
    stage = SimpleNamespace(resources=lambda: asks, ranks=lambda: Ranks(2, lambda context: None, True))
    with places.places([SimpleNamespace(name="led", stage=stage)]):  # type: ignore[list-item]
        pass
    assert [place["bundles"] for place in made] == [[{"GPU": 1.0}] * 2] * 2
    assert [place["bundle_label_selector"] for place in made] == [[{"ipvg-ray/pool": "eight-gpu"}] * 2] * 2
    assert where == ["a" * 56], "beside the driver"
