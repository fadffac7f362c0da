"""A loaded Wan model that makes videos: conditions, noise, the loop and the decoder put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ipvg_ray.models.wan.autoencoder import Autoencoder
from ipvg_ray.models.wan.guidance import Guidance
from ipvg_ray.models.wan.loop import Denoiser, Inputs, LoopState, OnStep
from ipvg_ray.models.wan.tasks import ConditionMaker, Pictures, Size, Task
from ipvg_ray.models.wan.text import padded


@dataclass(frozen=True)
class Sample:
    """One video to make.

    Attributes:
        pictures: what the task takes.
        text: states of its prompt, (tokens, channels).
        seed: of a CPU generator, so that all devices start from the same noise.
    """

    pictures: Pictures
    text: Tensor
    seed: int


class VideoModel:
    """Makes videos of one task with one model.

    Args:
        task: which one.
        denoiser: the loop around the model's transformers.
        autoencoder: the model's VAE.
        scale: weight of VACE's hints.
    """

    def __init__(self, task: Task, denoiser: Denoiser, autoencoder: Autoencoder, *, scale: float = 1.0) -> None:
        self.task = task
        self.denoiser = denoiser
        self.autoencoder = autoencoder
        patch = denoiser.transformers[0].config.patch_size
        self.conditions = ConditionMaker(task, autoencoder, (patch[1], patch[2]), scale)

    def denoise(
        self,
        samples: Sequence[Sample],
        negative: Tensor | None,
        size: Size,
        guidance: Guidance,
        steps: int,
        *,
        on_step: OnStep | None = None,
        start: LoopState | None = None,
    ) -> Tensor:
        """Latents of one batch of videos, (B, channels, T, h, w); see `Denoiser`.

        Args:
            negative: states of the negative prompt, (tokens, channels).

        Raises:
            WanError: for sizes off the model's grid and pictures that the task cannot use.
        """
        inputs = self.inputs(samples, negative, size, without=guidance.drops_identity)
        return self.denoiser(inputs, guidance, steps, on_step=on_step, start=start)

    def inputs(self, samples: Sequence[Sample], negative: Tensor | None, size: Size, *, without: bool) -> Inputs:
        """What the loop needs of a batch, on the model's device; `without` as in `ConditionMaker.make`."""
        condition = self.conditions.make([sample.pictures for sample in samples], size, without=without)
        frames, height, width = self.autoencoder.latent_shape(size.frames, size.height, size.width)
        shape = (self.autoencoder.channels, frames + self.conditions.references, height, width)
        noise = [torch.randn((1, *shape), generator=torch.Generator().manual_seed(s.seed)) for s in samples]
        device = self.autoencoder.device
        return Inputs(
            noise=torch.cat(noise).to(device),
            condition=condition,
            text=torch.stack([padded(sample.text) for sample in samples]).to(device),
            negative=None if negative is None else padded(negative).unsqueeze(0).to(device),
        )

    def decode(self, latents: Tensor) -> np.ndarray:
        """Frames of one video's latents, (1, channels, T, h, w): RGB, uint8, (frames, height, width, 3)."""
        return self.autoencoder.decode(latents).numpy()
