"""What of a run is done: a few vectors over all rows, read from the key columns of the part files alone.

Nothing here makes a Python object per row: keys are Arrow arrays, everything else numpy, so a million samples cost a
few dozen megabytes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ipvg_ray import tables
from ipvg_ray.errors import UserError
from ipvg_ray.pipeline.plan import Step
from ipvg_ray.pipeline.store import FINGERPRINT, Store
from ipvg_ray.storage import RunPath, TornPartError, parquet


class InconsistentRunError(UserError):
    """A run directory whose tables contradict each other or the configuration; the message says what mends it."""


@dataclass(frozen=True)
class Index:
    """Where the rows of one table lie.

    Attributes:
        files: its part files.
        starts: int64 (files + 1,): number of the first row of each file in the table as a whole, then the total (which
            may be left out where only some of the files are listed).
        keys: string array (rows,): the key of every row.
    """

    files: list[RunPath]
    starts: np.ndarray
    keys: pa.Array


@dataclass(frozen=True)
class StageState:
    """One stage's view of the rows of its grain, in the order of the identities or samples table.

    Attributes:
        at: int64 (rows,): the row's number in the stage's table, -1 where it is not done.
        tries: int32 (rows,): tries that ended in a failure which still stands; 0 where there is none.
        attempts: int32 (rows,): tries known of at all, those of retried failures included.
    """

    at: np.ndarray
    tries: np.ndarray
    attempts: np.ndarray


@dataclass(frozen=True)
class Counts:
    """Rows of one stage: all, finished, failed here, failed in front of it, and still to do."""

    total: int
    done: int
    failed: int
    lost: int
    waiting: int


@dataclass(frozen=True)
class Survey:
    """Everything a session needs to know to do exactly what is missing.

    Attributes:
        identities, samples: where the frozen input rows lie.
        owner: int64 (samples,): the identity's row of each sample.
        first: int64 (identities + 1,): the first sample's row of each identity, then the total.
        indexes: per stage, where its rows lie.
        states: per stage, what is done and failed.
        entry: per stage, the rows of its grain that must be fed into it from files, ascending.
        counts: per stage.
        repeats: parts with rows that an earlier part has too, which a cut-off worker of an old session wrote late; and
            for each row of such a part whether it stands there first.
    """

    identities: Index
    samples: Index
    owner: np.ndarray
    first: np.ndarray
    indexes: dict[str, Index]
    states: dict[str, StageState]
    entry: dict[str, np.ndarray]
    counts: dict[str, Counts]
    repeats: list[tuple[RunPath, np.ndarray]]


def survey(store: Store, steps: Sequence[Step], fingerprints: dict[str, str]) -> Survey:
    """Read what is done.

    Args:
        fingerprints: per stage, what every part file of it must carry.

    Raises:
        InconsistentRunError: for a part of another fingerprint, or rows that a later stage has and an earlier lacks.
        TornPartError: for a part that is no whole Parquet file.
    """
    identities = read_index(store.run_dir, "identities", "identity_id")
    samples = read_index(store.run_dir, "samples", "sample_id")
    owner = _owners(store.run_dir, identities)
    first = np.searchsorted(owner, np.arange(len(identities.keys) + 1))
    # Back to front: a row that moves on while a live run is read is then seen where it came from, never only ahead.
    indexes = {s.name: read_index(store.run_dir, s.name, s.key, fingerprints[s.name]) for s in reversed(steps)}
    failures = tables.read_table(store.run_dir, "failures", ["stage", "attempt"])
    retried = tables.read_table(store.engine_dir / "retried", "failures", ["stage", "attempt"])
    states: dict[str, StageState] = {}
    repeats: list[tuple[RunPath, np.ndarray]] = []
    everything = {"identity": identities.keys, "sample": samples.keys}
    places: dict[str, np.ndarray] = {}
    for grain, keys in everything.items():
        own = [s.name for s in steps if s.stage.grain == grain]
        places |= dict(zip(own, _first_places(keys, [indexes[name].keys for name in own]), strict=True))
    for step in steps:
        keys, at = everything[step.stage.grain], places[step.name]
        repeats += _repeats(indexes[step.name], at)
        standing = np.where(at >= 0, 0, _tries(keys, step, failures))
        states[step.name] = StageState(at, standing, np.maximum(standing, _tries(keys, step, retried)))
    _refuse_holes(steps, states, owner)
    entry, counts = _frontier(steps, states, owner, len(identities.keys))
    return Survey(identities, samples, owner, first, indexes, states, entry, counts, repeats)


def _repeats(index: Index, at: np.ndarray) -> list[tuple[RunPath, np.ndarray]]:
    first = np.zeros(len(index.keys), bool)
    first[at[at >= 0]] = True
    late = np.unique(np.searchsorted(index.starts, np.flatnonzero(~first), side="right") - 1)
    return [(index.files[i], first[index.starts[i] : index.starts[i + 1]]) for i in late]


def read_index(run_dir: RunPath, name: str, key: str, fingerprint: str | None = None) -> Index:
    """Read the key column of a table.

    Raises:
        InconsistentRunError: where a part cannot be read, or carries another fingerprint.
    """
    threads = min(16, (os.cpu_count() or 1) * 4)
    files, columns = tables.read_parts(run_dir, name, lambda file: _read_keys(file, key, fingerprint), threads)
    starts = np.concatenate([[0], np.cumsum([len(c) for c in columns])]).astype(np.int64)
    keys = pa.chunked_array(columns, pa.string()).combine_chunks()
    return Index(files, starts, keys)


def _read_keys(file: RunPath, key: str, fingerprint: str | None) -> pa.Array:
    try:
        with parquet(file) as opened:
            found = (opened.schema_arrow.metadata or {}).get(FINGERPRINT, b"").decode()
            if fingerprint is not None and found != fingerprint:
                raise InconsistentRunError(
                    f"{file} was made with another configuration (fingerprint {found or 'none'}, not {fingerprint}); "
                    f"use --redo-from {file.parent.name}, or --fork into a new directory"
                )
            return opened.read([key]).column(0).combine_chunks().cast(pa.string())
    except (TornPartError, pa.ArrowInvalid, pa.ArrowKeyError) as error:
        if file.parent.name in tables.INPUT_TABLES:  # what it held cannot be made again
            raise InconsistentRunError(f"{file} cannot be read ({error}); start a new run directory") from error
        raise TornPartError(file, error) from error


def _owners(run_dir: RunPath, identities: Index) -> np.ndarray:
    owner_ids = read_index(run_dir, "samples", "identity_id").keys
    owner = _positions(owner_ids, identities.keys)
    if len(owner) and (owner.min() < 0 or (np.diff(owner) < 0).any()):
        raise InconsistentRunError(f"{run_dir}/samples does not match {run_dir}/identities; start a new run directory")
    return owner


def _positions(keys: pa.Array | pa.ChunkedArray, among: pa.Array) -> np.ndarray:
    """For each of `keys` its first place in `among`, or -1: int64, same length."""
    found = pc.index_in(keys, value_set=among)
    return np.asarray(pc.fill_null(found, -1)).astype(np.int64)


def _first_places(keys: pa.Array, tables_keys: Sequence[pa.Array]) -> list[np.ndarray]:
    """For each of the tables the first place of each of `keys` in it, or -1; `keys` are hashed once for all."""
    found = _positions(pa.chunked_array(tables_keys, pa.string()), keys)
    result, start = [], 0
    for table in tables_keys:
        rows = found[start : start + len(table)]
        start += len(table)
        at = np.full(len(keys), -1, np.int64)
        known = np.flatnonzero(rows >= 0)[::-1]  # backwards, so that the first of a repeated key is written last
        at[rows[known]] = known
        result.append(at)
    return result


def _tries(keys: pa.Array, step: Step, failures: pa.Table) -> np.ndarray:
    """Highest failed attempt of each key at a stage: int32, 0 for none."""
    rows = failures.filter(pc.equal(failures["stage"], step.name))
    tries = np.zeros(len(keys), np.int32)
    if rows.num_rows:
        places = _positions(rows[step.key].combine_chunks(), keys)
        attempts = rows["attempt"].to_numpy()
        np.maximum.at(tries, places[places >= 0], attempts[places >= 0])
    return tries


def _per_sample(step: Step, values: np.ndarray, owner: np.ndarray) -> np.ndarray:
    return values[owner] if step.stage.grain == "identity" else values


def _refuse_holes(steps: Sequence[Step], states: dict[str, StageState], owner: np.ndarray) -> None:
    for earlier, later in itertools.pairwise(steps):
        if earlier.stage.grain == later.stage.grain:
            have, lack = states[later.name].at >= 0, states[earlier.name].at < 0
        else:
            have, lack = states[later.name].at >= 0, _per_sample(earlier, states[earlier.name].at < 0, owner)
        if holes := int((have & lack).sum()):
            raise InconsistentRunError(
                f"{later.name} holds {holes} rows whose {earlier.name} is missing; use --redo-from {earlier.name}"
            )


def _frontier(
    steps: Sequence[Step], states: dict[str, StageState], owner: np.ndarray, identities: int
) -> tuple[dict[str, np.ndarray], dict[str, Counts]]:
    """Where each row goes on: the first stage that has neither finished nor failed it, if none before failed it."""
    entry: dict[str, np.ndarray] = {}
    counts: dict[str, Counts] = {}
    ready = np.ones(identities, bool)  # rows that every earlier stage has finished
    dead = np.zeros(identities, bool)  # rows that failed at an earlier stage
    grain = "identity"
    for step in steps:
        if step.stage.grain != grain:
            ready, dead, grain = ready[owner], dead[owner], step.stage.grain
        state = states[step.name]
        done, failed = state.at >= 0, state.tries > 0
        entry[step.name] = np.flatnonzero(ready & ~done & ~failed)
        counts[step.name] = Counts(
            total=len(done),
            done=int(done.sum()),
            failed=int((failed & ~done).sum()),
            lost=int(dead.sum()),
            waiting=int((~done & ~failed & ~dead).sum()),
        )
        ready, dead = done, dead | (failed & ~done)
    return entry, counts
