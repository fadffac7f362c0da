"""The denoising loop: text states in, latents out, the branches of each step through one replaceable callable.

With guidance `Cfg` it computes what diffusers' WanVACEPipeline and WanImageToVideoPipeline compute.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ipvg_ray.models.wan.conditions import Condition
from ipvg_ray.models.wan.errors import WanError
from ipvg_ray.models.wan.guidance import BranchSpec, Guidance, Step


@dataclass(frozen=True)
class Branch:
    """One evaluation of the network, with its tensors.

    Attributes:
        name: constant over the steps; caches keep their state under it.
        text: text states, (B, 512, channels), zero behind each text's end.
        extras: further arguments of the network; see `Condition.extras`.
        skip: indices of main blocks left out.
    """

    name: str
    text: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    skip: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shared:
    """What the branches of one step have in common.

    Attributes:
        transformer: the diffusers model of this step's expert.
        latents: its input, (B, channels, T, h, w), in its dtype.
        timestep: (B,), or (B, tokens) for TI2V-5B.
        step: where the loop stands.
    """

    transformer: Any
    latents: Tensor
    timestep: Tensor
    step: Step


Evaluate = Callable[[Shared, Sequence[Branch]], list[Tensor]]
"""Predictions of the branches, in their order: (B, channels, T, h, w), in the transformer's dtype, on its device.

