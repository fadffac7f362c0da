"""What all sections of the configuration are made of."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ipvg_ray.errors import UserError

DType = Literal["float32", "bfloat16", "float16"]
Unit = Annotated[float, Field(ge=0, le=1)]
_LABEL = r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"
"""Keys of node labels, by the syntax that Ray shares with Kubernetes."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run; the message names the field and what it may be."""


def multiple(section: Any, step: int) -> Any:
    for name in ("width", "height"):
        value = getattr(section, name)
        if value % step:
            near = max(1, round(value / step)) * step
            raise ValueError(f"{name} is {value}; it must be a multiple of {step}, such as {near}")
    return section


def nearest(word: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values cannot be changed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PoolConfig(Section):
    """How many workers a stage has and what each asks for; see `ipvg_ray.pipeline.stage.Resources`."""

    min_workers: int = Field(1, ge=1)
    max_workers: int = Field(1, ge=1)
    initial_workers: int = Field(0, ge=0)
    batch_size: int = Field(1, ge=1)
    concurrency: int = Field(1, ge=1)
    cpus: float = Field(1.0, ge=0)
    gpus: float = Field(0.0, ge=0)
    memory_gb: float = Field(0.0, ge=0)
    accelerator_type: str | None = None
    label_selector: dict[str, str] = Field(default_factory=dict)
    threads: int = Field(1, ge=1)
    time_limit_s: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _possible(self) -> PoolConfig:
        if self.max_workers < self.min_workers:
            raise ValueError(f"max_workers is {self.max_workers}, below min_workers {self.min_workers}")
        if self.initial_workers and not self.min_workers <= self.initial_workers <= self.max_workers:
            raise ValueError(f"initial_workers is {self.initial_workers}; it must lie between min_ and max_workers")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus is {self.gpus}: use a share below 1, or a whole number of cards")
        for key in self.label_selector:
            if not re.fullmatch(_LABEL, key):
                raise ValueError(f"label_selector names the label {key!r}; write it like ipvg-ray/pool")
        return self


class StageSection(Section):
    """Base of the stages' sections."""

    pool: PoolConfig = PoolConfig()
