"""Drives a run's plan, tickets and workers in one process, without Ray, so that a test can crash it where it likes."""

from __future__ import annotations

import os
import random
import uuid
from typing import Any

import pyarrow as pa
from engine_driver import freeze_fake

from ipvg_ray.pipeline import run as engine
from ipvg_ray.pipeline.ledger import TryLedger, Who
from ipvg_ray.pipeline.store import Store
from ipvg_ray.pipeline.tickets import read_rows, write_tickets
from ipvg_ray.pipeline.worker import Worker


class Crash(BaseException):
    """Stands for a killed process: nothing catches it."""


def drive(asked: engine.Request, luck: random.Random | None = None, identities: int = 5, prompts: int = 2) -> Any:
    """One session in this process, in random order; `luck` decides whether and where it crashes."""
    with engine.opened(asked, freeze_fake(identities, prompts)) as this:
        files = [write_tickets(this.store.tickets_dir, this.steps, i, this.found) for i in range(len(this.steps))]
        queues: list[list[pa.Table]] = [list(read_rows(f, 0, f.rows, 3)) if f.rows else [] for f in files]
        workers = [make_worker(this, asked, step.name) for step in this.steps]
        steps_left = luck.randint(0, 12) if luck else 10**9
        while any(queues):
            stage = (luck or random.Random(0)).choice([i for i, queue in enumerate(queues) if queue])
            batch = queues[stage].pop(0)
            size = luck.randint(1, 3) if luck else 2
            if batch.num_rows > size:
                queues[stage].insert(0, batch.slice(size))
                batch = batch.slice(0, size)
            if steps_left == 0:
                crash_somewhere(this.store, luck)
            steps_left -= 1
            left = workers[stage](batch)
            if stage + 1 < len(workers):
                assert left.schema.names == this.steps[stage + 1].arriving.names
                queues[stage + 1].append(left)
        return this


def make_worker(this: engine.Opened, asked: engine.Request, stage: str, ledger: TryLedger | None = None) -> Worker:
    """A worker of a stage; to the ledger each call is another process of it."""
    return Worker(engine.specs(this, asked)[stage], "cpu", ledger or TryLedger(), this_process())


def this_process() -> Who:
    """This process under another name at each call."""
    return Who("worker", uuid.uuid4().hex, "node", os.uname().nodename, "/nowhere")


def crash_somewhere(store: Store, luck: random.Random | None) -> None:
    """Leave behind what a kill may leave: a half written temporary file; then die."""
    assert luck is not None
    (store.session_dir / "tmp" / "half").write_bytes(b"PAR1" + luck.randbytes(20))
    raise Crash
