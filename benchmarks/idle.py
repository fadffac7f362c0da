"""How long the video groups stand idle: six sleeping stages in the published ratio of their seconds, 1 : 1 : 4 : 10 :
320 : 6, with eight video groups, run as one stream by the engine, stage after stage by the engine, and on the virtual
clock of `ipvg-ray simulate`.

usage: python benchmarks/idle.py [--rows 96] [--scale 0.03] [--repeat 1]
Prints for each the seconds between the run's first and last row, the share of them in which the eight groups did not
work, and of the stream when that was. Stage after stage is given for free what it would cost to start each stage's
workers: only spans of work count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

HERE = Path(__file__).parent
PATHS = [str(HERE), str(HERE.parent / "tests")]
sys.path[:0] = PATHS
os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])

from engine_driver import FakeConfig, FakeSection, _table, freeze_fake

from ipvg_ray import schema
from ipvg_ray.config import PoolConfig
from ipvg_ray.pipeline import execute
from ipvg_ray.pipeline import run as engine
from ipvg_ray.pipeline.desk import make_desk
from ipvg_ray.pipeline.estimate import Load, Rate
from ipvg_ray.pipeline.nodes import one_machine
from ipvg_ray.pipeline.simulate import Conditions, idle_share, simulate
from ipvg_ray.pipeline.stage import Resources, Row, RowError, Stage
from ipvg_ray.pipeline.tickets import write_tickets

GROUPS = 8
RATIO = {"faces": 1, "matting": 1, "prompts": 4, "first_frame": 10, "video": 320, "evaluate": 6}
NAMES = tuple(RATIO)
BEFORE = dict(zip(NAMES, ("prompt", *(f"of_{name}" for name in NAMES)), strict=False))


class Sleeper(Stage):
    """Sleeps its share of the published seconds for each row."""

    name, grain, needs = "faces", "sample", ("prompt",)

    @classmethod
    def table(cls) -> schema.Table:
        return _table(cls.name, "sample", **{f"of_{cls.name}": pa.string()})

    @property
    def settings(self) -> Any:
        return self.config.first  # type: ignore[attr-defined]

    def resources(self) -> Resources:
        workers = GROUPS if self.name == "video" else 1
        return Resources(cpus=0.02, min_workers=workers, max_workers=workers)

    def fingerprint_settings(self) -> dict[str, Any]:
        return {}

    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        time.sleep(RATIO[self.name] * self.config.delay * len(rows))  # type: ignore[attr-defined]
        return [{f"of_{self.name}": "x"} for _ in rows]


def make_stages(scale: float) -> list[Stage]:
    config = FakeConfig(first=FakeSection(pool=PoolConfig()), delay=scale)
    stages = []
    for name in NAMES:
        kind = type(name, (Sleeper,), {"name": name, "needs": (BEFORE[name],), "__module__": __name__})
        globals()[name] = kind  # where workers look for it
        stages.append(kind(config))  # type: ignore[arg-type]
    return stages


def run(rows: int, scale: float, in_turn: bool) -> Played:
    """Run the stages by the engine, as one stream or one after another."""
    stages = make_stages(scale)
    with tempfile.TemporaryDirectory() as folder:
        values = {"dataset": {"path": "fake", "strict": False}}
        asked = engine.Request(Path(folder) / "run", values, 1, stages)
        with engine.opened(asked, freeze_fake(rows, 1)) as this:
            specs = engine.specs(this, asked)
            for group in [[step] for step in this.steps] if in_turn else [this.steps]:
                found = this.survey()
                index = this.steps.index(group[0])
                tickets = {group[0].name: write_tickets(this.store.tickets_dir, this.steps, index, found)}
                execute.execute(group, specs, tickets, lambda events: None, make_desk())
            assert this.survey().counts["evaluate"].done == rows
            return measure(this.store.session_dir / "journal", in_turn)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Played:
    """What came of a way: seconds between the run's first and last row, the groups' idle share of them, and the shares
    of before a group's first row, between its rows, and after its last."""

    span: float
    idle: float
    parts: tuple[float, float, float] | None = None


def measure(journal: Path, in_turn: bool) -> Played:
    """From what the workers noted of each batch's begin and end."""
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    busy, groups = 0.0, []
    for file in journal.glob("*.jsonl"):
        name = file.name.partition("-")[0]
        events = [json.loads(line) for line in file.read_text().splitlines()]
        times[name] += [event["t"] for event in events]
        if name == "video" and events:
            seconds = sum(event.get("seconds", 0.0) for event in events)
            groups.append((events[0]["t"], events[-1]["t"], seconds))
            busy += seconds
    everything = [t for ts in times.values() for t in ts]
    if in_turn:
        span = sum(max(t) - min(t) for t in times.values())
        return Played(span, idle_share(busy, GROUPS, span))
    first, last = min(everything), max(everything)
    span = last - first
    whole = GROUPS * span
    before = sum(begun - first for begun, _, _ in groups) + (GROUPS - len(groups)) * span
    between, after = sum(e - b - s for b, e, s in groups), sum(last - ended for _, ended, _ in groups)
    return Played(span, idle_share(busy, GROUPS, span), (before / whole, between / whole, after / whole))


def virtual(rows: int, scale: float) -> Played:
    """The same on the virtual clock."""
    loads = [Load(s.name, rows, Rate(RATIO[s.name] * scale, "given"), s.resources()) for s in make_stages(scale)]
    sizes = {load.name: load.asks.max_workers for load in loads}
    where = dict.fromkeys(NAMES, one_machine(0)[0])
    played = simulate(loads, where, sizes, Conditions(node_s=0, load_s=0))
    return Played(played.seconds, played.idle_share("video"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--scale", type=float, default=0.03, help="seconds of a faces row")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="ways to run; all if not given")
    options = parser.parse_args()
    execute.connect()
    ways = {
        "one stream": lambda: run(options.rows, options.scale, False),
        "stage after stage": lambda: run(options.rows, options.scale, True),
        "virtual clock": lambda: virtual(options.rows, options.scale),
    }
    print(f"{options.rows} rows, a video {320 * options.scale:g} s, {GROUPS} groups; medians of {options.repeat}")
    print(f"{'':20}{'span':>10}{'groups idle':>14}{'ratio of spans':>16}")
    base = 0.0
    for way, play in ways.items():
        if options.only and way not in options.only:
            continue
        found = [play() for _ in range(options.repeat)]
        span, idle = statistics.median(p.span for p in found), statistics.median(p.idle for p in found)
        base = base or span
        print(f"{way:20}{span:9.1f}s{100 * idle:13.1f}%{span / base:16.2f}", flush=True)
        if parts := [p.parts for p in found if p.parts]:
            before, between, after = (100 * statistics.median(p[i] for p in parts) for i in range(3))
            print(f"  of it {before:.1f}% before a group's first row, {between:.1f}% between rows, {after:.1f}% after")
    execute.shutdown()


if __name__ == "__main__":
    main()