Every rank of a group must be given back all of them."""


@dataclass(frozen=True)
class Inputs:
    """One batch of samples.

    Attributes:
        noise: (B, channels, T, h, w), float32.
        condition: the task's pictures.
        text, negative: text states, (B, 512, channels); the negative ones may be (1, 512, channels), and None where the
            guidance never asks for them.
    """

    noise: Tensor
    condition: Condition
    text: Tensor
    negative: Tensor | None = None


@dataclass(frozen=True)
class LoopState:
    """All that the steps done so far leave to the next.

    Attributes:
        done: number of steps done.
        latents: (B, channels, T, h, w), float32.
        scheduler: the scheduler's own variables.
    """

    done: int
    latents: Tensor
    scheduler: Mapping[str, Any]


OnStep = Callable[[Step, LoopState], None]
"""Called after each step with that step and the state then reached, which later steps do not change."""


class Denoiser:
    """The loop over one model: one transformer, or two of which the first has the high noise.

    Args:
        transformers: diffusers models.
        scheduler: makes a fresh scheduler for each batch; several calls may not share one.
        boundary: fraction of the training timesteps below which the second transformer works.
        evaluate: how the branches of a step are computed.
        reset: called before each batch, to make caches forget the one before.
    """

    def __init__(
        self,
        transformers: Sequence[Any],
        scheduler: Callable[[], Any],
        *,
        boundary: float | None = None,
        evaluate: Evaluate | None = None,
        reset: Callable[[], None] = lambda: None,
    ) -> None:
        if len(transformers) > 1 and boundary is None:
            raise ValueError("two transformers need a boundary between high and low noise")
        self.transformers = list(transformers)
        self.scheduler = scheduler
        self.boundary = boundary
        self.evaluate: Evaluate = evaluate or evaluate_in_turn
        self.reset = reset

    @torch.no_grad()
    def __call__(
        self,
        inputs: Inputs,
        guidance: Guidance,
        steps: int,
        *,
        on_step: OnStep | None = None,
        start: LoopState | None = None,
    ) -> Tensor:
        """Denoise one batch.

        Args:
            start: go on from there; what `on_step` was given when the same batch got so far.

        Returns:
            The video's latents, (B, channels, T, h, w), float32, normalised as the network has them.
        """
        self.reset()
        scheduler = self.scheduler()
        scheduler.set_timesteps(steps, device=inputs.noise.device)
        latents, first = inputs.noise, 0
        if start is not None:
            vars(scheduler).update(start.scheduler)
            latents, first = start.latents.to(inputs.noise.device), start.done
        times = scheduler.timesteps.tolist()
        for index in range(first, len(times)):
            step = Step(index, len(times), self._expert(times[index], scheduler))
            prediction = self._predict(inputs, guidance, step, latents, scheduler.timesteps[index])
            latents = scheduler.step(prediction, scheduler.timesteps[index], latents, return_dict=False)[0]
            if on_step is not None:
                on_step(step, LoopState(index + 1, latents, scheduler_state(scheduler)))
        return inputs.condition.leave(latents)

    def _expert(self, timestep: float, scheduler: Any) -> int:
        if self.boundary is None:
            return 0
        return int(timestep < self.boundary * scheduler.config.num_train_timesteps)

    def _predict(self, inputs: Inputs, guidance: Guidance, step: Step, latents: Tensor, timestep: Tensor) -> Tensor:
        transformer = self.transformers[step.expert]
        entered, times = inputs.condition.enter(latents, timestep)
        shared = Shared(transformer, entered.to(transformer.dtype), times, step)
        branches = [_resolved(spec, inputs, transformer) for spec in guidance.branches(step)]
        predictions = self.evaluate(shared, branches)
        return guidance.combine({b.name: p for b, p in zip(branches, predictions, strict=True)}, step)


def _resolved(spec: BranchSpec, inputs: Inputs, transformer: Any) -> Branch:
    text = inputs.text if spec.text == "prompt" else inputs.negative
    if text is None:
        raise ValueError("this guidance needs the negative prompt's text states; none were given")
    extras = inputs.condition.extras(transformer, identity=spec.identity, skip=spec.skip)
    return Branch(spec.name, text.to(transformer.dtype).expand(len(inputs.noise), -1, -1), extras, spec.skip)


def evaluate_in_turn(shared: Shared, branches: Sequence[Branch]) -> list[Tensor]:
    """One forward a branch: least memory."""
    return [_forward(shared, branch, branch.name, 1) for branch in branches]


def evaluate_together(shared: Shared, branches: Sequence[Branch]) -> list[Tensor]:
    """Branches that skip the same blocks in one forward: faster where one video does not fill the card.

    Where controls differ in length (TPIGE's weak branch lacks the references) branches cannot share one.
    Predictions may differ from those of `evaluate_in_turn` by rounding.
    """
    found: dict[str, Tensor] = {}
    groups: dict[Hashable, list[Branch]] = {}
    for branch in branches:
        shapes = tuple((name, value.shape) for name, value in branch.extras.items())
        groups.setdefault((branch.skip, shapes), []).append(branch)
    for group in groups.values():
        predictions = _forward(shared, _stacked(group), "+".join(b.name for b in group), len(group))
        found |= {b.name: p for b, p in zip(group, predictions.chunk(len(group)), strict=True)}
    return [found[branch.name] for branch in branches]


def _stacked(group: Sequence[Branch]) -> Branch:
    first = group[0]
    extras = {
        key: value if key.endswith("_scale") else torch.cat([branch.extras[key] for branch in group])
        for key, value in first.extras.items()
    }
    return Branch(first.name, torch.cat([branch.text for branch in group]), extras, first.skip)


def _forward(shared: Shared, branch: Branch, cache_name: str, times: int) -> Tensor:
    transformer = shared.transformer
    with skipping(transformer, branch.skip), transformer.cache_context(cache_name):
        prediction: Tensor = transformer(
            hidden_states=torch.cat([shared.latents] * times) if times > 1 else shared.latents,
            timestep=torch.cat([shared.timestep] * times) if times > 1 else shared.timestep,
            encoder_hidden_states=branch.text,
            return_dict=False,
            **branch.extras,
        )[0]
    return prediction


class _PassThrough(nn.Module):
    """Stands where a main block was left out."""

    def forward(self, hidden_states: Tensor, *rest: Any) -> Tensor:
        return hidden_states


@contextmanager
def skipping(transformer: Any, indices: Sequence[int]) -> Iterator[None]:
    """Leave main blocks out while the context lasts. The modules change places, so compiled blocks stay compiled.

    Raises:
        WanError: for an index that the transformer has no block of.
    """
    if missing := [index for index in indices if not 0 <= index < len(transformer.blocks)]:
        raise WanError(f"there is no block {missing[0]} to skip; the model has {len(transformer.blocks)}, from 0")
    taken = {index: transformer.blocks[index] for index in indices}
    for index in taken:
        transformer.blocks[index] = _PassThrough()
    try:
        yield
    finally:
        for index, block in taken.items():
            transformer.blocks[index] = block


def scheduler_state(scheduler: Any) -> dict[str, Any]:
    """The variables that a scheduler's steps read and write; its configuration is left out."""
    kept = {name: value for name, value in vars(scheduler).items() if name != "_internal_dict"}
    return {name: list(value) if isinstance(value, list) else value for name, value in kept.items()}
