"""Runs of the prompts stage alone behind a stage that only names the target, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
from engine_driver import _write

from ipvg_ray import config, schema
from ipvg_ray.config import StageSection
from ipvg_ray.pipeline import run as engine
from ipvg_ray.pipeline.stage import Resources, Row, RowError, Stage
from ipvg_ray.stages.prompts import PromptsStage


class Targets(Stage):
    """Stands for the faces stage: every identity is a man."""

    name, grain, needs = "targets", "identity", ("image_sha256",)

    @property
    def settings(self) -> StageSection:
        return StageSection()

    def resources(self) -> Resources:
        return Resources(cpus=0.1, batch_size=64)

    @classmethod
    def table(cls) -> schema.Table:
        columns = {"target": pa.field("target", pa.string(), nullable=False)}
        return schema.Table("targets", "identity", ("identity_id",), "targets", columns)

    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        return [{"target": "A man"} for _ in rows]


class Prompts(PromptsStage):
    """The stage itself; a name of its own lets a worker find this module, and with it `Targets`."""

    section: ClassVar[str] = "prompts"


def freeze_prompts(prompts: Sequence[str], each: int = 5) -> engine.Freeze:
    """An identity set with these prompts, `each` to an identity: `id00000/prompt0` and so on."""

    def freeze(out: Path) -> dict[str, Any]:
        count = -(-len(prompts) // each)
        ids = [f"id{i:05d}" for i in range(count)]
        rows: dict[str, Any] = {"identity_id": ids, "image": [{"bytes": b"x", "path": None}] * count}
        rows |= {"image_sha256": ids, "image_width": [7] * count, "image_height": [7] * count}
        _write(out, "identities", rows)
        keys = [(ids[i // each], f"prompt{i % each}") for i in range(len(prompts))]
        samples = {"sample_id": [f"{i}/{p}" for i, p in keys], "identity_id": [i for i, _ in keys]}
        _write(out, "samples", {**samples, "prompt_id": [p for _, p in keys], "prompt": list(prompts)})
        return {"path": "fake", "format": "fake", "identities": count, "samples": len(prompts), "problems": 0}

    return freeze


def request(run_dir: Path, models: Path, settings: Mapping[str, Any], **options: Any) -> engine.Request:
    """A run of both stages with miniature models; `settings` are those of section `prompts`."""
    values = {"models": {"root": str(models)}, "prompts": dict(settings)}
    whole = config.load("cpu-mini", values=values)
    stages: list[Stage] = [Targets(whole), Prompts(whole)]
    return engine.Request(run_dir, {"dataset": {"path": "fake", "strict": False}}, 1, stages, **options)
