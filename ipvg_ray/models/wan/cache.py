"""Caches over steps: each branch of guidance has a state of its own, all are emptied between videos. They lose quality.

diffusers' FirstBlockCache and MagCache accept VACE and are wrong on it: they hook the blocks only, but VACE's hints are
made before the first block and added after blocks, so a repeated step adds them twice. `FirstBlock` here repeats what
enters the last norm, hints included, and leaves the hints' own blocks out as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


class Cache(Protocol):
    """What the loop asks of a cache."""

    def reset(self) -> None:
        """Forget everything: the next step is of another video."""
        ...

    def remove(self) -> None:
        """Leave the transformer as it was."""
        ...


@dataclass
class _Branch:
    """What one branch remembers of its last whole step, and of the step in work."""

    first: Tensor | None = None
    rest: Tensor | None = None
    skips: int = 0
    steps: int = 0
    entered: Tensor | None = None
    repeats: bool = False


@dataclass
class FirstBlock:
    """First-block cache for Wan and VACE transformers.

    The first main block is always computed. Where what it adds to its input differs by less than `threshold`, relative
    to what it added in the last whole step, mean absolute values compared, all other blocks and VACE's hints are left
    out, and what they added then is added again.

    Put it on before context parallelism, whose hooks must stay the outer ones: then it sees a rank's share of tokens.

    Args:
        transformer: a diffusers WanTransformer3DModel or WanVACETransformer3DModel.
        threshold: relative change below which a step is repeated.
        start: whole steps at the beginning.
        max_skips: repeated steps in a row at most.
        agree: makes a rank's two sums (of differences, of reference values) those of all ranks that share a video, so
            that all decide alike; such as an all-reduce.
    """

    transformer: Any
    threshold: float
    start: int = 5
    max_skips: int = 3
    agree: Callable[[Tensor], Tensor] = lambda sums: sums
    skipped: int = 0
    _branches: dict[str, _Branch] = field(default_factory=dict)
    _now: _Branch | None = None
    _memo: Tensor | None = None
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        transformer = self.transformer
        self._first_forward = transformer.blocks[0].forward
        self._replace(transformer.blocks[0], self._first_main(bool(getattr(transformer, "vace_blocks", ()))))
        for block in transformer.blocks[1:]:
            self._replace(block, self._main(block.forward))
        for number, block in enumerate(getattr(transformer, "vace_blocks", ())):
            self._replace(block, self._hint(block.forward, leads=number == 0))
        handle = transformer.norm_out.register_forward_pre_hook(self._before_norm)
        self._undo.append(handle.remove)
        context = transformer.cache_context
        transformer.cache_context = lambda name, **kwargs: self._in_branch(context(name, **kwargs), name)
        self._undo.append(lambda: vars(transformer).pop("cache_context"))

    def reset(self) -> None:
        self._branches.clear()

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _replace(self, block: Any, forward: Callable[..., Any]) -> None:
        before = block.forward
        block.forward = forward
        self._undo.append(lambda: setattr(block, "forward", before))

    @contextmanager
    def _in_branch(self, context: Any, name: str) -> Iterator[None]:
        self._now = self._branches.setdefault(name, _Branch())
        try:
            with context:
                yield
        finally:
            self._now = self._memo = None

    # -- what stands in the blocks' places ---------------------------------------------------------------------------

    def _first_main(self, led_by_hints: bool) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *rest: Any) -> Tensor:
            if not led_by_hints:
                self._decide(hidden_states, *rest)
            if self._memo is None:
                raise RuntimeError("a cached transformer must be called inside its cache_context")
            return self._memo

        return forward

    def _main(self, computed: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *rest: Any) -> Tensor:
            return hidden_states if self._repeats() else computed(hidden_states, *rest)

        return forward

    def _hint(self, computed: Callable[..., Any], *, leads: bool) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, text: Tensor, control: Tensor, *rest: Any) -> Any:
            if leads:
                self._decide(hidden_states, text, *rest)
            if self._repeats():
                return hidden_states.new_zeros(()), control
            return computed(hidden_states, text, control, *rest)

        return forward

    def _before_norm(self, module: Any, arguments: Sequence[Tensor]) -> Any:
        branch = self._now
        if branch is None or branch.entered is None:
            return None
        (reached,) = arguments
        if branch.repeats:
            assert branch.rest is not None
            return ((branch.entered + branch.rest).to(reached.dtype),)
        branch.rest = reached.to(branch.entered.dtype) - branch.entered
        return None

    # -- deciding ----------------------------------------------------------------------------------------------------

    def _repeats(self) -> bool:
        return self._now is not None and self._now.repeats

    def _decide(self, hidden_states: Tensor, *rest: Any) -> None:
        branch = self._now
        if branch is None:
            return
        self._memo = self._first_forward(hidden_states, *rest)
        added = self._memo - hidden_states
        branch.entered = self._memo
        branch.repeats = (
            branch.steps >= self.start
            and branch.skips < self.max_skips
            and branch.first is not None
            and branch.first.shape == added.shape
            and self._change(added, branch.first) < self.threshold
        )
        branch.steps += 1
        if branch.repeats:
            branch.skips += 1
            self.skipped += 1
        else:
            branch.first, branch.skips = added, 0

    def _change(self, added: Tensor, before: Tensor) -> float:
        sums = torch.stack([(added - before).abs().float().sum(), before.abs().float().sum()])
        difference, reference = self.agree(sums).tolist()
        return float(difference) / max(float(reference), 1e-12)


class TaylorSeer:
    """diffusers' TaylorSeer in its light form: only the transformer's output is extrapolated (arXiv 2503.06923).

    Args:
        transformer: a diffusers Wan or VACE transformer.
        interval: every so many steps one is computed.
        start: whole steps at the beginning.
    """

    def __init__(self, transformer: Any, interval: int, start: int) -> None:
        from diffusers import TaylorSeerCacheConfig

        self.transformer = transformer
        config = TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=start,
            max_order=1,
            use_lite_mode=True,
            taylor_factors_dtype=transformer.dtype,
        )
        transformer.enable_cache(config)

    def reset(self) -> None:
        self.transformer._reset_stateful_cache()

    def remove(self) -> None:
        self.transformer.disable_cache()
