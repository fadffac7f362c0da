"""One row through one stage on the spot, in this process, to see what it does; nothing of the run is changed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.compute as pc

from ipvg_ray import tables
from ipvg_ray.errors import UserError
from ipvg_ray.media.names import safe_name
from ipvg_ray.pipeline.plan import make_steps
from ipvg_ray.pipeline.rundir import Request
from ipvg_ray.pipeline.stage import Row, RowError, StageContext
from ipvg_ray.pipeline.store import Store
from ipvg_ray.pipeline.survey import survey
from ipvg_ray.pipeline.tickets import read_rows, write_tickets
from ipvg_ray.pipeline.worker import rows_of, with_seeds


class ReplayError(UserError):
    """A row that cannot be replayed: it does not exist, or has not come as far as the stage."""


@dataclass(frozen=True)
class FolderMedia:
    """Publishes media into a plain folder instead of the run."""

    folder: Path

    def publish(self, folder: str, identity_id: str, name: str, suffix: str, data: bytes) -> str:
        """See `ipvg_ray.pipeline.stage.MediaWriter`."""
        place = self.folder / folder / safe_name(identity_id) / f"{safe_name(name)}{suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        return str(place)


def replay(request: Request, key: str, media: Path, device: str) -> Row | RowError:
    """Run the last of `request.stages` on one row, as the run would: same columns, same seed.

    Args:
        key: the row's identity_id or sample_id, whichever the stage's grain is.
        media: folder for what the stage publishes.
        device: `cpu` or `cuda`.

    Raises:
        ReplayError: where there is no such row, or an earlier stage has not finished it.
        Exception: whatever the stage raises, as it raises it.
    """
    run = tables.read_run(request.run_dir)
    steps = make_steps(request.stages)
    step, prints = steps[-1], {name: kept["fingerprint"] for name, kept in run["stages"].items()}
    found = survey(Store(request.run_dir, ""), steps, prints)
    keys = found.identities.keys if step.stage.grain == "identity" else found.samples.keys
    row = pc.index(keys, key).as_py()
    if row < 0:
        raise ReplayError(f"{request.run_dir} has no {step.stage.grain} {key!r}")
    for earlier in steps[:-1]:
        place = found.owner[row] if earlier.stage.grain == "identity" != step.stage.grain else row
        if found.states[earlier.name].at[place] < 0:
            raise ReplayError(f"{key!r} has not come as far as {step.name}: {earlier.name} has not finished it")
    one = dataclasses.replace(found, entry=found.entry | {step.name: np.array([row])})
    with TemporaryDirectory() as folder:
        batch = next(read_rows(write_tickets(Path(folder), steps, len(steps) - 1, one), 0, 1, 1))
    step.stage.setup(StageContext(device, step.stage.resources().threads, FolderMedia(media), str(request.run_dir)))
    (result,) = step.stage.process(rows_of(with_seeds(batch, step.stage, request.seed), step.stage))
    return result


def summary(value: Any) -> Any:
    """A result's value short enough to print: long texts, vectors and pictures are told by their size."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, dict):
        return {name: summary(part) for name, part in value.items()}
    if isinstance(value, list | tuple) and len(value) > 12:
        return f"{len(value)} values, from {value[0]!r} to {value[-1]!r}"
    return value
