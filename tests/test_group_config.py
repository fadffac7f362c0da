"""What the configuration allows of groups, and what the stage makes of it."""

from __future__ import annotations

import pytest

from ipvg_ray import config
from ipvg_ray.config import ConfigError
from ipvg_ray.stages.video import VideoStage


def video(*overrides: str, profile: str = "gpu") -> VideoStage:
    return VideoStage(config.load(profile, overrides=overrides))


def test_a_group_has_a_card_for_each_rank() -> None:
    stage = video("video.group={gpus: 8, ulysses: 4, cfg: 2}")
    assert stage.resources().gpus == 8
    ranks = stage.ranks()
    assert ranks is not None
    assert (ranks.size, ranks.across_nodes) == (8, False)
    assert ranks.stage is not None
    assert ranks.stage.models() == stage.models(), "the ranks' nodes must have them too"


def test_without_a_group_nothing_changes() -> None:
    assert video().ranks() is None
    assert video().resources().gpus == 1


def test_on_the_cpu_ranks_are_processes() -> None:
    stage = video("video.group={gpus: 2, ulysses: 2}", profile="cpu-mini")
    assert stage.resources().gpus == 0
    assert stage.ranks() is not None


def test_who_shares_the_work_is_no_part_of_the_fingerprint() -> None:
    assert video("video.group={gpus: 4, ulysses: 4}").fingerprint_settings() == video().fingerprint_settings()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["video.group={gpus: 8}"], r"= 1, and gpus is 8; such as \{cfg: 1, ring: 1, ulysses: 8\}"),
        (["video.group={gpus: 6, cfg: 3, ulysses: 4}"], r"= 12, and gpus is 6.*\{cfg: 3, ring: 1, ulysses: 2\}"),
        (["video.group={gpus: 3, cfg: 3}"], "group.cfg is 3, and a step has 2 branches"),
        (["video.group={gpus: 2, ulysses: 2}", "video.pool.gpus=4"], r"pool\.gpus is 4 and group\.gpus 2"),
        (["video.group={gpus: 2, ulysses: 2}", "video.pool.gpus=0.5"], r"pool\.gpus is 0\.5"),
        (["video.group={gpus: 2, cfg: 2, weights: fsdp}"], "needs ring or ulysses ranks"),
        (["video.group={across_nodes: true}"], "for groups of several gpus"),
        (["video.group={gpus: 2, ring: 2}", "video.compile=true"], "around a ring"),
        (["video.group={gpus: 2, ulysses: 2, weights: fsdp}", "video.storage=fp8"], "exclude each other"),
        (
            ["video.group={gpus: 2, ulysses: 2, weights: fsdp}", "video.cache.kind=first_block"],
            "use cache.kind: taylor",
        ),
        (["video.group.weights=offload", "video.cache.kind=first_block"], "first_block and group.weights offload"),
        (["video.group={gpus: 2, ulysses: 2, weights: fsdp}", "video.compile=true"], "use compile: false"),
        (["video.group.weights=offload", "video.compile=true"], "compile and group.weights offload exclude"),
        (["video.group={gpus: 2, ulysses: 2}", "video.guide=tpige", "video.tpige.skip=[0]"], "leaves out block 0"),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        video(*overrides)


def test_three_ranks_for_three_branches() -> None:
    ranks = video("video.group={gpus: 6, cfg: 3, ulysses: 2}", "video.guide=tpige").ranks()
    assert ranks is not None


def test_the_plan_compares_layouts() -> None:
    notes = "\n".join(video("video.group={gpus: 8, ulysses: 4, cfg: 2}", "video.pool.accelerator_type=H200").notes())
    assert "H200" in notes
    assert "most videos an hour: 1 card a video" in notes
    assert "lowest latency: 8 cards a video (cfg 2, ulysses 4)" in notes
    assert "chosen: 8 cards a video (cfg 2, ulysses 4)" in notes
    assert not video(profile="cpu-mini").notes(), "on the CPU there are no cards to lay out"
