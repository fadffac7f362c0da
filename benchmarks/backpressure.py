"""What waits between a stage and the next that is 100 times slower, however long the input: frames of 832x480, raw.

usage: python benchmarks/backpressure.py [--rows 100 200 400] [--slow 0.1]
Prints, for ours and for a plain Ray Data chain of the same two stages, the peak of the object store and of the driver's
memory above where it began, and the rows by which the first stage led at most.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pyarrow as pa

HERE = Path(__file__).parent
PATHS = [str(HERE), str(HERE.parent / "tests")]
sys.path[:0] = PATHS
os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)  # the workers need these modules too

from engine_driver import FakeConfig, FakeSection, _table, freeze_fake

from ipvg_ray import schema
from ipvg_ray.config import PoolConfig
from ipvg_ray.pipeline import execute
from ipvg_ray.pipeline import run as engine
from ipvg_ray.pipeline.desk import make_desk
from ipvg_ray.pipeline.stage import Row, RowError, Stage
from ipvg_ray.pipeline.tickets import write_tickets

FRAME = 832 * 480 * 3
FAST = 0.001
WORKERS = 2


class First(Stage):
    """Makes a frame."""

    name, grain, needs = "first", "sample", ("prompt",)

    @classmethod
    def table(cls) -> schema.Table:
        return _table("first", "sample", frame=pa.binary())

    def fingerprint_settings(self) -> dict[str, Any]:
        return {}

    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        time.sleep(FAST * len(rows))
        return [{"frame": bytes(FRAME)} for _ in rows]


class Second(First):
    """Looks at it, slowly."""

    name, needs = "second", ("frame",)
    media: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def table(cls) -> schema.Table:
        return _table("second", "sample", size=pa.int64())

    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        time.sleep(self.config.delay * len(rows))  # type: ignore[attr-defined]
        return [{"size": len(row["frame"])} for row in rows]


@dataclass
class Peaks:
    """Highest figures seen: bytes in the object store, bytes of this process above its beginning, rows ahead."""

    store: int = 0
    driver: int = 0
    lead: int = 0


@contextmanager
def watched(begun: Path, ended: Path) -> Iterator[Peaks]:
    """Watch this process, the object store, and how many files the two folders differ by."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    peaks, stop = Peaks(), threading.Event()
    base = psutil.Process().memory_info().rss

    def look() -> None:
        while not stop.wait(0.1):
            stats = get_memory_info_reply(state).store_stats
            peaks.store = max(peaks.store, stats.object_store_bytes_used)
            peaks.driver = max(peaks.driver, psutil.Process().memory_info().rss - base)
            peaks.lead = max(peaks.lead, _files(begun) - _files(ended))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield peaks
    stop.set()
    thread.join()


def _files(folder: Path) -> int:
    return len(os.listdir(folder)) if folder.is_dir() else 0


def request(run_dir: Path, slow: float) -> engine.Request:
    fast = FakeSection(pool=PoolConfig(cpus=0.1))
    section = FakeSection(pool=PoolConfig(cpus=0.1, max_workers=WORKERS, initial_workers=WORKERS))
    config = FakeConfig(first=fast, second=section, delay=slow)
    stages = [stage(config) for stage in (First, Second)]  # type: ignore[arg-type]
    return engine.Request(run_dir, {"dataset": {"path": "fake", "strict": False}}, 1, stages)


def ours(rows: int, slow: float, folder: Path) -> Peaks:
    asked = request(folder / "run", slow)
    with engine.opened(asked, freeze_fake(rows, 1)) as this:
        tickets = {"first": write_tickets(this.store.tickets_dir, this.steps, 0, this.found)}
        with watched(asked.run_dir / "first", asked.run_dir / "second") as peaks:
            execute.execute(this.steps, engine.specs(this, asked), tickets, lambda events: None, make_desk())
    return peaks


class Plain:
    """The same without a checkpoint; leaves an empty file for each row so that the lead can be seen."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self.stage = stage
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        added = self.stage.process(rows)
        (self.folder / rows[0]["sample_id"].replace("/", "_")).touch()
        return pa.Table.from_pylist(
            [{"sample_id": row["sample_id"]} | new for row, new in zip(rows, added, strict=True)]
        )


def plain(rows: int, slow: float, folder: Path) -> Peaks:
    import ray

    stages = request(folder, slow).stages
    dataset = ray.data.from_arrow(pa.table({"sample_id": [f"id{i}" for i in range(rows)], "prompt": ["p"] * rows}))
    dataset = dataset.repartition(target_num_rows_per_block=1)
    for stage, workers in zip(stages, (1, WORKERS), strict=True):
        dataset = dataset.map_batches(
            Plain,
            fn_constructor_args=(stage, folder / stage.name),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=0.1,
        )
    with watched(folder / "first", folder / "second") as peaks:
        for _ in dataset.iter_internal_ref_bundles():
            pass
    return peaks


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[100, 200, 400])
    parser.add_argument("--slow", type=float, default=0.1)
    options = parser.parse_args(arguments)
    execute.connect()
    ratio = options.slow / FAST
    print(f"frames of {FRAME / 1e6:.1f} MB, the second stage {ratio:.0f} times slower, {WORKERS} workers")
    print(f"{'':22}{'rows':>6}{'object store':>15}{'driver':>10}{'rows ahead':>12}")
    for name, measure in (("ipvg_ray", ours), ("plain Ray Data chain", plain)):
        for rows in options.rows:
            with tempfile.TemporaryDirectory() as folder:
                peaks = measure(rows, options.slow, Path(folder))
            store, driver = f"{peaks.store / 1e6:.0f} MB", f"{peaks.driver / 1e6:.0f} MB"
            print(f"{name:22}{rows:>6}{store:>15}{driver:>10}{peaks.lead:>12}", flush=True)
    execute.shutdown()


if __name__ == "__main__":
    main()
