"""Which stages fit a machine together."""

from __future__ import annotations

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
