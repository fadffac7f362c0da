"""A Wan model as the configuration wants it, loaded: samples in, frames out; alone, or as one rank of a group."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipvg_ray.models.wan import load, lora, speed, tiles
from ipvg_ray.models.wan.autoencoder import Autoencoder
from ipvg_ray.models.wan.cache import FirstBlock, TaylorSeer
from ipvg_ray.models.wan.errors import WanError
from ipvg_ray.models.wan.guidance import Cfg, Guidance, Step, Tpige, Window
from ipvg_ray.models.wan.loop import Denoiser, Evaluate, LoopState, evaluate_in_turn, evaluate_together
from ipvg_ray.models.wan.parallel import Axis, Layout, Mesh, split_branches, split_transformer, summed, told
from ipvg_ray.models.wan.state import Keeper, Place, name_of
from ipvg_ray.models.wan.tasks import TASKS, Size, Task
from ipvg_ray.models.wan.video import Sample, VideoModel
from ipvg_ray.models.wan.weights import place

if TYPE_CHECKING:
    import numpy as np

    from ipvg_ray.config import VideoConfig


class VideoMaker:
    """Makes batches of videos.

    Args:
        section: the configuration's; paths of LoRA files are whole.
        folder: the checkpoint's.
        device: `cuda` or `cpu`.
        mesh: this process's place among the ranks that make each video together; all then make the same calls.
        alive: called with a few words as the work goes on.

    Raises:
        WanError, ParallelError: for a folder without the model, and for a model that cannot be split.
    """

    def __init__(
        self,
        section: VideoConfig,
        folder: Path,
        device: str,
        *,
        mesh: Mesh | None = None,
        alive: Callable[[str], None] = lambda words: None,
    ) -> None:
        self.section = section
        self.alive = alive
        self.everyone = mesh.everyone if mesh is not None else None
        task = TASKS[section.task]
        # A row that is run again outside of its group has nobody to share weights with.
        weights = "whole" if mesh is None and section.group.weights == "fsdp" else section.group.weights
        parts = _loaded(section, folder, task, device, whole=weights == "whole")
        self.caches = [self._cache(transformer, mesh) for transformer in parts.transformers]
        evaluate: Evaluate = evaluate_together if section.branches == "together" else evaluate_in_turn
        decode = None
        if mesh is not None:
            evaluate = split_branches(evaluate, mesh.cfg)
            decode = functools.partial(tiles.decode, parts.vae, axis=mesh.everyone)
        for transformer in parts.transformers:
            place(transformer, weights, device, mesh)
            if mesh is not None:
                split_transformer(transformer, mesh)
        denoiser = Denoiser(
            parts.transformers,
            parts.scheduler,
            boundary=section.boundary if task.experts == 2 else None,
            evaluate=evaluate,
            reset=self.reset,
        )
        self.video = VideoModel(task, denoiser, Autoencoder(parts.vae, decode), scale=section.conditioning_scale)

    def make(
        self, samples: Sequence[Sample], negative: Tensor | None, kept: Place | None = None
    ) -> list[np.ndarray | WanError]:
        """Frames of one batch, RGB, uint8, (F, H, W, 3) each, or why there are none.

        Args:
            negative: states of the negative prompt, (tokens, channels).
            kept: where states are kept for another worker to go on from, as often as the configuration says; whoever
                calls removes them (`state.name_of`) when the videos are safe.
        """
        try:
            latents = self._denoised(samples, negative, kept)
        except WanError as error:
            return [error] * len(samples)
        made: list[np.ndarray | WanError] = []
        for one in latents.split(1):
            self.alive("decoding")
            try:
                made.append(self.video.decode(one))
            except WanError as error:
                made.append(error)
        return made

    def reset(self) -> None:
        """Empty the caches."""
        for cache in self.caches:
            if cache is not None:
                cache.reset()

    def _denoised(self, samples: Sequence[Sample], negative: Tensor | None, kept: Place | None) -> Tensor:
        section = self.section
        size = Size(section.frames, section.height, section.width)
        job = (samples, negative, size, guidance(section), section.steps)
        if not section.save_every or kept is None:
            return self.video.denoise(*job, on_step=self._tell)
        device = self.video.autoencoder.device
        own = kept if self.everyone is None else _Shared(kept, self.everyone)
        keeper = Keeper(own, name_of(samples, negative), section.save_every, device, self.reset)

        def on_step(step: Step, state: LoopState) -> None:
            self._tell(step, state)
            keeper.on_step(step, state)

        return self.video.denoise(*job, on_step=on_step, start=keeper.start())

    def _tell(self, step: Step, state: LoopState) -> None:
        self.alive(f"step {state.done} of {step.count}")

    def _cache(self, transformer: Any, mesh: Mesh | None) -> Any:
        cache = self.section.cache
        if cache.kind == "none":
            return None
        if cache.kind == "taylorseer":
            return TaylorSeer(transformer, cache.interval, cache.start)
        agree = functools.partial(summed, mesh=mesh) if mesh is not None else _own
        return FirstBlock(transformer, cache.threshold, cache.start, cache.max_skips, agree)


def _own(sums: Tensor) -> Tensor:
    """What a rank without peers agrees on."""
    return sums


def _loaded(section: VideoConfig, folder: Path, task: Task, device: str, *, whole: bool) -> load.Parts:
    """The model's parts, their transformers made fast; on the device if `whole`, else on the CPU but for the VAE."""
    dtype = getattr(torch, section.dtype)
    where = device if whole else "cpu"
    parts = load.load(folder, task, dtype=dtype, device=where, shift=section.shift, solver=section.solver)
    parts.vae.to(device)
    for adapter in section.loras:
        chosen = {"both": parts.transformers, "high": parts.transformers[:1], "low": parts.transformers[1:]}
        for transformer in chosen[adapter.expert]:
            lora.fuse(transformer, Path(adapter.path), adapter.scale)
    attention = section.attention
    if attention == "auto" and device == "cuda" and not whole:  # the weights are not yet where they are to work
        attention = speed.best_attention(torch.cuda.get_device_capability())
    speed.speed_up(parts.transformers, attention=attention, compiled=section.compile, storage=section.storage)
    return parts


