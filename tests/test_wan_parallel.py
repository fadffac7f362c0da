"""Splitting a video's work over ranks: what N gloo ranks make together equals what one process makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import wan_ranks
from torch.distributed.tensor import DTensor

from ipvg_ray.config import VideoConfig
from ipvg_ray.models.mini import wan_vace
from ipvg_ray.models.wan import tiles
from ipvg_ray.models.wan.cache import FirstBlock, TaylorSeer
from ipvg_ray.models.wan.guidance import Cfg, Step, Tpige
from ipvg_ray.models.wan.loop import Denoiser, evaluate_in_turn
from ipvg_ray.models.wan.maker import VideoMaker
from ipvg_ray.models.wan.parallel import (
    Axis,
    Layout,
    Mesh,
    ParallelError,
    rotated,
    split_branches,
    split_transformer,
    summed,
)
from ipvg_ray.models.wan.ring import attention_with_lse
from ipvg_ray.models.wan.weights import place

LAYOUTS = {
    2: [Layout(ulysses=2), Layout(ring=2)],
    4: [Layout(ulysses=4), Layout(ring=4), Layout(ring=2, ulysses=2), Layout(cfg=2, ulysses=2)],
}
# 24 tokens divide by 2 and 4, 45 do not, and of 5 tokens the last of four ranks gets none at all.
SIZES = {"even": (2, 6, 8), "odd": (3, 6, 10), "few": (5, 2, 2)}
TASKS = ("vace", "t2v", "i2v", "ti2v", "a14b")


def _errors(rank: int, ranks: int) -> dict[str, float]:
    """Largest difference from a single process, for every layout of so many ranks, task, size and head count."""
    found = {}
    for layout in LAYOUTS[ranks]:
        mesh = Mesh(layout, "cpu")
        for task in TASKS:
            for heads in (4, 5):
                model = wan_ranks.transformer(task, heads)
                sizes = SIZES if heads == 4 else {"odd": SIZES["odd"]}
                given = {name: wan_ranks.inputs(task, size, 2 if name == "even" else 1) for name, size in sizes.items()}
                alone = {name: model(**arguments)[0] for name, arguments in given.items()}
                split_transformer(model, mesh)
                for name, arguments in given.items():
                    error = (model(**arguments)[0] - alone[name]).abs().max().item()
                    found[f"{layout} {task} {heads} heads {name}"] = error
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_task_and_layout_equals_a_single_process(ranks: int, tmp_path: Any) -> None:
    for found in wan_ranks.on_ranks(_errors, ranks, tmp_path, ranks):
        assert len(found) == len(LAYOUTS[ranks]) * len(TASKS) * 4
        worst = max(found, key=found.__getitem__)
        assert found[worst] < 1e-5, f"{worst}: {found[worst]}"


def _decoded(rank: int, ranks: int) -> dict[str, float]:
    axis = Axis(torch.distributed.group.WORLD, ranks, rank)
    found = {}
    for version in ("2.1", "2.2"):
        vae = wan_ranks.vae(version)
        # 7 rows do not divide; 3 are fewer than four ranks
        for height, width, frames in ((8, 6, 3), (7, 5, 1), (3, 4, 2)):
            latents = torch.randn(
                1, vae.config.z_dim, frames, height, width, generator=torch.Generator().manual_seed(1)
            )
            alone = vae.decode(latents, return_dict=False)[0]
            found[f"{version} {height}"] = (tiles.decode(vae, latents, axis) - alone).abs().max().item()
            again = vae.decode(latents, return_dict=False)[0]
            assert torch.equal(again, alone), "the decoder is left as it was"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_bands_of_a_picture_equal_the_whole(ranks: int, tmp_path: Any) -> None:
    for found in wan_ranks.on_ranks(_decoded, ranks, tmp_path, ranks):
        assert len(found) == 6
        assert max(found.values()) < 1e-5, found


def test_attention_with_lse_is_attention() -> None:
    q, k, v = torch.randn(3, 2, 7, 3, 16).unbind(0)
    out, lse = attention_with_lse(q, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(out, expected.transpose(1, 2))
    scores = torch.einsum("blhd,bmhd->blhm", q, k) / 4
    torch.testing.assert_close(lse[..., 0], scores.logsumexp(-1))


def test_rotation_is_the_library_s() -> None:
    """Seen through the library's own processor, whose rotation is a local function."""
    model = wan_ranks.transformer("t2v")
    states = torch.randn(1, 6, 4, 24)
    cos, sin = model.rope(torch.zeros(1, 16, 1, 4, 6))
    pairs = torch.view_as_complex(states.unflatten(-1, (-1, 2)).double().contiguous())
    turn = torch.complex(cos[..., 0::2].double(), sin[..., 1::2].double())
    expected = torch.view_as_real(pairs * turn).flatten(-2)
    torch.testing.assert_close(rotated(states, cos, sin).double(), expected, atol=1e-6, rtol=1e-5)


