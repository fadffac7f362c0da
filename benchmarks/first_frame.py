"""Seconds per first frame where every row is another person, and what an adapter per sample costs the UNet.

(a) diffusers, one row at a time: `load_lora_weights`, draw, `unload_lora_weights`, as its users do.
(b) the same with `fuse_lora` and `unfuse_lora` around the drawing.
(c) this package: rows of different people in one batch of 1, 4 and 8, nothing loaded or fused.
(d) one UNet call of a batch with its adapters, against the same call without any.

All draw the same prompts, sizes and steps with guidance, from LoRAs that are made beforehand. Rounds of all arms take
turns; figures are medians. On the miniatures unless `--full`, which builds SDXL in full size with random weights on a
GPU (frames per minute, peak memory).

`--full` has never been run: it was written on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from sdxl_minis import full_unet, load_pipeline, make_minis, words

from ipvg_ray.models.hyperlora import ALPHA_PER_RANK, HyperLora, kohya_state_dict
from ipvg_ray.models.lora import LoraPair, PerSampleLora, projection_paths
from ipvg_ray.models.mini import hyperlora as mini_hyperlora
from ipvg_ray.models.quiet import only_errors
from ipvg_ray.models.sdxl import DrawSettings, Request, Sdxl

WEIGHT = 0.85
NEGATIVE = "blurry, low quality, watermark"


@dataclass(frozen=True)
class Bench:
    """Two pipelines of equal weights (one for diffusers' way, one for ours), people and how they are drawn."""

    theirs: Any
    ours: Sdxl
    lora: PerSampleLora
    people: list[dict[str, LoraPair]]
    settings: DrawSettings
    device: str

    def prompt(self, number: int) -> str:
        return f"a person {words(20)} {number}"

    def timed(self, action: Callable[[], object]) -> float:
        """Seconds of an action, the device's work included."""
        self.wait()
        begun = time.perf_counter()
        action()
        self.wait()
        return time.perf_counter() - begun

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def stock(bench: Bench, number: int) -> None:
    """One picture by diffusers' own pipeline."""
    settings = bench.settings
    bench.theirs(
        bench.prompt(number),
        negative_prompt=NEGATIVE,
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=torch.Generator().manual_seed(number),
        output_type="np",
    )


def loading(bench: Bench, number: int) -> None:
    """(a) One row."""
    bench.theirs.load_lora_weights(kohya_state_dict(bench.people[number]), adapter_name="person")
    bench.theirs.set_adapters("person", WEIGHT)
    stock(bench, number)
    bench.theirs.unload_lora_weights()


def fusing(bench: Bench, number: int) -> None:
    """(b) One row."""
    bench.theirs.load_lora_weights(kohya_state_dict(bench.people[number]), adapter_name="person")
    bench.theirs.fuse_lora(lora_scale=WEIGHT)
    stock(bench, number)
    bench.theirs.unfuse_lora()
    bench.theirs.unload_lora_weights()


def batched(bench: Bench, size: int) -> None:
    """(c) One batch."""
    bench.ours.draw([Request(bench.prompt(i), i, bench.people[i]) for i in range(size)], bench.settings)


@torch.no_grad()
def unet_call(bench: Bench, size: int, adapted: bool) -> float:
    """(d) Seconds of one UNet call of a batch with guidance."""
    settings, unet = bench.settings, bench.ours.unet
    requests = [Request(bench.prompt(i), i) for i in range(size)]
    conditions = bench.ours._conditions(requests, settings).unet
    shape = (2 * size, 4, settings.height // 8, settings.width // 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(bench.device, unet.dtype)
    step = torch.tensor(500, device=bench.device)
    if not adapted:
        return bench.timed(lambda: unet(x, step, **conditions))
    with bench.lora.applied(bench.people[:size], WEIGHT * ALPHA_PER_RANK, copies=2):
        return bench.timed(lambda: unet(x, step, **conditions))


def report(bench: Bench, rounds: int, slow_rows: int, sizes: list[int]) -> None:
    """Run all arms in turn and print medians and ratios."""
    seconds: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seconds.setdefault(name, []).append(value)

    for turn in range(rounds + 1):  # the first one warms up
        for number in range(slow_rows):
            for name, arm in (("a", loading), ("b", fusing)):
                value = bench.timed(lambda arm=arm, number=number: arm(bench, number))  # type: ignore[misc]
                if turn:
                    note(name, value)
        for size in sizes:
            value = bench.timed(lambda size=size: batched(bench, size)) / size  # type: ignore[misc]
            if turn:
                note(f"c{size}", value)
        for size in sizes:
            for _ in range(5):
                for adapted in (False, True):
                    value = unet_call(bench, size, adapted)
                    if turn:
                        note(f"d{size}{adapted}", value)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"(a) load, draw, unload   {median['a']:8.3f} s per frame")
    print(f"(b) with fuse and unfuse {median['b']:8.3f} s per frame")
    for size in sizes:
        ours = median[f"c{size}"]
        print(
            f"(c) batch of {size}           {ours:8.3f} s per frame; (a)/(c) {median['a'] / ours:5.2f}, "
            f"(b)/(c) {median['b'] / ours:5.2f}; {60 / ours:.1f} frames per minute"
        )
    for size in sizes:
        plain, adapted = median[f"d{size}False"], median[f"d{size}True"]
        print(
            f"(d) UNet call, batch of {size}: bare {plain:.4f} s, with adapters {adapted:.4f} s, "
            f"overhead {100 * (adapted / plain - 1):.1f} %"
        )
    if bench.device == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def miniature(root: Path, settings: DrawSettings, people: int) -> Bench:
    """The miniature SDXL and HyperLoRA."""
    make_minis(root)
    hyperlora = HyperLora.load(root / mini_hyperlora.NAME)
    generator = torch.Generator().manual_seed(0)
    loras = []
    for _ in range(people):
        embedding = torch.nn.functional.normalize(torch.randn(1, 512, generator=generator), dim=-1)
        loras.append(hyperlora.lora(hyperlora.tokens(embedding, torch.randn(1, 17, 32, generator=generator))))
    pipelines = [load_pipeline(root) for _ in range(2)]
    return assembled(pipelines, hyperlora.paths, loras, settings, "cpu")


def full_size(root: Path, settings: DrawSettings, people: int) -> Bench:
    """SDXL base's architecture with random weights in bfloat16; only the tokenizers are the miniature's."""
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    make_minis(root)
    mini = load_pipeline(root)
    common = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2}
    small = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        **common,
    )
    large = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
        **common,
    )
    dtype, pipelines = torch.bfloat16, []
    torch.manual_seed(0)
    with torch.device("cuda"):
        unet = full_unet().to(dtype)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            scaling_factor=0.13025,
        ).to(dtype)
        encoders = CLIPTextModel(small).to(dtype), CLIPTextModelWithProjection(large).to(dtype)
    for copied in (unet, UNet2DConditionModel.from_config(unet.config).to("cuda", dtype)):
        copied.load_state_dict(unet.state_dict())
        pipelines.append(
            StableDiffusionXLPipeline(
                vae, *encoders, mini.tokenizer, mini.tokenizer_2, copied.eval(), mini.scheduler, add_watermarker=False
            )
        )
    names = [
        f"lora_unet_{path.replace('.', '_')}" for path, _ in unet.named_modules() if path.endswith((".attn1", ".attn2"))
    ]
    paths = projection_paths(names)
    loras = []
    for _ in range(people):
        loras.append(
            {
                name: LoraPair(
                    0.02 * torch.randn(8, unet.get_submodule(path).in_features, device="cuda", dtype=dtype),
                    0.02 * torch.randn(unet.get_submodule(path).out_features, 8, device="cuda", dtype=dtype),
                )
                for name, path in paths.items()
            }
        )
    return assembled(pipelines, paths, loras, settings, "cuda")


