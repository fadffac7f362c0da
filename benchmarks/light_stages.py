"""Five stages that do next to nothing, for what the engine itself costs.

Where the environment variable `LIGHT_STAGES_CLOCK` names a file, each notes there when it got how many rows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from engine_driver import FakeConfig, FakeSection, _table

from ipvg_ray import schema
from ipvg_ray.config import PoolConfig
from ipvg_ray.pipeline.stage import Row, RowError, Stage

CLOCK = "LIGHT_STAGES_CLOCK"
NAMES = ("one", "two", "three", "four", "five")


class Light(Stage):
    """Adds a short text made from the one before it."""

    name, grain, needs = "one", "sample", ("prompt",)

    @classmethod
    def table(cls) -> schema.Table:
        return _table(cls.name, "sample", **{f"text_{cls.name}": pa.string()})

    def fingerprint_settings(self) -> dict[str, Any]:
        return {}

    @property
    def settings(self) -> Any:
        return self.config.first  # type: ignore[attr-defined]

    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        if clock := os.environ.get(CLOCK):
            with open(clock, "a") as file:
                file.write(f"{self.name} {time.time()} {len(rows)}\n")
        return [{f"text_{self.name}": f"{row[self.needs[0]][:20]} {self.name}"} for row in rows]


class Two(Light):
    name, needs = "two", ("text_one",)


class Three(Light):
    name, needs = "three", ("text_two",)


class Four(Light):
    name, needs = "four", ("text_three",)


class Five(Light):
    name, needs = "five", ("text_four",)


STAGES = (Light, Two, Three, Four, Five)


def make_stages(batch: int) -> list[Stage]:
    config = FakeConfig(first=FakeSection(pool=PoolConfig(cpus=0.1, batch_size=batch)))
    return [stage(config) for stage in STAGES]  # type: ignore[arg-type]