def test_a_layout_that_does_not_fit_the_group_is_refused() -> None:
    with pytest.raises(ParallelError, match="is for 4 ranks, and the group has 1"):
        Mesh(Layout(cfg=2, ulysses=2), "cpu")


def _fsdp_error(rank: int) -> tuple[float, int, int]:
    mesh = Mesh(Layout(ulysses=2), "cpu")
    model, given = wan_ranks.transformer("vace"), wan_ranks.inputs("vace", SIZES["odd"])
    alone, whole = model(**given)[0], sum(p.numel() for p in model.blocks.parameters())
    place(model, "fsdp", "cpu", mesh)
    split_transformer(model, mesh)
    error = (model(**given)[0] - alone).abs().max().item()
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.blocks.parameters())
    return error, held, whole


@pytest.mark.slow
def test_cut_weights_give_the_same_and_take_half_between_forwards(tmp_path: Any) -> None:
    for error, held, whole in wan_ranks.on_ranks(_fsdp_error, 2, tmp_path):
        assert error < 1e-5
        assert held < 0.51 * whole


def test_weights_are_not_cut_between_branches() -> None:
    with pytest.raises(ParallelError, match="only be cut over ring and Ulysses ranks"):
        place(wan_ranks.transformer("t2v"), "fsdp", "cpu", None)


BRANCHES = {2: [Layout(cfg=2)], 4: [Layout(cfg=2, ulysses=2), Layout(cfg=2, ring=2), Layout(cfg=4)]}
GUIDANCE = {"cfg": Cfg(5.0), "tpige": Tpige(Cfg(5.0)), "none": Cfg(1.0)}


def _loop_errors(rank: int, ranks: int) -> dict[str, float]:
    """Three steps of the loop on each guidance: largest difference of the final latents from a single process's."""
    found = {}
    for layout in BRANCHES[ranks]:
        mesh = Mesh(layout, "cpu")
        for name, guidance in GUIDANCE.items():
            model = wan_ranks.transformer("vace")
            given = wan_ranks.loop_inputs()
            alone = Denoiser([model], wan_ranks.scheduler)(given, guidance, 3)
            split_transformer(model, mesh)
            calls: list[int] = []

            def counted(shared: Any, branches: Any, calls: list[int] = calls) -> list[torch.Tensor]:
                calls.append(len(branches))
                return evaluate_in_turn(shared, branches)

            together = Denoiser([model], wan_ranks.scheduler, evaluate=split_branches(counted, mesh.cfg))
            found[f"{layout} {name}"] = (together(given, guidance, 3) - alone).abs().max().item()
            branches = len(guidance.branches(Step(0, 3)))
            assert sum(calls) == 3 * len(range(mesh.cfg.rank, branches, layout.cfg)), "each rank computes its share"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_branches_dealt_to_ranks_equal_a_single_process(ranks: int, tmp_path: Any) -> None:
    for found in wan_ranks.on_ranks(_loop_errors, ranks, tmp_path, ranks):
        assert len(found) == len(BRANCHES[ranks]) * len(GUIDANCE)
        assert max(found.values()) < 1e-5, found


def _cached_errors(rank: int) -> dict[str, tuple[float, int]]:
    """Of loops with step caches: largest difference from a single process with the same cache, and steps left out."""
    mesh, found = Mesh(Layout(ulysses=2), "cpu"), {}
    for kind in ("first_block", "taylorseer"):
        latents = []
        for split in (False, True):
            model = wan_ranks.transformer("vace")
            agree = (lambda sums: summed(sums, mesh)) if split else (lambda sums: sums)
            if kind == "first_block":
                cache: Any = FirstBlock(model, 0.5, 2, 2, agree)
            else:
                cache = TaylorSeer(model, 2, 2)
            if split:
                split_transformer(model, mesh)
            loop = Denoiser([model], wan_ranks.scheduler, reset=cache.reset)
            latents.append(loop(wan_ranks.loop_inputs(), Cfg(5.0), 8))
        skipped = cache.skipped if kind == "first_block" else 1
        found[kind] = ((latents[1] - latents[0]).abs().max().item(), skipped)
    return found


