"""Samplers and noise levels as ComfyUI has them, on latents that are data + σ · noise.

DPM-Solver++(2M): Lu et al., arXiv 2211.01095. Karras' levels: arXiv 2206.00364, eq. 5, with ρ = 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Literal

import torch

SamplerName = Literal["dpmpp_2m", "euler"]
Schedule = Literal["karras", "exponential", "normal"]

Denoise = Callable[[torch.Tensor, float], torch.Tensor]
"""(latents, σ) to the data that the network sees in them."""

_RHO = 7.0


class Noise:
    """The noise levels that a checkpoint was trained at.

    Args:
        settings: of the checkpoint's scheduler: `num_train_timesteps`, `beta_start`, `beta_end`, `beta_schedule`,
            `prediction_type`, `trained_betas`.

    Raises:
        ValueError: for a schedule or a prediction type that SDXL checkpoints do not have.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.prediction = settings.get("prediction_type", "epsilon")
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"the checkpoint predicts {self.prediction!r}; only epsilon and v_prediction are known")
        kept = torch.cumprod(1 - _betas(settings), dim=0)
        self.sigmas = ((1 - kept) / kept).sqrt()
        self._logs = self.sigmas.log()

    def timestep(self, sigma: float) -> int:
        """The training step whose level is nearest, by the ratio."""
        return int((self._logs - math.log(sigma)).abs().argmin())

    def levels(self, schedule: Schedule, steps: int, denoise: float = 1.0) -> list[float]:
        """The σ of each step, and zero.

        Args:
            schedule: how they are spaced between the checkpoint's highest and lowest level.
            steps: how many steps are taken.
            denoise: in (0, 1]; below 1 the last `steps` of int(steps / denoise) are taken, from a noised picture on.
        """
        total = int(steps / denoise) if denoise < 1 else steps
        high, low = float(self.sigmas[-1]), float(self.sigmas[0])
        ramp = torch.linspace(0, 1, total, dtype=torch.float64)
        if schedule == "karras":
            spaced = (high ** (1 / _RHO) + ramp * (low ** (1 / _RHO) - high ** (1 / _RHO))) ** _RHO
        elif schedule == "exponential":
            spaced = (math.log(high) + ramp * (math.log(low) - math.log(high))).exp()
        else:
            spaced = self._between((1 - ramp) * (len(self.sigmas) - 1))
        return [*spaced.tolist(), 0.0][-(steps + 1) :]

    def _between(self, steps: torch.Tensor) -> torch.Tensor:
        below = steps.floor().long().clamp(max=len(self._logs) - 2)
        share = steps - below
        return ((1 - share) * self._logs[below] + share * self._logs[below + 1]).exp()

    def scaled(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """Latents as the network was trained to see them, of variance 1."""
        return x / (1 + sigma**2) ** 0.5

    def data(self, x: torch.Tensor, predicted: torch.Tensor, sigma: float) -> torch.Tensor:
        """The data in the latents x, from the network's output."""
        if self.prediction == "epsilon":
            return x - sigma * predicted
        return x / (1 + sigma**2) - predicted * (sigma / (1 + sigma**2) ** 0.5)

    def started(self, noise: torch.Tensor, sigma: float, data: torch.Tensor | None = None) -> torch.Tensor:
        """Latents to begin with: data and noise at level σ; without data, noise of the variance they would have."""
        if data is not None:
            return data + sigma * noise
        return noise * (1 + sigma**2) ** 0.5


def _betas(settings: Mapping[str, Any]) -> torch.Tensor:
    if settings.get("trained_betas") is not None:
        return torch.tensor(settings["trained_betas"], dtype=torch.float64)
    count, start, end = (settings[k] for k in ("num_train_timesteps", "beta_start", "beta_end"))
    kind = settings.get("beta_schedule", "scaled_linear")
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    if kind == "linear":
        return torch.linspace(start, end, count, dtype=torch.float64)
    raise ValueError(f"the checkpoint's beta_schedule is {kind!r}; only scaled_linear and linear are known")


def sample(name: SamplerName, denoise: Denoise, x: torch.Tensor, sigmas: list[float]) -> torch.Tensor:
    """Take x from level sigmas[0] down to the last one, one call of `denoise` per step."""
    return _SAMPLERS[name](denoise, x, sigmas)


def _dpmpp_2m(denoise: Denoise, x: torch.Tensor, sigmas: list[float]) -> torch.Tensor:
    """Second order from the second step on; the last step, to σ = 0, is the data itself."""
    before: torch.Tensor | None = None
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        data = denoise(x, sigma)
        if following == 0:
            return data
        h = math.log(sigma / following)
        mixed = data
        if before is not None:
            r = math.log(sigmas[i - 1] / sigma) / h
            mixed = (1 + 1 / (2 * r)) * data - (1 / (2 * r)) * before
        x = (following / sigma) * x - math.expm1(-h) * mixed
        before = data
    return x


def _euler(denoise: Denoise, x: torch.Tensor, sigmas: list[float]) -> torch.Tensor:
    for sigma, following in pairwise(sigmas):
        x = x + (following - sigma) * (x - denoise(x, sigma)) / sigma
    return x


_SAMPLERS: dict[str, Callable[[Denoise, torch.Tensor, list[float]], torch.Tensor]] = {
    "dpmpp_2m": _dpmpp_2m,
    "euler": _euler,
}
