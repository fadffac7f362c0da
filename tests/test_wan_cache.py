"""Step caches: a repeated input gives the output without cache, branches are kept apart, nothing outlives a video."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from wan_minis import SIZE, encoder, model, sample, stock

from ipvg_ray.models.mini import wan_vace
from ipvg_ray.models.wan.cache import FirstBlock, TaylorSeer
from ipvg_ray.models.wan.guidance import Cfg, Step, Tpige
from ipvg_ray.models.wan.loop import Branch, Shared, evaluate_in_turn

TASKS = ("vace-i2v+ref", "ti2v-5B", "i2v-A14B")
CACHES: dict[str, Callable[[Any], Any]] = {
    "first_block": lambda transformer: FirstBlock(transformer, 0.05, start=1, max_skips=9),
    "taylorseer": lambda transformer: TaylorSeer(transformer, interval=3, start=2),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    wan_vace.make(root)
    return root


@pytest.fixture(scope="module")
def texts(root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    ours = encoder(stock(root, "vace-i2v"))
    return ours.states("a woman smiles"), ours.states("blurred")


def step_of(ours: Any, task: str, texts: Any) -> tuple[Shared, list[Branch]]:
    """One step of the task with the branches of TPIGE, where the task has them, else of CFG."""
    guidance: Any = Tpige(Cfg(5.0)) if task.startswith("vace") else Cfg(5.0)
    inputs = ours.inputs([sample(task, texts[0])], texts[1], SIZE, without=guidance.drops_identity)
    latents, times = inputs.condition.enter(inputs.noise, torch.tensor(950))
    transformer, step = ours.denoiser.transformers[0], Step(0, 4)
    texts_of = {"prompt": inputs.text, "negative": inputs.negative}
    branches = [
        Branch(b.name, texts_of[b.text], inputs.condition.extras(transformer, identity=b.identity, skip=b.skip), b.skip)
        for b in guidance.branches(step)
    ]
    return Shared(transformer, latents, times, step), branches


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", CACHES)
@torch.no_grad()
def test_a_repeated_input_gives_the_output_without_cache(kind: str, task: str, root: Path, texts: Any) -> None:
    shared, branches = step_of(model(root, task), task, texts)
    plain = evaluate_in_turn(shared, branches)
    assert (plain[0] - plain[1]).abs().max() > 1e-3, "branches that are mixed up would show"
    forwards: list[int] = []
    shared.transformer.blocks[3].ffn.register_forward_pre_hook(lambda *_: forwards.append(1))
    cache = CACHES[kind](shared.transformer)
    for _ in range(6):
        for ours, theirs in zip(evaluate_in_turn(shared, branches), plain, strict=True):
            assert (ours - theirs).abs().max() < 1e-5
    assert 0 < len(forwards) < 6 * len(branches), "some steps are computed, some are not"
    cache.remove()
    for ours, theirs in zip(evaluate_in_turn(shared, branches), plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_a_threshold_of_nothing_changes_nothing(task: str, root: Path, texts: Any) -> None:
    ours = model(root, task)
    job: Any = ([sample(task, texts[0])], texts[1], SIZE, Cfg(5.0), 6)
    plain = ours.denoise(*job)
    caches = [FirstBlock(transformer, 1e-12, start=1) for transformer in ours.denoiser.transformers]
    assert torch.equal(ours.denoise(*job), plain)
    assert sum(cache.skipped for cache in caches) == 0


@pytest.mark.parametrize("kind", CACHES)
def test_no_video_hears_of_the_one_before(kind: str, root: Path, texts: Any) -> None:
    ours = model(root, "vace-i2v+ref")
    cache = CACHES[kind](ours.denoiser.transformers[0])
    ours.denoiser.reset = cache.reset
    jobs: list[Any] = [([sample("vace-i2v+ref", texts[0], s, s == 8)], texts[1], SIZE, Cfg(5.0), 6) for s in (7, 8)]
    alone = ours.denoise(*jobs[0])
    ours.denoise(*jobs[1])
    assert torch.equal(ours.denoise(*jobs[0]), alone)


def test_all_ranks_decide_by_the_sums_of_all(root: Path, texts: Any) -> None:
    """A rank whose own share did not change computes all the same, where the sums of all say so."""
    shared, branches = step_of(model(root, "vace-i2v"), "vace-i2v", texts)
    asked: list[list[float]] = []

    def others_changed(sums: torch.Tensor) -> torch.Tensor:
        asked.append(sums.tolist())
        return sums + torch.tensor([float(sums[1]), 0.0])

    cache = FirstBlock(shared.transformer, 0.05, start=1, agree=others_changed)
    with torch.no_grad():
        for _ in range(3):
            evaluate_in_turn(shared, branches)
    assert cache.skipped == 0
    assert len(asked) == 2 * len(branches)
    assert all(difference == 0 and reference > 0 for difference, reference in asked)


def test_no_more_than_max_skips_in_a_row(root: Path, texts: Any) -> None:
    shared, branches = step_of(model(root, "vace-i2v"), "vace-i2v", texts)
    cache = FirstBlock(shared.transformer, 0.05, start=2, max_skips=2)
    with torch.no_grad():
        counts = []
        for _ in range(8):
            evaluate_in_turn(shared, branches[:1])
            counts.append(cache.skipped)
    assert counts == [0, 0, 1, 2, 2, 3, 4, 4]
