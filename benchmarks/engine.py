"""What the engine costs: five stages that do next to nothing, on Ray, with our checkpoints, with ours but nothing
written, and as a plain Ray Data chain of the same stages run beside them. Then the start of a resume and the
backpressure, from `resume.py` and `backpressure.py`.

usage: python benchmarks/engine.py [--rows 240000] [--batch 1000] [--repeat 5] [--only throughput|resume|backpressure]
Measured from when the first rows reach the first stage to when the last reach the last one, all actors being up: their
start, which a run pays once, is left out and shown apart. Prints medians, and the ratios of each run to the plain chain
that was run before it; 1.0 would be free.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import ray
from ray.data import DataContext

HERE = Path(__file__).parent
PATHS = [str(HERE), str(HERE.parent / "tests")]
sys.path[:0] = PATHS
os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)  # the workers need these modules too

import backpressure
import resume
from light_stages import CLOCK, NAMES, STAGES, make_stages

from ipvg_ray.pipeline import execute
from ipvg_ray.pipeline import run as engine
from ipvg_ray.pipeline.desk import make_desk
from ipvg_ray.pipeline.plan import rows_dealt
from ipvg_ray.pipeline.stage import Resources, Stage
from ipvg_ray.pipeline.store import Store
from ipvg_ray.pipeline.tickets import write_tickets
from ipvg_ray.storage import RunPath

PROMPTS = 5


class Plain:
    """A stage without a checkpoint: rows to dictionaries, process, rows to Arrow, the last text handed on."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        added = self.stage.process(rows)
        keep = ("identity_id", "sample_id", "prompt_id")
        return pa.Table.from_pylist(
            [{key: row[key] for key in keep} | new for row, new in zip(rows, added, strict=True)]  # type: ignore[operator]
        )


def plain(rows: int, batch: int, block: int) -> None:
    """A chain of `map_batches` over the same rows, which lie in the object store in blocks of `block` rows."""
    ids = [f"id{i // PROMPTS:05d}" for i in range(rows)]
    keys = {"identity_id": ids, "sample_id": [f"{k}/prompt{i % PROMPTS}" for i, k in enumerate(ids)]}
    table = pa.table({**keys, "prompt_id": ["prompt"] * rows, "prompt": [f"prompt of {k}" for k in ids]})
    dataset = ray.data.from_arrow([table.slice(start, block) for start in range(0, rows, block)])
    for stage in make_stages(batch):
        dataset = dataset.map_batches(
            type(stage.name, (Plain,), {}),
            fn_constructor_args=(stage,),
            batch_size=batch,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=0.1,
        )
    for _ in dataset.iter_internal_ref_bundles():
        pass


@dataclass(frozen=True)
class Unwritten(Store):
    """A store that forgets: what the engine costs beside its files."""

    def publish_table(self, name: str, part: str, table: pa.Table, fingerprint: str = "") -> RunPath:
        return self.part(name, part)


def ours(rows: int, batch: int, written: bool) -> None:
    """One execution of the engine."""
    with tempfile.TemporaryDirectory() as folder:
        values = {"dataset": {"path": "fake", "strict": False}}
        asked = engine.Request(Path(folder) / "run", values, 1, make_stages(batch))
        with engine.opened(asked, resume.freeze(rows, 10_000)) as this:
            if not written:
                this.store = Unwritten(this.store.run_dir, this.store.session)
            specs = engine.specs(this, asked)
            tickets = {NAMES[0]: write_tickets(this.store.tickets_dir, this.steps, 0, this.found)}
            execute.execute(this.steps, specs, tickets, lambda events: None, make_desk())
            if written:
                assert this.survey().counts[NAMES[-1]].done == rows


def measure(way: Callable[[], None], rows: int) -> tuple[float, float]:
    """Seconds until the first rows reached the first stage, and seconds per row from then on."""
    clock = Path(os.environ[CLOCK])
    clock.unlink(missing_ok=True)
    started = time.time()
    way()
    ticks = [(name, float(at), int(count)) for name, at, count in map(str.split, clock.read_text().splitlines())]
    ended = [(at, count) for name, at, count in ticks if name == NAMES[-1]]
    assert sum(count for _, count in ended) == rows, "a row did not reach the last stage, or twice"
    first = min(at for _, at, _ in ticks)
    return first - started, (ended[-1][0] - first) / rows


def throughput(rows: int, batch: int, repeat: int) -> None:
    """Print milliseconds per thousand rows of each way."""
    ways = {
        "plain Ray Data chain": lambda: plain(rows, batch, batch),
        "the same, dealt as ours": lambda: plain(rows, batch, rows_dealt(Resources(batch_size=batch), True, rows)),
        "ipvg_ray, nothing written": lambda: ours(rows, batch, False),
        "ipvg_ray, with checkpoints": lambda: ours(rows, batch, True),
    }
    seen: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CLOCK] = str(Path(folder) / "clock")  # before Ray starts, so that workers have it too
        execute.connect()
        DataContext.get_current().wait_for_min_actors_s = 120
        for _ in range(repeat):
            for way, run in ways.items():
                seen[way].append(measure(run, rows))
        execute.shutdown()
    print(f"{len(STAGES)} stages, batches of {batch}, {rows} rows, medians of {repeat}")
    print(f"{'':28}{'first rows':>12}{'ms per 1000 rows':>18}{'rows/s':>10}{'ratio':>8}   ratios of each round")
    base = [cost for _, cost in seen["plain Ray Data chain"]]
    for way, pairs in seen.items():
        first, cost = (statistics.median(values) for values in zip(*pairs, strict=True))
        ratios = [own / other for (_, own), other in zip(pairs, base, strict=True)]
        each = " ".join(f"{ratio:.2f}" for ratio in ratios)
        ratio = statistics.median(ratios)
        print(f"{way:28}{first:11.2f}s{cost * 1e6:18.1f}{1 / cost:10.0f}{ratio:8.2f}   {each}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=240_000)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", choices=["throughput", "resume", "backpressure"])
    options = parser.parse_args()
    if options.only in (None, "throughput"):
        throughput(options.rows, options.batch, options.repeat)
    if options.only in (None, "resume"):
        resume.main([])
    if options.only in (None, "backpressure"):
        backpressure.main([])


if __name__ == "__main__":
    main()
