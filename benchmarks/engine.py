"""What the engine costs: five stages that do next to nothing, on Ray, with our checkpoints, with ours but nothing
written, and as a plain Ray Data chain of the same stages run beside them. Then the start of a resume and the
backpressure, from `resume.py` and `backpressure.py`.

usage: python benchmarks/engine.py [--rows 50000] [--batch 500] [--repeat 3] [--only throughput|resume|backpressure]
The cost of a row is what twice the rows take longer, divided by the rows: the start of actors, which a run pays once,
is left out and shown apart. Prints medians and the ratios to the plain chain; 1.0 would be free.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

HERE = Path(__file__).parent
PATHS = [str(HERE), str(HERE.parent / "tests")]
sys.path[:0] = PATHS
os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)  # the workers need these modules too

import backpressure
import resume
from light_stages import NAMES, STAGES, make_stages

from ipvg_ray.pipeline import execute
from ipvg_ray.pipeline import run as engine
from ipvg_ray.pipeline.desk import make_desk
from ipvg_ray.pipeline.stage import Stage
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


def plain(rows: int, batch: int) -> float:
    """Seconds for a chain of `map_batches` over the same number of rows."""
    import ray

    ids = [f"id{i // PROMPTS:05d}" for i in range(rows)]
    keys = {"identity_id": ids, "sample_id": [f"{k}/prompt{i % PROMPTS}" for i, k in enumerate(ids)]}
    table = pa.table({**keys, "prompt_id": ["prompt"] * rows, "prompt": [f"prompt of {k}" for k in ids]})
    blocks = [table.slice(start, batch) for start in range(0, rows, batch)]
    started = time.perf_counter()
    dataset = ray.data.from_arrow(blocks)
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
    return time.perf_counter() - started


@dataclass(frozen=True)
class Unwritten(Store):
    """A store that forgets: what the engine costs beside its files."""

    def publish_table(self, name: str, part: str, table: pa.Table, fingerprint: str = "") -> RunPath:
        return self.part(name, part)


def ours(rows: int, batch: int, written: bool) -> float:
    """Seconds of one execution."""
    with tempfile.TemporaryDirectory() as folder:
        values = {"dataset": {"path": "fake", "strict": False}}
        asked = engine.Request(Path(folder) / "run", values, 1, make_stages(batch))
        with engine.opened(asked, resume.freeze(rows, 10_000)) as this:
            if not written:
                this.store = Unwritten(this.store.run_dir, this.store.session)
            specs = engine.specs(this, asked)
            started = time.perf_counter()
            tickets = {NAMES[0]: write_tickets(this.store.tickets_dir, this.steps, 0, this.found)}
            execute.execute(this.steps, specs, tickets, lambda events: None, make_desk())
            seconds = time.perf_counter() - started
            if written:
                assert this.survey().counts[NAMES[-1]].done == rows
            return seconds


def throughput(rows: int, batch: int, repeat: int) -> None:
    """Print seconds per thousand rows of the three ways."""
    ways = {
        "plain Ray Data chain": lambda n: plain(n, batch),
        "ipvg_ray, nothing written": lambda n: ours(n, batch, False),
        "ipvg_ray, with checkpoints": lambda n: ours(n, batch, True),
    }
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    execute.connect()
    for _ in range(repeat):
        for way, measure in ways.items():
            times[way].append((measure(rows), measure(2 * rows)))
    execute.shutdown()
    print(f"{len(STAGES)} stages, batches of {batch}, {rows} and {2 * rows} rows, medians of {repeat}")
    print(f"{'':28}{'one run':>10}{'twice':>10}{'ms per 1000 rows':>18}{'rows/s':>10}{'ratio':>8}")
    base = 0.0
    for way, pairs in times.items():
        once, twice = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
        cost = statistics.median(pair[1] - pair[0] for pair in pairs) / rows
        base = base or cost
        print(f"{way:28}{once:9.2f}s{twice:9.2f}s{cost * 1e6:18.1f}{1 / cost:10.0f}{cost / base:8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--repeat", type=int, default=3)
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
