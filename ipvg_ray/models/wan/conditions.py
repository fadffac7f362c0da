"""How a task's pictures reach the network: one class for each of Wan's three ways. All hold one batch of samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Condition(Protocol):
    """What the loop asks of a condition."""

    def enter(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The network's input and timestep for these latents, (B, C, T, h, w), at this timestep, a scalar."""
        ...

    def extras(self, transformer: Any, *, identity: bool, skip: tuple[int, ...]) -> dict[str, Tensor]:
        """Further arguments of the network for a branch; each has the batch first unless it is a scale."""
        ...

    def leave(self, latents: Tensor) -> Tensor:
        """What of the denoised latents is the video."""
        ...


@dataclass(frozen=True)
class VaceCondition:
    """VACE: control latents beside the noise.

    Attributes:
        control: (B, 96, T, h, w): 16 inactive, 16 reactive, 64 mask channels; reference pictures are frames in front.
        without: the same without first frame and references, (B, 96, T − references, h, w); None where no branch wants
            it. Where it is shorter the network pads its tokens with zeros at the end, in the authors' code as here.
        scale: weight of all hints.
        references: how many latent frames in front are reference pictures.
    """

    control: Tensor
    without: Tensor | None
    scale: float = 1.0
    references: int = 0

    def enter(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return latents, timestep.expand(len(latents))

    def extras(self, transformer: Any, *, identity: bool, skip: tuple[int, ...]) -> dict[str, Tensor]:
        control = self.control if identity else self.without
        if control is None:
            raise ValueError("this guidance needs control latents without the identity; none were made")
        # A skipped block takes its hint with it: the original adds hints inside the block's own forward.
        scales = [0.0 if layer in skip else self.scale for layer in transformer.config.vace_layers]
        return {
            "control_hidden_states": control.to(transformer.dtype),
            "control_hidden_states_scale": torch.tensor(scales, dtype=transformer.dtype, device=control.device),
        }

    def leave(self, latents: Tensor) -> Tensor:
        return latents[:, :, self.references :]


class _NoSecondCondition:
    """Of tasks whose network has no way to lose the first frame."""

    def extras(self, transformer: Any, *, identity: bool, skip: tuple[int, ...]) -> dict[str, Tensor]:
        if not identity:
            raise ValueError("only VACE tasks have a branch without the identity; use guidance cfg")
        return {}


@dataclass(frozen=True)
class ChannelCondition(_NoSecondCondition):
    """Wan I2V: mask and latents of the first frame as further input channels.

    Attributes:
        channels: (B, 20, T, h, w): 4 mask channels, then 16 of the first frame and grey ones.
    """

    channels: Tensor

    def enter(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([latents, self.channels], dim=1), timestep.expand(len(latents))

    def leave(self, latents: Tensor) -> Tensor:
        return latents


@dataclass(frozen=True)
class FirstLatentCondition(_NoSecondCondition):
    """Wan2.2 TI2V-5B: the first latent frame is the picture, free of noise, and its tokens have timestep 0.

    Attributes:
        first: (B, 48, 1, h, w).
        patch: height and width of a token in latents.
    """

    first: Tensor
    patch: tuple[int, int] = (2, 2)

    def enter(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        batch, _, frames, height, width = latents.shape
        per_frame = (height // self.patch[0]) * (width // self.patch[1])
        tokens = timestep.expand(batch, frames * per_frame).clone()
        tokens[:, :per_frame] = 0
        return self.leave(latents), tokens

    def leave(self, latents: Tensor) -> Tensor:
        return torch.cat([self.first.to(latents.dtype), latents[:, :, 1:]], dim=2)
