"""How far a run is: what is finished, failed and waiting, per sample and per stage, and which samples to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ipvg_ray import schema, tables
from ipvg_ray.report.lookup import Lookup
from ipvg_ray.storage import RunPath

STAGES = ("faces", "matting", "prompts", "first_frame", "video", "evaluate")
"""The stages of a run whose run.json does not name its own."""
FAILED, FINISHED, BEGUN, WAITING = range(4)
"""A sample's status, in the order in which samples are chosen for the page."""

_FAILURE_KEYS = ["stage", "identity_id", "sample_id", "where"]
_FAILURE_COLUMNS = [*_FAILURE_KEYS, "kind", "attempt"]
_KEY = {"identity": "identity_id", "sample": "sample_id"}


@dataclass(frozen=True)
class StageProgress:
    """Rows of one stage. `blocked` rows failed at an earlier stage, so this one will not see them."""

    name: str
    grain: str
    total: int
    done: int
    failed: int
    blocked: int

    @property
    def waiting(self) -> int:
        return self.total - self.done - self.failed - self.blocked


@dataclass(frozen=True)
class Progress:
    """State of a whole run.

    Attributes:
        identities: number of identities.
        samples: columns identity_id and sample_id of all samples, in the set's order.
        status: of each sample, int8: FAILED, FINISHED, BEGUN or WAITING.
        stages: per stage, in the order of the pipeline.
        lookups: the stages' tables, with their key column read.
        failures: the failures table, with `open_failures` the numbers of its rows that still stand: the latest
            attempt at each row, where it has not succeeded since.
        mended: rows that failed and succeeded when they were tried again.
    """

    identities: int
    samples: pa.Table
    status: np.ndarray
    stages: list[StageProgress]
    lookups: dict[str, Lookup]
    failures: Lookup
    open_failures: np.ndarray
    mended: int

    def count(self, *status: int) -> int:
        return int(np.isin(self.status, status).sum())


def read_progress(run_dir: RunPath, run: Mapping[str, Any]) -> Progress:
    """Read the keys of every table of a run and work out what has become of each row."""
    names = [name for name in run.get("stages") or STAGES if name not in (*tables.INPUT_TABLES, "failures")]
    identities = tables.read_table(run_dir, "identities", [])["identity_id"]
    samples = tables.read_table(run_dir, "samples", []).select(["identity_id", "sample_id"])
    lookups = {name: Lookup.open(run_dir, name, _narrow_columns(name)) for name in names}
    failures = Lookup.open(run_dir, "failures", _FAILURE_COLUMNS)
    standing, mended = _standing(failures, lookups)
    failed = failures.narrow.take(pa.array(standing)) if len(failures) else _no_failures()

    stages, status = _follow(identities, samples, lookups, failed)
    return Progress(len(identities), samples, status, stages, lookups, failures, standing, mended)


def _follow(
    identities: pa.ChunkedArray, samples: pa.Table, lookups: Mapping[str, Lookup], failures: pa.Table
) -> tuple[list[StageProgress], np.ndarray]:
    """Go through the stages with every identity and sample; returns the stages' progress and the samples' status."""
    units = {"identity": identities, "sample": samples["sample_id"]}
    stopped = {grain: np.zeros(len(keys), bool) for grain, keys in units.items()}
    owner = pc.fill_null(pc.index_in(samples["identity_id"], value_set=identities.combine_chunks()), -1).to_numpy()
    finished = begun = np.zeros(len(samples), bool)
    stages = []
    for name, lookup in lookups.items():
        grain = _grain(name, lookup)
        done = _in(units[grain], lookup.column(_KEY[grain]))
        here = _failed_at(identities, samples, failures, name, grain) & ~done
        blocked = stopped[grain] & ~done & ~here
        stages.append(StageProgress(name, grain, len(done), *(int(mask.sum()) for mask in (done, here, blocked))))
        stopped[grain] |= here
        if grain == "identity":
            stopped["sample"] |= _of_owner(here, owner)
            done = _of_owner(done, owner)
        finished, begun = done, begun | done
    status = np.select([stopped["sample"] & ~finished, finished, begun], [FAILED, FINISHED, BEGUN], WAITING)
    return stages, status.astype(np.int8)


