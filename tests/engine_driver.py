"""A pipeline of three stages without models, run as a program so that tests can kill it: sum, double, end.

usage: python engine_driver.py RUN --identities N --prompts M [--delay S] [--bad KEY=HOW ...] [--workers N] [--batch N]
       [--limit SECONDS] [--cpus N] [--traces]
HOW: raise, row-error, exit and segfault (its process dies), hang (needs --limit), slowSECONDS, setup-raise (KEY is a
stage).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from ipvg_ray import schema, tables
from ipvg_ray.config import PoolConfig, Section, StageSection
from ipvg_ray.pipeline import run as engine
from ipvg_ray.pipeline.stage import Row, RowError, Stage, StageContext


class FakeSection(StageSection):
    add: int = 1


class FakeConfig(Section):
    first: FakeSection = FakeSection()
    second: FakeSection = FakeSection()
    third: FakeSection = FakeSection()
    delay: float = 0.0
    bad: dict[str, str] = Field(default_factory=dict)


def _table(name: str, grain: str, **types: pa.DataType) -> schema.Table:
    key = ("identity_id",) if grain == "identity" else ("sample_id",)
    return schema.Table(name, grain, key, name, {c: pa.field(c, t, nullable=False) for c, t in types.items()})


class _Fake(Stage):
    name = "fake"
    grain = "sample"
    needs = ()

    def setup(self, context: StageContext) -> None:
        self.context = context
        if self.config.bad.get(self.name) == "setup-raise":
            raise ValueError("no such weights")

    def fingerprint_settings(self) -> dict[str, Any]:
        return {"add": self.settings.add}

    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        results: list[Row | RowError] = []
        for row in rows:
            key = row.get("sample_id") or row["identity_id"]
            how = self.config.bad.get(f"{self.name}:{key}")
            time.sleep(self.config.delay * random.random() * 2)
            if how == "exit":
                os._exit(1)
            if how and how.startswith("slow"):
                time.sleep(float(how.removeprefix("slow")))
            if how == "segfault":
                ctypes.string_at(0)
            if how == "hang":
                time.sleep(10**6)
            if how == "raise":
                raise ValueError(f"bad input {key}")
            results.append(RowError("planted", "as asked") if how == "row-error" else self.one(row))
        return results

    def one(self, row: Row) -> Row:
        raise AssertionError


class First(_Fake):
    name, grain, needs = "first", "identity", ("image_width",)

    @classmethod
    def table(cls) -> schema.Table:
        return _table("first", "identity", total=pa.int64())

    def one(self, row: Row) -> Row:
        return {"total": row["image_width"] + self.settings.add}


class Second(_Fake):
    name, grain, needs = "second", "sample", ("prompt", "total")

    @classmethod
    def table(cls) -> schema.Table:
        return _table("second", "sample", text=pa.string(), blob=pa.binary())

    def one(self, row: Row) -> Row:
        return {"text": f"{row['prompt']} {row['total']} {row['seed']}", "blob": bytes(self.settings.add) * 1000}


class Third(_Fake):
    name, grain, needs = "third", "sample", ("text", "image_height")
    media: ClassVar[tuple[str, ...]] = ("files",)

    @classmethod
    def table(cls) -> schema.Table:
        return _table("third", "sample", answer=pa.string(), uri=pa.string())

    def one(self, row: Row) -> Row:
        answer = f"{row['text']}/{row['image_height']}/{self.settings.add}"
        uri = self.context.media.publish("files", row["identity_id"], row["prompt_id"], ".txt", answer.encode())
        return {"answer": answer, "uri": uri}


STAGES = (First, Second, Third)


def freeze_fake(identities: int, prompts: int) -> engine.Freeze:
    """An identity set of numbers: identity i has image_width i and `prompts` prompts; names that need care included."""

    def names(i: int) -> str:
        return f"../id {i:05d}é" if i % 7 == 3 else f"id{i:05d}"

    def freeze(out: Path) -> dict[str, Any]:
        ids = [names(i) for i in range(identities)]
        rows = {"identity_id": ids, "image": [{"bytes": b"x", "path": None}] * identities}
        rows |= {"image_sha256": ids, "image_width": range(identities), "image_height": [7] * identities}
        _write(out, "identities", rows)
        pairs = [(i, f"prompt{k}") for i in ids for k in range(prompts)]
        samples = {"sample_id": [f"{i}/{p}" for i, p in pairs], "identity_id": [i for i, _ in pairs]}
        samples |= {"prompt_id": [p for _, p in pairs], "prompt": [f"{p} of {i}" for i, p in pairs]}
        _write(out, "samples", samples)
        return {"path": "fake", "format": "fake", "identities": identities, "samples": len(pairs), "problems": 0}

    return freeze


def _write(out: Path, name: str, rows: dict[str, Any]) -> None:
    (out / name).mkdir(parents=True)
    schema_ = tables.stored_schema(name)
    missing = dict.fromkeys(f.name for f in schema_ if f.nullable and f.name not in rows)
    count = len(next(iter(rows.values())))
    rows = rows | {name: [None] * count for name in missing}
    table = pa.table({c: pa.array(list(v), schema_.field(c).type) for c, v in rows.items()}, schema=schema_)
    half = -(-table.num_rows // 2)
    for i in range(2):
        if len(table.slice(i * half, half)):
            pq.write_table(table.slice(i * half, half), out / name / f"part-{i:05d}.parquet", row_group_size=5)


def request(
    run_dir: Path,
    *,
    workers: int = 1,
    batch: int = 1,
    add: int = 1,
    delay: float = 0.0,
    bad: dict[str, str] | None = None,
    seed: int = 1,
    limit: float = 0.0,
    cpus: float = 0.1,
    initial: int = 0,
    concurrency: int = 1,
    **options: Any,
) -> engine.Request:
    pool = PoolConfig(
        max_workers=workers,
        initial_workers=initial,
        concurrency=concurrency,
        batch_size=batch,
        cpus=cpus,
        time_limit_s=limit,
    )
    section, last = FakeSection(pool=pool), FakeSection(pool=pool, add=add)
    config = FakeConfig(first=section, second=section, third=last, delay=delay, bad=bad or {})
    stages = [stage(config) for stage in STAGES]  # type: ignore[arg-type]
    return engine.Request(run_dir, {"dataset": {"path": "fake", "strict": False}}, seed, stages, **options)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--identities", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--limit", type=float, default=0.0)
    parser.add_argument("--cpus", type=float, default=0.1)
    parser.add_argument("--bad", nargs="*", default=[])
    parser.add_argument("--traces", action="store_true")
    options = parser.parse_args()
    bad = dict(text.rsplit("=", 1) for text in options.bad)
    asked = request(
        options.run,
        workers=options.workers,
        batch=options.batch,
        delay=options.delay,
        bad=bad,
        limit=options.limit,
        cpus=options.cpus,
        traces=options.traces,
    )
    result = engine.run(asked, freeze_fake(options.identities, options.prompts))
    for name, counts in result.counts.items():
        print(name, counts)
    print("OUTCOME", result.outcome, "failed", result.failed, "waiting", result.waiting, f"{result.seconds:.1f}s")
    return 0 if result.outcome == "complete" else 130


if __name__ == "__main__":
    sys.exit(main())