@pytest.mark.slow
def test_caches_under_a_split_sequence_equal_a_single_process(tmp_path: Any) -> None:
    first, second = wan_ranks.on_ranks(_cached_errors, 2, tmp_path)
    assert first == second, "ranks decide alike"
    for error, skipped in first.values():
        assert error < 1e-5
        assert skipped > 0, "a cache that leaves nothing out proves nothing"


def _compiled_error(rank: int) -> float:
    mesh = Mesh(Layout(ulysses=2), "cpu")
    model, given = wan_ranks.transformer("vace"), wan_ranks.inputs("vace", SIZES["odd"])
    alone = model(**given)[0]
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    split_transformer(model, mesh)
    return (model(**given)[0] - alone).abs().max().item()


@pytest.mark.slow
def test_split_blocks_compile_whole(tmp_path: Any) -> None:
    """Traced only; generating code takes a compiler."""
    assert max(wan_ranks.on_ranks(_compiled_error, 2, tmp_path)) < 1e-5


def _maker_differences(rank: int, root: str) -> dict[str, int]:
    """Levels by which frames of a whole task differ from those of one process."""
    found = {}
    for task, name in (("vace-i2v", "NAME"), ("ti2v-5B", "TI2V_NAME"), ("i2v-A14B", "A14B_NAME")):
        model = getattr(wan_vace, name)
        video = {"task": task, "model": model, "width": 96, "height": 64, "frames": 5, "steps": 3, "dtype": "float32"}
        folder, work = Path(root) / model, wan_ranks.sample()
        (alone,) = VideoMaker(VideoConfig(**video), folder, "cpu").make(*work)
        for layout in (Layout(ulysses=2), Layout(cfg=2)):
            section = VideoConfig(**video, group={"gpus": 2, "cfg": layout.cfg, "ulysses": layout.ulysses})
            (frames,) = VideoMaker(section, folder, "cpu", mesh=Mesh(layout, "cpu")).make(*work)
            found[f"{task} {layout}"] = int(abs(frames.astype(int) - alone).max())
            assert alone.std() > 5, "a picture that says something"
    return found


class _SeenByOne:
    """States that only the first rank's node can read, as on storage that shows a new file late."""

    def __init__(self, rank: int, kept: dict[str, bytes]) -> None:
        self.rank = rank
        self.kept = kept

    def read(self, name: str) -> bytes | None:
        return self.kept.get(name) if self.rank == 0 else None

    def write(self, name: str, data: bytes) -> None:
        self.kept[name] = data


def _steps_from_a_state(rank: int, root: str) -> tuple[int, int, bool]:
    """Steps of a video from its begin, and from a state that one rank sees; whether both end in the same frames."""
    steps: list[str] = []
    video = {"task": "vace-i2v", "model": wan_vace.NAME, "width": 96, "height": 64, "frames": 5, "dtype": "float32"}
    section = VideoConfig(**video, steps=4, save_every=3, group={"gpus": 2, "ulysses": 2})
    mesh = Mesh(Layout(ulysses=2), "cpu")
    maker = VideoMaker(section, Path(root) / wan_vace.NAME, "cpu", mesh=mesh, alive=steps.append)
    kept, found, frames = _SeenByOne(rank, {}), [], []
    for _ in range(2):
        (made,) = maker.make(*wan_ranks.sample(), kept)
        frames.append(made)
        found.append(sum(words.startswith("step") for words in steps))
        steps.clear()
    return found[0], found[1], bool((frames[0] == frames[1]).all())


@pytest.mark.slow
def test_ranks_begin_at_the_same_step(tmp_path: Path) -> None:
    wan_vace.make(tmp_path / "models")
    found = wan_ranks.on_ranks(_steps_from_a_state, 2, tmp_path / "ranks", str(tmp_path / "models"))
    assert found == [(4, 1, True)] * 2


@pytest.mark.slow
def test_whole_videos_of_every_task_equal_those_of_one_process(tmp_path: Path) -> None:
    wan_vace.make(tmp_path / "models")
    for found in wan_ranks.on_ranks(_maker_differences, 2, tmp_path / "ranks", str(tmp_path / "models")):
        assert len(found) == 6
        assert max(found.values()) <= 1, f"rounding may tip a level: {found}"
