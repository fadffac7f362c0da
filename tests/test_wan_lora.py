"""LoRA files added to a Wan transformer's weights: each naming of keys gives the same weights, others are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from wan_minis import FOLDERS, SIZE, encoder, model, sample, stock

from ipvg_ray import config
from ipvg_ray.models.mini import wan_vace
from ipvg_ray.models.wan.errors import WanError
from ipvg_ray.models.wan.guidance import Cfg
from ipvg_ray.models.wan.load import load
from ipvg_ray.models.wan.lora import fuse
from ipvg_ray.models.wan.maker import VideoMaker
from ipvg_ray.models.wan.tasks import TASKS
from ipvg_ray.stages.video import VideoStage

RANK = 3
Q, FFN, TIME = "blocks.0.attn1.to_q", "blocks.1.ffn.net.2", "condition_embedder.time_proj"
NAMES = {
    "authors": {Q: "blocks.0.self_attn.q", FFN: "blocks.1.ffn.2", TIME: "time_projection.1"},
    "diffusers": {Q: Q, FFN: FFN, TIME: TIME},
    "kohya": {Q: "blocks_0_self_attn_q", FFN: "blocks_1_ffn_2", TIME: "time_projection_1"},
}
STYLES = {
    "authors": ("diffusion_model.", "lora_down", "lora_up"),
    "authors, peft": ("diffusion_model.", "lora_A", "lora_B"),
    "diffusers": ("transformer.", "lora_A", "lora_B"),
    "diffusers, bare": ("", "lora_A", "lora_B"),
    "kohya": ("lora_unet_", "lora_down", "lora_up"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    wan_vace.make(root)
    return root


@pytest.fixture(scope="module")
def loaded(root: Path) -> Any:
    return load(root / wan_vace.NAME, TASKS["vace-i2v"], dtype=torch.float32, device="cpu", shift=5.0).transformers[0]


@pytest.fixture
def transformer(loaded: Any) -> Any:
    return copy.deepcopy(loaded)


def pairs(transformer: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Down and up halves by diffusers' names."""
    generator = torch.Generator().manual_seed(2)
    made = {}
    for name in (Q, FFN, TIME):
        rows, columns = transformer.get_submodule(name).weight.shape
        halves = torch.randn(RANK, columns, generator=generator), torch.randn(rows, RANK, generator=generator)
        made[name] = halves
    return made


