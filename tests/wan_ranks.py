"""Runs a function on N gloo ranks of this machine, and the miniature transformers that the tests of splitting use."""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ipvg_ray.models.wan.conditions import VaceCondition
from ipvg_ray.models.wan.loop import Inputs
from ipvg_ray.models.wan.tasks import Pictures
from ipvg_ray.models.wan.video import Sample

TEXT = 32


def on_ranks(function: Callable[..., Any], ranks: int, folder: Path, *args: Any) -> list[Any]:
    """What `function(rank, *args)` returns on each of so many ranks; raises with the first rank's traceback."""
    folder.mkdir(parents=True, exist_ok=True)
    context = mp.get_context("spawn")
    processes = [context.Process(target=_rank, args=(function, i, ranks, folder, args)) for i in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        if process.is_alive():
            process.kill()
    problems = [path.read_text() for path in sorted(folder.glob("error-*"))]
    assert not problems, problems[0]
    return [torch.load(folder / f"result-{i}", weights_only=False) for i in range(ranks)]


def _rank(function: Callable[..., Any], rank: int, ranks: int, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    try:
        store = dist.FileStore(str(folder / "store"), ranks)
        limit = datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)
        torch.save(function(rank, *args), folder / f"result-{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        raise


def transformer(task: str, heads: int = 4, seed: int = 0) -> Any:
    """A random Wan transformer of four blocks, as task `vace`, `t2v`, `i2v`, `ti2v` or `a14b` wants it."""
    from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

    torch.manual_seed(seed)
    common = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": heads,
        "attention_head_dim": 24,
        "text_dim": TEXT,
        "freq_dim": 64,
        "ffn_dim": 64,
        "num_layers": 4,
        "rope_max_seq_len": 64,
    }
    if task == "vace":
        return WanVACETransformer3DModel(**common, in_channels=16, out_channels=16, vace_layers=[0, 2]).eval()
    channels = {"t2v": (16, 16), "i2v": (36, 16), "a14b": (36, 16), "ti2v": (48, 48)}[task]
    image = {"image_dim": 40, "added_kv_proj_dim": 24 * heads} if task == "i2v" else {}
    return WanTransformer3DModel(**common, in_channels=channels[0], out_channels=channels[1], **image).eval()


def inputs(task: str, size: tuple[int, int, int], batch: int = 1) -> dict[str, Any]:
    """Arguments of one forward over latents of (frames, height, width), the same on every rank."""
    generator = torch.Generator().manual_seed(7)
    frames, height, width = size

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    channels = {"vace": 16, "t2v": 16, "i2v": 36, "a14b": 36, "ti2v": 48}[task]
    given: dict[str, Any] = {
        "hidden_states": noise(batch, channels, *size),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": noise(batch, 512, TEXT),
        "return_dict": False,
    }
    if task == "vace":
        given["control_hidden_states"] = noise(batch, 96, max(1, frames - 1), height, width)  # shorter, as TPIGE's is
    if task == "i2v":
        given["encoder_hidden_states_image"] = noise(batch, 9, 40)
    if task == "ti2v":
        tokens = frames * height * width // 4
        given["timestep"] = torch.arange(tokens).expand(batch, tokens) * 3.0
    return given


def vae(version: str) -> Any:
    """A random Wan VAE; 2.2's has the shortcuts and patches of TI2V-5B."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    common = {"base_dim": 8, "dim_mult": [1, 2, 2, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    if version == "2.1":
        return AutoencoderKLWan(**common, z_dim=16).eval()
    return AutoencoderKLWan(
        **common,
        z_dim=48,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
        in_channels=12,
        out_channels=12,
        is_residual=True,
        patch_size=2,
        decoder_base_dim=8,
        scale_factor_spatial=16,
    ).eval()


def scheduler() -> Any:
    """Wan's sampler."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def loop_inputs() -> Inputs:
    """One sample of an odd number of tokens for the denoising loop, the same on every rank."""
    given = inputs("vace", (3, 6, 10))
    generator = torch.Generator().manual_seed(9)
    control = torch.randn(1, 96, 3, 6, 10, generator=generator)
    condition = VaceCondition(control, given["control_hidden_states"], references=0)
    text = given["encoder_hidden_states"]
    return Inputs(given["hidden_states"], condition, text, torch.zeros_like(text))


def sample() -> tuple[list[Sample], torch.Tensor]:
    """One sample and the negative prompt's states, for the miniatures."""
    generator = torch.Generator().manual_seed(11)
    picture = torch.randint(0, 255, (64, 96, 3), generator=generator, dtype=torch.uint8).numpy()
    text, negative = torch.randn(2, 9, TEXT, generator=generator).unbind(0)
    return [Sample(Pictures(first=picture), text, 5)], negative
