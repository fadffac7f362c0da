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