def _of_owner(mask: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """An identities' mask as one of their samples; a sample whose identity is unknown gets False."""
    result: np.ndarray = np.append(mask, False)[owner]
    return result


def choose(status: np.ndarray, rows: int) -> np.ndarray:
    """Which samples to show: at most `rows`, as ascending indices.

    Failed ones come first, then finished, begun and waiting ones, each kind spread evenly over the set. Where failed
    ones alone would fill the page they get half of it, so that it still shows videos.
    """
    others = int((status != FAILED).sum())
    room = {FAILED: max((rows + 1) // 2, rows - others)}
    chosen: list[np.ndarray] = []
    left = rows
    for kind in (FAILED, FINISHED, BEGUN, WAITING):
        candidates = np.flatnonzero(status == kind)
        count = min(len(candidates), left, room.get(kind, left))
        if count:
            chosen.append(candidates[np.arange(count) * len(candidates) // count])
            left -= count
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)


def score_columns() -> list[str]:
    """Columns of the evaluate table that are scores: numbers and truth values."""
    columns = schema.table("evaluate").columns.values()
    return [
        c.name
        for c in columns
        if pa.types.is_boolean(c.type) or pa.types.is_floating(c.type) or pa.types.is_integer(c.type)
    ]


def _narrow_columns(name: str) -> list[str]:
    scores = [*score_columns(), "skipped"] if name == "evaluate" else []
    return ["identity_id", "sample_id", *scores]


def _grain(name: str, lookup: Lookup) -> str:
    """Grain of a stage: as its schema says, or, of a stage without one, as its rows show."""
    if name in schema.tables():
        return schema.table(name).grain
    known = lookup.narrow.column_names
    return "identity" if known and "sample_id" not in known else "sample"


def _in(values: pa.ChunkedArray, keys: pa.ChunkedArray) -> np.ndarray:
    keys = pc.unique(keys).drop_null() if len(keys) else pa.array([], pa.string())
    mask: np.ndarray = pc.is_in(values, value_set=keys).to_numpy()
    return mask


def _failed_at(
    identities: pa.ChunkedArray, samples: pa.Table, failures: pa.Table, stage: str, grain: str
) -> np.ndarray:
    """Identities or samples, as the stage's grain is, that failed at a stage, themselves or with their identity."""
    here = failures.filter(pc.equal(failures["stage"], stage))
    whole = here.filter(pc.is_null(here["sample_id"]))["identity_id"]
    if grain == "identity":
        return _in(identities, whole)
    return _in(samples["sample_id"], here["sample_id"]) | _in(samples["identity_id"], whole)


def _no_failures() -> pa.Table:
    full = tables.stored_schema("failures")
    return pa.schema([full.field(column) for column in _FAILURE_COLUMNS]).empty_table()


def _standing(failures: Lookup, lookups: Mapping[str, Lookup]) -> tuple[np.ndarray, int]:
    """Numbers of the failures that still stand, ascending, and how many rows have been mended by another attempt."""
    if not len(failures):
        return np.zeros(0, np.int64), 0
    attempts = pc.fill_null(failures.column("attempt"), 1).to_numpy()
    order = np.lexsort((np.arange(len(attempts)), attempts))
    ranked = failures.narrow.take(pa.array(order)).append_column("rank", pa.array(np.arange(len(order))))
    last = ranked.group_by(_FAILURE_KEYS).aggregate([("rank", "max")])["rank_max"].to_numpy()
    latest = np.sort(order[last])
    rows = failures.narrow.take(pa.array(latest))
    mended = np.zeros(len(latest), bool)
    for name, lookup in lookups.items():
        own = pc.equal(rows["stage"], name).to_numpy()
        key = _KEY[_grain(name, lookup)]
        mended |= own & _in(rows[key], lookup.column(key))
    return latest[~mended], int(mended.sum())


def group_failures(rows: pa.Table, places: np.ndarray, order: Sequence[str]) -> list[tuple[str, str, np.ndarray]]:
    """Failures by (stage, kind): the set's own first, then by stage in the pipeline's order; larger groups first.

    Args:
        rows: narrow columns of all failures.
        places: numbers of those that stand.

    Returns:
        (stage, kind, numbers of the rows) of each group.
    """
    if not len(places):
        return []
    own = rows.take(pa.array(places)).select(["stage", "kind"]).append_column("place", pa.array(places))
    groups = own.group_by(["stage", "kind"]).aggregate([("place", "list")]).to_pylist()
    rank = {name: number for number, name in enumerate(["dataset", *order])}
    groups.sort(key=lambda g: (rank.get(g["stage"], len(rank)), -len(g["place_list"]), g["kind"] or ""))
    return [(g["stage"] or "?", g["kind"] or "error", np.sort(np.array(g["place_list"], np.int64))) for g in groups]