def changed(transformer: Any, before: Any) -> set[str]:
    old = dict(before.named_parameters())
    return {name for name, value in transformer.named_parameters() if not torch.equal(value, old[name])}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_every_naming_adds_the_same(
    style: str, alpha: float | None, transformer: Any, loaded: Any, tmp_path: Path
) -> None:
    prefix, down, up = STYLES[style]
    state: dict[str, Tensor] = {}
    for name, (a, b) in pairs(transformer).items():
        key = prefix + NAMES[style.partition(",")[0]][name]
        state |= {f"{key}.{down}.weight": a, f"{key}.{up}.weight": b.contiguous()}
        if alpha:
            state[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(state, tmp_path / "lora.safetensors")
    fuse(transformer, tmp_path / "lora.safetensors", 0.5)
    for name, (a, b) in pairs(transformer).items():
        expected = loaded.get_submodule(name).weight + 0.5 * (alpha / RANK if alpha else 1) * (b @ a)
        assert torch.allclose(transformer.get_submodule(name).weight, expected, atol=1e-5)
    assert changed(transformer, loaded) == {f"{name}.weight" for name in (Q, FFN, TIME)}


def test_whole_differences_are_added_too(transformer: Any, loaded: Any, tmp_path: Path) -> None:
    """What lightx2v's and CausVid's files bring beside pairs: biases, norms, the modulation, the head."""
    keys = {
        "diffusion_model.blocks.0.self_attn.q.diff_b": f"{Q}.bias",
        "diffusion_model.blocks.0.cross_attn.norm_k.diff": "blocks.0.attn2.norm_k.weight",
        "diffusion_model.blocks.0.norm3.diff": "blocks.0.norm2.weight",
        "diffusion_model.blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "diffusion_model.blocks.1.diff_m": "blocks.1.scale_shift_table",
        "diffusion_model.head.diff_m": "scale_shift_table",
        "diffusion_model.head.head.diff": "proj_out.weight",
        "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
        "diffusion_model.vace_blocks.0.after_proj.diff": "vace_blocks.0.proj_out.weight",
    }
    old = dict(loaded.named_parameters())
    save_file({key: torch.full_like(old[name], 0.25) for key, name in keys.items()}, tmp_path / "lora.safetensors")
    fuse(transformer, tmp_path / "lora.safetensors", 1.0)
    assert changed(transformer, loaded) == set(keys.values())
    for name, value in transformer.named_parameters():
        assert torch.allclose(value, old[name] + 0.25 * (name in keys.values()), atol=1e-6), name


def test_a_convolution_s_pair_is_added(transformer: Any, loaded: Any, tmp_path: Path) -> None:
    weight = loaded.patch_embedding.weight
    down, up = torch.randn(RANK, *weight.shape[1:]), torch.randn(len(weight), RANK, 1, 1, 1)
    key = "diffusion_model.patch_embedding"
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, tmp_path / "lora.safetensors")
    fuse(transformer, tmp_path / "lora.safetensors", 1.0)
    expected = weight + torch.einsum("or,rcdhw->ocdhw", up[..., 0, 0, 0], down)
    assert torch.allclose(transformer.patch_embedding.weight, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"diffusion_model.blocks.9.self_attn.q.lora_down.weight": (3, 8)}, r"blocks\.9\.self_attn\.q.* no weight of"),
        ({"diffusion_model.blocks.0.cross_attn.k_img.diff_b": (8,)}, r"k_img\.diff_b names no weight"),
        ({"diffusion_model.blocks.0.self_attn.q.dora_scale": (8,)}, "q.dora_scale names no weight"),
        (
            {"diffusion_model.blocks.0.self_attn.q.diff_b": (5,)},
            r"q\.diff_b is \(5,\), and blocks\.0\.attn1\.to_q\.bias",
        ),
        ({"transformer.blocks.0.attn1.to_q.lora_A.weight": (3, 8)}, r"to_q\.lora_A\.weight lacks the other half"),
        (
            {"blocks.0.attn1.to_q.lora_A.weight": (3, 8), "blocks.0.attn1.to_q.lora_B.weight": (9, 3)},
            r"to_q\.lora_.\.weight makes \(9, 3\) times \(3, 8\), and blocks\.0\.attn1\.to_q\.weight is",
        ),
    ],
)
def test_a_file_for_another_model_is_refused_and_changes_nothing(
    keys: dict[str, tuple[int, ...]], words: str, transformer: Any, loaded: Any, tmp_path: Path
) -> None:
    good = {"diffusion_model.blocks.1.self_attn.k.diff_b": torch.ones_like(loaded.blocks[1].attn1.to_k.bias)}
    save_file(good | {key: torch.ones(shape) for key, shape in keys.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(WanError, match=words):
        fuse(transformer, tmp_path / "lora.safetensors", 1.0)
    assert changed(transformer, loaded) == set()


def test_a_file_that_is_none_is_refused(transformer: Any, tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(WanError, match=r"lora\.safetensors cannot be read as safetensors"):
        fuse(transformer, tmp_path / "lora.safetensors", 1.0)


def test_each_expert_has_its_own(root: Path, tmp_path: Path) -> None:
    parts = load(root / FOLDERS["i2v-A14B"], TASKS["i2v-A14B"], dtype=torch.float32, device="cpu", shift=5.0)
    bias = "blocks.0.attn1.to_q.bias"
    old = [dict(t.named_parameters())[bias].clone() for t in parts.transformers]
    loras = []
    for expert, step in (("high", 1.0), ("low", 2.0)):
        save_file({"diffusion_model.blocks.0.self_attn.q.diff_b": torch.full_like(old[0], step)}, tmp_path / expert)
        loras.append({"path": str(tmp_path / expert), "expert": expert})
    video = {"task": "i2v-A14B", "model": wan_vace.A14B_NAME, "boundary": 0.9, "loras": loras}
    settings = config.load("cpu-mini", values={"models": {"root": str(root)}, "video": video})
    maker = VideoMaker(settings.video, root / wan_vace.A14B_NAME, "cpu")
    for transformer, before, step in zip(maker.video.denoiser.transformers, old, (1.0, 2.0), strict=True):
        assert torch.allclose(dict(transformer.named_parameters())[bias], before + step)


def test_euler_is_what_step_distilled_models_are_sampled_with(root: Path) -> None:
    """x ← x + (σ' − σ)·v, with σ at 1, 3/4, 1/2, 1/4 before the shift, as lightx2v's sampler has them (to 1/1000)."""
    parts = load(root / wan_vace.NAME, TASKS["vace-i2v"], dtype=torch.float32, device="cpu", shift=5.0, solver="euler")
    scheduler = parts.scheduler()
    scheduler.set_timesteps(4)
    plain = torch.tensor([1, 0.75, 0.5, 0.25])
    sigmas = [*(5 * plain / (1 + 4 * plain)).tolist(), 0.0]
    assert scheduler.sigmas.tolist() == pytest.approx(sigmas, abs=1.3e-3)
    generator = torch.Generator().manual_seed(0)
    latents = expected = torch.randn(1, 4, 2, 3, 3, generator=generator)
    for index, time in enumerate(scheduler.timesteps):
        velocity = torch.randn(latents.shape, generator=generator)
        expected = expected + (scheduler.sigmas[index + 1] - scheduler.sigmas[index]) * velocity
        latents = scheduler.step(velocity, time, latents, return_dict=False)[0]
    assert torch.allclose(latents, expected, atol=1e-5)


def test_euler_makes_another_video_than_unipc(root: Path) -> None:
    pipeline = stock(root, "vace-i2v")
    text, negative = (encoder(pipeline).states(words) for words in ("a woman smiles", "blurred"))
    euler = load(root / wan_vace.NAME, TASKS["vace-i2v"], dtype=torch.float32, device="cpu", shift=5.0, solver="euler")
    ours = model(root, "vace-i2v")
    job = ([sample("vace-i2v", text)], negative, SIZE, Cfg(1.0), 4)
    first = ours.denoise(*job)
    ours.denoiser.scheduler = euler.scheduler
    assert not torch.allclose(first, ours.denoise(*job), atol=1e-3)


def test_the_fast_profile_takes_the_gpu_profile_s_pools_and_the_published_settings() -> None:
    fast, gpu = config.load("fast"), config.load("gpu")
    assert fast.video.pool == gpu.video.pool
    assert (fast.video.steps, fast.video.shift, fast.video.guidance, fast.video.solver) == (4, 5.0, 1.0, "euler")
    assert fast.faces == gpu.faces
    stage = VideoStage(fast)
    assert stage.models()["loras.0"] == fast.models.root / "wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors"
    assert stage._section().loras[0].path == str(stage.models()["loras.0"])
    assert stage.fingerprint_settings()["loras"] == [{"scale": 1.0, "expert": "both"}]
    assert stage.notes()[0] == "lossy: loras; compare the scores of a run without"
    assert not any("lossy" in note for note in VideoStage(gpu).notes())


def test_an_expert_is_for_the_task_that_has_some() -> None:
    with pytest.raises(config.ConfigError, match="task vace-i2v has one transformer"):
        config.load("fast", overrides=["video.loras=[{path: a.safetensors, expert: low}]"])
