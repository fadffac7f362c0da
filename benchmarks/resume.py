"""What it costs to see what is missing: `plan` and the start of a resume of N samples with five finished stages, of
which the last lacks a tenth, against one scan of the same key columns by pyarrow in the same process.

usage: python benchmarks/resume.py [--rows 10000 100000 1000000] [--part 10000] [--repeat 3]
Prints medians, their ratios to the scan, and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

from light_stages import NAMES, make_stages

from ipvg_ray import tables
from ipvg_ray.pipeline import run as engine
from ipvg_ray.pipeline.store import FINGERPRINT
from ipvg_ray.pipeline.tickets import write_tickets

PROMPTS = 5


def write(run_dir: Path, name: str, table: pa.Table, part: int, fingerprint: str = "") -> None:
    """A table in part files of `part` rows."""
    (run_dir / name).mkdir(parents=True, exist_ok=True)
    table = table.replace_schema_metadata({FINGERPRINT: fingerprint.encode()})
    for number, start in enumerate(range(0, table.num_rows, part)):
        pq.write_table(table.slice(start, part), run_dir / name / f"part-{number:06d}.parquet", compression="zstd")


def freeze(rows: int, part: int) -> engine.Freeze:
    """An identity set of `rows` samples, five to an identity, made column by column."""

    def make(out: Path) -> dict[str, object]:
        count = rows // PROMPTS
        ids = pa.array([f"id{i:07d}" for i in range(count)])
        picture = pa.array([{"bytes": None, "path": "x.png"}]).take(pa.array([0] * count))
        sizes = pa.array(range(count), pa.int32())
        stored = tables.stored_schema("identities")
        known = {"identity_id": ids, "image": picture, "image_sha256": ids, "image_width": sizes, "image_height": sizes}
        columns = [known[f.name].cast(f.type) if f.name in known else pa.nulls(count, f.type) for f in stored]
        write(out, "identities", pa.table(columns, schema=stored), part)
        owners = ids.take(pa.array([i // PROMPTS for i in range(rows)]))
        names = pa.array([f"prompt{i % PROMPTS}" for i in range(rows)])
        keys = pa.array([f"id{i // PROMPTS:07d}/prompt{i % PROMPTS}" for i in range(rows)])
        table = pa.table([keys, owners, names, names], names=tables.stored_schema("samples").names)
        write(out, "samples", table.cast(tables.stored_schema("samples")), part)
        return {"path": "fake", "format": "fake", "identities": count, "samples": rows, "problems": 0}

    return make


def finish(run_dir: Path, asked: engine.Request, part: int) -> None:
    """Give every stage all rows but the last stage's last tenth."""
    with engine.opened(asked, lambda out: {}) as this:
        prints = {name: p.digest for name, p in this.prints.items()}
        identities, samples = this.found.identities.keys, this.found.samples.keys
        owners = identities.take(pa.array(this.found.owner))
    for stage in asked.stages:
        keys = identities if stage.grain == "identity" else samples
        if stage is asked.stages[-1]:
            keys, owners = keys.slice(0, len(keys) * 9 // 10), owners.slice(0, len(keys) * 9 // 10)
        full = tables.stored_schema(stage.table())
        filler = {pa.int64(): 1, pa.string(): "some text of a row", pa.binary(): b"x" * 100, pa.float32(): 0.5}
        columns = {f.name: pa.repeat(pa.scalar(filler[f.type], f.type), len(keys)) for f in full}
        columns["identity_id"] = keys if stage.grain == "identity" else owners
        columns[stage.table().key[0]] = keys
        write(run_dir, stage.name, pa.table(columns, schema=full), part, prints[stage.name])


def measure(rows: int, part: int, repeat: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        asked = engine.Request(run_dir, {"dataset": {"path": "fake", "strict": False}}, 1, make_stages(500))
        with engine.opened(asked, freeze(rows, part)):
            pass
        finish(run_dir, asked, part)
        scans, plans, starts = [], [], []
        for _ in range(repeat):
            began = time.perf_counter()
            for stage in asked.stages:
                pads.dataset(run_dir / stage.name, format="parquet").to_table(columns=[stage.table().key[0]])
            pads.dataset(run_dir / "samples", format="parquet").to_table(columns=["sample_id", "identity_id"])
            scans.append(time.perf_counter() - began)
            began = time.perf_counter()
            with engine.opened(asked, lambda out: {}) as this:
                plans.append(time.perf_counter() - began)
                waiting = this.found.counts[NAMES[-1]].waiting
                write_tickets(this.store.tickets_dir, this.steps, len(NAMES) - 1, this.found)
                starts.append(time.perf_counter() - began)
        assert waiting == rows - rows * 9 // 10
        scan, plan, start = (statistics.median(times) for times in (scans, plans, starts))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{rows:>9} samples  scan {scan:6.2f} s  plan {plan:6.2f} s ({plan / scan:.1f})  ", end="")
        print(f"start of a resume {start:6.2f} s ({start / scan:.1f})  peak memory so far {peak:5.0f} MB", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--part", type=int, default=10_000)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args(arguments)
    for rows in options.rows:
        measure(rows, options.part, options.repeat)


if __name__ == "__main__":
    main()
