"""What the engine costs: rows per second of three stages that do nothing, with our checkpoints and as a plain Ray Data
chain of the same stages run beside it; and how long a finished run takes to survey.

usage: python benchmarks/engine.py [--rows 20000] [--batch 100] [--repeat 3]
Prints medians and the ratio ours / plain; 1.0 would be free.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

TESTS = str(Path(__file__).parent.parent / "tests")
sys.path.insert(0, TESTS)
os.environ["PYTHONPATH"] = TESTS  # the workers need the stages of tests/engine_driver.py too

from engine_driver import freeze_fake, request

from ipvg_ray.pipeline import execute
from ipvg_ray.pipeline import run as engine
from ipvg_ray.pipeline.plan import Step, make_steps
from ipvg_ray.pipeline.tickets import write_tickets


class Plain:
    """The same stages without checkpoints: rows to dictionaries, process, rows to Arrow."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [row | {"seed": 0} for row in batch.to_pylist()]
        added = [{"text": f"{row['prompt']}", "blob": b"\0" * 1000} for row in rows]
        return pa.Table.from_pylist([row | new for row, new in zip(rows, added, strict=True)])


def plain(rows: int, batch: int, stages: Sequence[Step]) -> float:
    """Seconds for a chain of `map_batches` over the same number of rows."""
    import ray

    table = pa.table({"sample_id": [f"id{i}" for i in range(rows)], "prompt": ["p" * 20] * rows})
    started = time.perf_counter()
    dataset = ray.data.from_arrow(table).repartition(target_num_rows_per_block=batch)
    for step in stages:
        dataset = dataset.map_batches(
            type(step.name, (Plain,), {}),
            fn_constructor_args=(step,),
            batch_size=batch,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=0.1,
        )
    for _ in dataset.iter_internal_ref_bundles():
        pass
    return time.perf_counter() - started


def ours(rows: int, batch: int) -> tuple[float, float]:
    """Seconds of one execution with checkpoints, and of opening the finished run again."""
    with tempfile.TemporaryDirectory() as folder:
        asked = request(Path(folder) / "run", batch=batch)
        asked.stages[-1].one = lambda row: {"answer": row["text"], "uri": ""}  # type: ignore[attr-defined]
        freeze = freeze_fake(rows // 4, 4)
        with engine.opened(asked, freeze) as this:
            files: dict[str, Any] = {
                s.name: write_tickets(this.store.tickets_dir, this.steps, i, this.found)
                for i, s in enumerate(this.steps)
                if len(this.found.entry[s.name])
            }
            specs = engine.specs(this, asked)
            started = time.perf_counter()
            execute.execute(this.steps, specs, files, lambda events: None)
            seconds = time.perf_counter() - started
        started = time.perf_counter()
        with engine.opened(asked, freeze) as again:
            assert all(counts.waiting == 0 for counts in again.found.counts.values())
        return seconds, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    execute.connect()
    steps = make_steps(request(Path("unused")).stages)
    pairs = [
        (plain(options.rows, options.batch, steps), ours(options.rows, options.batch)) for _ in range(options.repeat)
    ]
    execute.shutdown()
    chain = statistics.median(p for p, _ in pairs)
    full = statistics.median(o for _, (o, _) in pairs)
    survey = statistics.median(s for _, (_, s) in pairs)
    print(f"{options.rows} samples, 3 stages, batches of {options.batch}, median of {options.repeat}")
    print(f"plain Ray Data chain   {chain:7.2f} s  {options.rows / chain:8.0f} rows/s")
    print(f"with checkpoints       {full:7.2f} s  {options.rows / full:8.0f} rows/s")
    print(f"ratio ours / plain     {full / chain:7.2f}")
    print(f"survey of the finished run {survey:.2f} s")


if __name__ == "__main__":
    main()
