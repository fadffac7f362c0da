"""From stages to a plan: which columns flow where, checked before anything runs."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from ipvg_ray import schema, tables
from ipvg_ray.errors import UserError
from ipvg_ray.pipeline.stage import Resources, Stage

SAMPLES = "_samples"
"""Column of identity rows that carries the identity's samples until they part ways."""
ATTEMPT = "_attempt"
"""How often the row has been tried at the stage it enters at, this try included."""
QUEUED = "_queued"
"""When the row was read, or left the stage in front: seconds since 1970."""


_BATCHES_AHEAD = 4
"""Batches that may wait in front of a stage for each that its pool can have in work."""
_LARGE_BATCH = 256
"""Rows of a batch from which on it is not dealt alone: fewer are of a stage that takes long for each."""
_ROWS_DEALT = 4096
"""Light rows that are dealt at a time at most: a few megabytes of text."""
_DEALS = 8
"""How often each worker is dealt rows at least, so that all end at about the same time."""


class PlanError(UserError, ValueError):
    """A pipeline that cannot run as it is; the message lists everything that is wrong with it."""


@dataclass(frozen=True)
class Step:
    """A stage in its place.

    Attributes:
        stage: the stage.
        table: its schema.
        arriving: columns of the rows it receives: keys, what it needs, and what later stages need.
        leaving: columns of the rows it finishes, still one row per identity or sample as they arrived.
        passing: columns of the rows it passes on; another grain than `leaving` where its identity rows are turned into
            one row per sample.
    """

    stage: Stage
    table: schema.Table
    arriving: pa.Schema
    leaving: pa.Schema
    passing: pa.Schema

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def key(self) -> str:
        return self.table.key[0]

    @property
    def light(self) -> bool:
        """Whether the rows that it receives carry no pictures, videos or other bytes."""
        return not any(_holds_bytes(field.type) for field in self.arriving)

    @property
    def explodes(self) -> bool:
        """Whether its identity rows leave as one row per sample."""
        return SAMPLES in self.leaving.names and SAMPLES not in self.passing.names


def rows_dealt(asks: Resources, light: bool = False, rows: int = 0) -> int:
    """Rows of so many in all that go to a worker at a time: a batch, so that none waits while another worker is idle.

    A task of Ray's takes some 15 ms of processors, whatever is in it. So several batches share a task where they are
    large, their rows carry no media, and there are enough for all workers.
    """
    batch, slots = asks.batch_size, asks.max_workers * asks.concurrency
    share = min(_ROWS_DEALT, rows // (slots * _DEALS))
    return batch * max(1, share // batch) if light and batch >= _LARGE_BATCH else batch


def rows_ahead(asks: Resources, before: Resources | None = None, dealt: int = 0, dealt_before: int = 0) -> int:
    """Rows that may wait in front of a stage: enough that its largest pool never stands idle for want of dealing.

    Where the stage before it works on many rows at a time, twice as many as that: it begins anew when the last of what
    it made is dealt, and takes a while.

    Args:
        dealt: rows that go to a worker of the stage at a time, where that is more than a batch.
        dealt_before: the same of the stage before it.
    """
    made = max(before.batch_size, dealt_before) * before.max_workers * before.concurrency if before else 0
    own = max(_BATCHES_AHEAD * asks.batch_size, 2 * dealt) * asks.max_workers * asks.concurrency
    return max(own, 2 * made)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_nested(kind):
        return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(test(kind) for test in tests)


def samples_type() -> pa.DataType:
    """Type of the column of identity rows that carries their samples."""
    fields = [field for name, field in schema.table("samples").columns.items() if name != "identity_id"]
    return pa.list_(pa.struct(fields))


def make_steps(stages: Sequence[Stage]) -> list[Step]:
    """Check the stages against each other and the schemas, and work out what flows between them.

    Raises:
        PlanError: where names repeat, an identity stage follows a sample stage, a needed column does not exist or
            comes too late, or two tables add the same column.
    """
    problems = _problems(stages)
    if problems:
        raise PlanError("the pipeline cannot run:\n  " + "\n  ".join(problems))
    steps = []
    for index, stage in enumerate(stages):
        after = stages[index + 1].grain if index + 1 < len(stages) else stage.grain
        steps.append(
            Step(
                stage=stage,
                table=stage.table(),
                arriving=_flow(stages, index, stage.grain),
                leaving=_flow(stages, index + 1, stage.grain),
                passing=_flow(stages, index + 1, after),
            )
        )
    return steps


def keys_of(grain: str) -> list[pa.Field]:
    """The key fields that rows of a grain carry from stage to stage."""
    text, counted = pa.string(), [pa.field(ATTEMPT, pa.int32()), pa.field(QUEUED, pa.float64())]
    if grain == "identity":
        return [pa.field("identity_id", text), pa.field(SAMPLES, samples_type()), *counted]
    return [*(pa.field(name, text) for name in ("identity_id", "sample_id", "prompt_id")), *counted]


def carried(stages: Sequence[Stage], index: int) -> list[tuple[str, str]]:
    """(table, column) of every column that stages from `index` on need and that exists before that stage."""
    sources: dict[str, str] = {}
    for table in [*(schema.table(name) for name in tables.INPUT_TABLES), *(s.table() for s in stages[:index])]:
        sources.update(dict.fromkeys(table.columns, table.name))
    wanted = dict.fromkeys(column for stage in stages[index:] for column in stage.needs)
    keys = {"identity_id", "sample_id", "prompt_id"}
    return [(sources[column], column) for column in wanted if column in sources and column not in keys]


def _flow(stages: Sequence[Stage], index: int, grain: str) -> pa.Schema:
    """Schema of rows in front of stage `index`; samples' columns ride inside the list column of identity rows."""
    types = {column: field for stage in stages[:index] for column, field in stage.table().columns.items()}
    for name in tables.INPUT_TABLES:
        types.update(schema.table(name).columns)
    columns = [c for source, c in carried(stages, index) if not (grain == "identity" and source == "samples")]
    return pa.schema([*keys_of(grain), *(pa.field(c, types[c].type) for c in columns)])


def _problems(stages: Sequence[Stage]) -> list[str]:
    problems = [] if stages else ["there is no stage"]
    known = dict.fromkeys(schema.table("identities").columns, "identities")
    sample_columns = dict.fromkeys(schema.table("samples").columns, "samples")
    grain = "identity"
    later = {column: stage.name for stage in stages for column in stage.table().columns}
    names: set[str] = set()
    for stage in stages:
        if stage.name in names:
            problems.append(f"two stages are named {stage.name}")
        names.add(stage.name)
        if stage.grain == "identity" and grain == "sample":
            problems.append(f"{stage.name} works per identity but stands behind a stage that works per sample")
        if stage.grain == "sample":
            grain = "sample"
            known = {**sample_columns, **known}
        for column in stage.needs:
            if column not in known:
                problems.append(_missing(stage, column, known, later))
        for column in stage.table().columns:
            if column in {**known, **sample_columns}:
                problems.append(f"{stage.name} adds {column!r}, which {known.get(column, 'samples')} already has")
            known[column] = stage.name
    return problems


def _missing(stage: Stage, column: str, known: dict[str, str], later: dict[str, str]) -> str:
    if column in later:
        return f"{stage.name} needs {column!r}, which comes only from {later[column]}, at or behind it"
    nearest = difflib.get_close_matches(column, known, n=1)
    return f"{stage.name} needs {column!r}, which nothing adds" + (f"; did you mean {nearest[0]!r}?" if nearest else "")