def assembled(
    pipelines: list[Any], paths: dict[str, str], people: list[dict[str, LoraPair]], settings: DrawSettings, device: str
) -> Bench:
    from diffusers import DPMSolverMultistepScheduler

    theirs, mine = pipelines
    ours = Sdxl(mine, device)
    theirs.scheduler = DPMSolverMultistepScheduler.from_config(
        theirs.scheduler.config, algorithm_type="dpmsolver++", use_karras_sigmas=True, final_sigmas_type="zero"
    )
    theirs.set_progress_bar_config(disable=True)
    lora = PerSampleLora(mine.unet, paths)
    ours.adapt(lora, WEIGHT * ALPHA_PER_RANK)
    return Bench(theirs, ours, lora, people, settings, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="full-size SDXL with random weights; needs a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=3, help="rows a round for (a) and (b)")
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    width, height, steps = (832, 480, 20) if options.full else (176, 96, 4)
    settings = DrawSettings(
        options.height or height, options.width or width, options.steps or steps, 5.0, negative_prompt=NEGATIVE
    )
    torch.set_num_threads(1 if not options.full else torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder, only_errors():
        make = full_size if options.full else miniature
        bench = make(Path(folder), settings, 8)
        what = "full-size SDXL, random weights, bfloat16" if options.full else "miniature SDXL, float32"
        print(f"{what}; {settings.width}x{settings.height}, {settings.steps} steps, guidance 5; medians", flush=True)
        report(bench, options.rounds, options.rows, [1, 4, 8])


if __name__ == "__main__":
    main()
