"""Seconds per video of our denoising loop against diffusers' own pipeline, beside each other, on the same model.

On the miniature (any machine): per video, text states given, conditions, denoising and decoding included; both in turn
`--repeat` times, medians, and what ours costs more (bar: 2 %). Beside wall time the CPU time of the process is told: on
one thread it is what a machine with other work on it leaves undisturbed.

With `--full` (a GPU): Wan2.1-VACE's architecture with random bfloat16 weights. Seconds per step with classifier-free
guidance, FLOP/s reached against the card's own measured matrix rate, and peak memory, of the stock pipeline and of ours
with the lossless options; FLOPs are counted by torch on meta tensors. IT HAS NEVER RUN: there was no GPU.

usage: python benchmarks/video.py [--repeat 15] [--steps 4] [--threads 1]
       python benchmarks/video.py --full [--model 14B] [--size 480p] [--steps 3] [--compile] [--branches together]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ipvg_ray.models.mini import wan_vace
from ipvg_ray.models.wan.autoencoder import Autoencoder
from ipvg_ray.models.wan.guidance import Cfg
from ipvg_ray.models.wan.load import load
from ipvg_ray.models.wan.loop import Denoiser, evaluate_in_turn, evaluate_together
from ipvg_ray.models.wan.speed import speed_up
from ipvg_ray.models.wan.tasks import TASKS, Pictures, Size
from ipvg_ray.models.wan.video import Sample, VideoModel

TASK = TASKS["vace-i2v"]
SHIFT = 16.0
MODELS = {
    "1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "vace_layers": list(range(0, 30, 2))},
    "14B": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40, "vace_layers": list(range(0, 40, 5))},
}
SIZES = {"480p": Size(81, 480, 832), "720p": Size(81, 720, 1280)}


def picture(size: Size) -> np.ndarray:
    """A gradient in place of a first frame."""
    y, x = np.mgrid[0 : size.height, 0 : size.width]
    return np.stack([x * 255 // size.width, y * 255 // size.height, 0 * x], -1).astype(np.uint8)


def stock_inputs(size: Size, first: np.ndarray) -> dict[str, Any]:
    """The condition in the form that the stock pipeline reads exactly."""
    video = np.full((1, size.frames, size.height, size.width, 3), 0.5, np.float32)
    video[0, 0] = first / np.float32(255)
    mask = np.ones((1, size.frames, size.height, size.width, 1), np.float32)
    mask[0, 0] = 0
    return {
        "video": video, "mask": mask, "height": size.height, "width": size.width, "num_frames": size.frames,
        "guidance_scale": 5.0,
    }  # fmt: skip


def seconds(work: Callable[[], Any]) -> float:
    """Of one call, the card's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def on_the_miniature(repeat: int, steps: int) -> None:
    """Our loop's overhead per video."""
    from diffusers import UniPCMultistepScheduler, WanVACEPipeline

    size = Size(17, 96, 176)
    with tempfile.TemporaryDirectory() as folder:
        wan_vace.make(Path(folder))
        place = Path(folder) / wan_vace.NAME
        pipeline = WanVACEPipeline.from_pretrained(place)
        parts = load(place, TASK, dtype=torch.float32, device="cpu", shift=SHIFT)
    pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, flow_shift=SHIFT)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        text, negative = pipeline.encode_prompt("a woman smiles", "blurred", True, max_sequence_length=512)
    first = picture(size)
    ours = VideoModel(TASK, Denoiser(parts.transformers, parts.scheduler), Autoencoder(parts.vae))

    def stock_video() -> np.ndarray:
        frames = pipeline(
            prompt_embeds=text, negative_prompt_embeds=negative, num_inference_steps=steps,
            generator=torch.Generator().manual_seed(1), output_type="np", **stock_inputs(size, first),
        ).frames[0]  # fmt: skip
        return (frames * 255).round().astype(np.uint8)

    def our_video() -> np.ndarray:
        sample = Sample(Pictures(first), text[0], 1)
        return ours.decode(ours.denoise([sample], negative[0], size, Cfg(5.0), steps))

    assert np.abs(stock_video().astype(int) - our_video()).max() <= 1, "the two are not the same video"
    pairs = []
    for turn in range(repeat):
        order = [stock_video, our_video] if turn % 2 else [our_video, stock_video]
        times: dict[Any, tuple[float, float]] = {}
        for work in order:
            before = time.process_time()
            took = seconds(work)
            times[work] = (took, time.process_time() - before)
        pairs.append((times[stock_video], times[our_video]))
    print(f"miniature, {size.width}x{size.height}, {size.frames} frames, {steps} steps, medians of {repeat} pairs")
    for clock, name in enumerate(("wall", "CPU")):
        stock, own = (statistics.median(pair[side][clock] for pair in pairs) for side in (0, 1))
        ratio = statistics.median(pair[1][clock] / pair[0][clock] for pair in pairs)
        print(
            f"  {name:4s}  diffusers' pipeline {stock:.3f} s, our loop {own:.3f} s, ratio of pairs {ratio:.3f}", end=""
        )
        print("  (bar: at most 1.02)")


