"""Guidance: which evaluations of the network a step needs, and how they become one prediction.

`Cfg` is classifier-free guidance (arXiv 2207.12598). `Tpige` adds the identity-aware term of TPIGE (arXiv 2509.01362)
to it: the prediction is pushed away from that of a weaker network which skips a block and lacks one condition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """Where the loop stands.

    Attributes:
        index: 0 for the first step.
        count: steps in all.
        expert: which transformer works: 0 the only one or that of high noise, 1 that of low noise.
    """

    index: int
    count: int
    expert: int = 0


@dataclass(frozen=True)
class BranchSpec:
    """One evaluation that a guidance asks for.

    Attributes:
        name: of its own, constant over the steps; caches keep their state under it.
        text: whether it is told the prompt or the negative prompt.
        identity: whether it sees the reference picture or first frame.
        skip: indices of main blocks that it leaves out, with their hints.
    """

    name: str
    text: Literal["prompt", "negative"] = "prompt"
    identity: bool = True
    skip: tuple[int, ...] = ()


COND = BranchSpec("cond")
UNCOND = BranchSpec("uncond", text="negative")


@dataclass(frozen=True)
class Window:
    """Part of the steps, [start, end) as fractions of their count."""

    start: float = 0.0
    end: float = 1.0

    def holds(self, step: Step) -> bool:
        """Whether the step lies inside."""
        return self.start * step.count <= step.index < self.end * step.count


class Guidance(Protocol):
    """What the loop asks of a guidance. It keeps no state between steps."""

    @property
    def drops_identity(self) -> bool:
        """Whether any step has a branch without the identity."""
        ...

    def branches(self, step: Step) -> tuple[BranchSpec, ...]:
        """The evaluations that this step needs."""
        ...

    def combine(self, predictions: Mapping[str, Tensor], step: Step) -> Tensor:
        """One prediction from those of the branches, by name; all of one shape."""
        ...


@dataclass(frozen=True)
class Cfg:
    """v_u + w·(v_c − v_u); only v_c outside the window and where w ≤ 1.

    Attributes:
        scale: w.
        scale_low: w of the low-noise expert, where there are two; `scale` unless given.
        window: steps in which it works.
    """

    scale: float
    scale_low: float | None = None
    window: Window = field(default_factory=Window)

    @property
    def drops_identity(self) -> bool:
        return False

    def _scale(self, step: Step) -> float:
        return self.scale_low if step.expert and self.scale_low is not None else self.scale

    def branches(self, step: Step) -> tuple[BranchSpec, ...]:
        return (COND, UNCOND) if self._scale(step) > 1 and self.window.holds(step) else (COND,)

    def combine(self, predictions: Mapping[str, Tensor], step: Step) -> Tensor:
        conditional = predictions[COND.name]
        if UNCOND.name not in predictions:
            return conditional
        unconditional = predictions[UNCOND.name]
        return unconditional + self._scale(step) * (conditional - unconditional)


@dataclass(frozen=True)
class Tpige:
    """Identity-aware guidance on top of `base`.

    Mode `release` is what the authors' code does: v + s·(v − v_p), where v is the base's result and v_p sees the prompt
    but no reference. Mode `paper` is what the figure of the paper prints: v + s·(v_c − v_b), v_b with the
    reference and the negative prompt. Both weak branches skip `skip`.

    Attributes:
        base: classifier-free guidance.
        scale: s; 0.5 in the authors' code.
        mode: see above.
        skip: main blocks that the weak branch leaves out.
        window: steps in which the term is added.
    """

    base: Cfg
    scale: float = 0.5
    mode: Literal["release", "paper"] = "release"
    skip: tuple[int, ...] = (2,)
    window: Window = field(default_factory=Window)

    @property
    def drops_identity(self) -> bool:
        return bool(self.scale) and not self._weak.identity

    @property
    def _weak(self) -> BranchSpec:
        if self.mode == "release":
            return BranchSpec("weak", "prompt", identity=False, skip=self.skip)
        return BranchSpec("weak", "negative", identity=True, skip=self.skip)

    def branches(self, step: Step) -> tuple[BranchSpec, ...]:
        weak = (self._weak,) if self.scale and self.window.holds(step) else ()
        return (*self.base.branches(step), *weak)

    def combine(self, predictions: Mapping[str, Tensor], step: Step) -> Tensor:
        guided = self.base.combine(predictions, step)
        if self._weak.name not in predictions:
            return guided
        strong = guided if self.mode == "release" else predictions[COND.name]
        return guided + self.scale * (strong - predictions[self._weak.name])