def guidance(section: VideoConfig) -> Guidance:
    """The configured guidance."""
    cfg = Cfg(section.guidance, section.guidance_low, Window(section.guidance_start, section.guidance_end))
    if section.guide == "cfg":
        return cfg
    tpige = section.tpige
    return Tpige(cfg, tpige.scale, tpige.mode, tpige.skip, Window(tpige.start, tpige.end))


class VideoRank:
    """What each rank of a group holds; `context` as `ipvg_ray.pipeline.stage.RankContext` describes it."""

    def __init__(self, section: VideoConfig, folder: Path, context: Any) -> None:
        group = section.group
        mesh = Mesh(Layout(group.cfg, group.ring, group.ulysses), context.device)
        self.maker = VideoMaker(section, folder, context.device, mesh=mesh, alive=context.alive)

    def make(
        self, samples: Sequence[Sample], negative: Tensor | None, kept: Place | None
    ) -> list[np.ndarray | WanError]:
        """See `VideoMaker.make`."""
        return self.maker.make(samples, negative, kept)


class _Shared:
    """The place of states as the ranks of a group see it: the first reads for all, and writes alone.

    If each read for itself, one might find a state that another does not see yet, and begin at another step.
    """

    def __init__(self, kept: Place, everyone: Axis) -> None:
        self.kept = kept
        self.everyone = everyone

    def read(self, name: str) -> bytes | None:
        data: bytes | None = told(self.kept.read(name) if self.everyone.rank == 0 else None, self.everyone)
        return data

    def write(self, name: str, data: bytes) -> None:
        if self.everyone.rank == 0:
            self.kept.write(name, data)