# -- on a GPU --------------------------------------------------------------------------------------------------------


def transformer_of(model: str, device: str) -> Any:
    """Wan2.1-VACE's architecture; random bfloat16 weights, or none on the meta device."""
    from diffusers import WanVACETransformer3DModel

    with torch.device(device):
        made = WanVACETransformer3DModel(
            attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096, vace_in_channels=96, **MODELS[model]
        )
    return made.to(torch.bfloat16).eval().requires_grad_(False)


def flops_of(model: str, size: Size) -> float:
    """FLOPs of one forward, two per multiplication and addition."""
    from torch.utils.flop_counter import FlopCounterMode

    made, counter = transformer_of(model, "meta"), FlopCounterMode(display=False)
    frames, height, width = (size.frames - 1) // 4 + 1, size.height // 8, size.width // 8

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device="meta", dtype=torch.bfloat16)

    with counter, torch.no_grad():
        made(
            hidden_states=empty(1, 16, frames, height, width),
            timestep=torch.empty(1, device="meta"),
            encoder_hidden_states=empty(1, 512, 4096),
            control_hidden_states=empty(1, 96, frames, height, width),
            control_hidden_states_scale=empty(len(made.config.vace_layers)),
        )
    return float(counter.get_total_flops())


def matrix_rate() -> float:
    """FLOP/s of a large bfloat16 product on this card."""
    side = 8192
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = [seconds(lambda: [a @ b for _ in range(20)]) / 20 for _ in range(5)]
    return 2 * side**3 / statistics.median(times)


def on_a_gpu(model: str, size_name: str, steps: int, compiled: bool, branches: str) -> None:
    """Seconds per step, stock against ours."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanVACEPipeline

    size = SIZES[size_name]
    flops, rate = flops_of(model, size), matrix_rate()
    transformer = transformer_of(model, "cuda")
    vae = AutoencoderKLWan().to("cuda")
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    pipeline = WanVACEPipeline(None, None, vae, scheduler, transformer)
    pipeline.set_progress_bar_config(disable=True)
    text, negative = (torch.randn(1, 512, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    inputs = stock_inputs(size, picture(size))
    stamps: list[float] = []

    def stamp(*_: Any) -> None:
        torch.cuda.synchronize()
        stamps.append(time.perf_counter())

    def per_step(make: Callable[[], Any]) -> tuple[float, float]:
        make()  # compiles and warms up
        torch.cuda.reset_peak_memory_stats()
        stamps.clear()
        make()
        steps_taken = [b - a for a, b in itertools.pairwise(stamps)]
        return statistics.median(steps_taken), torch.cuda.max_memory_allocated() / 2**30

    def stock_video() -> None:
        pipeline(
            prompt_embeds=text, negative_prompt_embeds=negative, num_inference_steps=steps, output_type="latent",
            callback_on_step_end=lambda _, __, ___, kept: (stamp(), kept)[1], **inputs,
        )  # fmt: skip

    stock = per_step(stock_video)
    speed_up([transformer], compiled=compiled)
    evaluate = evaluate_together if branches == "together" else evaluate_in_turn
    ours = VideoModel(TASK, Denoiser([transformer], lambda: scheduler, evaluate=evaluate), Autoencoder(vae))
    sample = Sample(Pictures(picture(size)), text[0].cpu(), 1)
    own = per_step(lambda: ours.denoise([sample], negative[0].cpu(), size, Cfg(5.0), steps, on_step=lambda *_: stamp()))
    print(f"Wan2.1-VACE-{model}, {size.width}x{size.height}, {size.frames} frames, random weights")
    print(f"  card's matrix rate   {rate / 1e12:.0f} TFLOP/s; one forward {flops / 1e15:.3f} PFLOP, two a step")
    for name, (took, memory) in (("diffusers' pipeline", stock), ("our loop", own)):
        share = 2 * flops / took / rate
        print(f"  {name:20s} {took:.3f} s/step, {share:.0%} of the matrix rate (bar: 60 %), peak {memory:.1f} GiB")
    print(f"  diffusers / ours     {stock[0] / own[0]:.2f}  (bar: at least 1.3)")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--model", choices=list(MODELS), default="14B")
    parser.add_argument("--size", choices=list(SIZES), default="480p")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--branches", choices=["in_turn", "together"], default="in_turn")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.full:
        on_a_gpu(given.model, given.size, given.steps, given.compile, given.branches)
    else:
        on_the_miniature(given.repeat, given.steps)


if __name__ == "__main__":
    main()
