"""What the page shows of each chosen sample, its identity and its failure, read from the run's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ipvg_ray import schema
from ipvg_ray.report import facts, scores
from ipvg_ray.report.embed import Budget, Clip, Picture, clip, picture
from ipvg_ray.report.identities import IdentityFacts, describe, pixels
from ipvg_ray.report.lookup import Lookup
from ipvg_ray.report.progress import FAILED, FINISHED, Progress, group_failures
from ipvg_ray.storage import RunPath

LISTED = 5000
"""Failures listed at most; a page with more is of no use to anyone, and the failures table has them all."""
TRACEBACKS = 20
"""Failures of one kind whose traceback the list carries; they are mostly the same."""

_FRAME_SIDE = 640  # pixels: about twice the place it fills on the page
_STRIP_SIDE = 1280  # pixels: eight frames side by side
_MADE_BY = ("matting", "prompts", "first_frame", "video", "evaluate")  # stages with a place of their own on a row
_DRAWN = ("face_box", "landmarks_5", "landmarks_106")
_FAILURE_COLUMNS = ("stage", "identity_id", "sample_id", "kind", "message", "where", "attempt", "failed_at")


@dataclass
class FailureView:
    """One failure. `anchor` is the shown sample it stopped, where there is one."""

    stage: str
    kind: str
    message: str
    identity_id: str
    sample_id: str | None
    where: str | None
    attempt: int
    when: str
    traceback: str | None = None
    anchor: str | None = None


@dataclass(frozen=True)
class FailureGroup:
    """Failures of one stage and kind: how many there are, and those that are listed."""

    stage: str
    kind: str
    count: int
    rows: list[FailureView]


@dataclass(frozen=True)
class ScoreView:
    """A sample's score. `value` sorts, `text` is read, `bad` marks a check that does not hold."""

    column: str
    label: str
    doc: str
    value: float | None
    text: str
    bad: bool


@dataclass
class SampleView:
    """One sample's row on the page; `missing` says, per stage, why there is nothing to show."""

    anchor: str
    sample_id: str
    prompt_id: str
    prompt: str
    status: str
    prompts: Mapping[str, Any]
    frame: Picture
    frame_size: str
    video: Mapping[str, Any]
    poster: Picture
    strip: Picture
    scores: list[ScoreView]
    failure: FailureView | None
    missing: dict[str, str]
    seconds: list[tuple[str, float]]
    clip: Clip = field(default_factory=lambda: Clip(None, None))


@dataclass
class IdentityView(IdentityFacts):
    """One identity's group: what is known of the person, and the person's samples."""

    samples: list[SampleView]


def sample_views(run_dir: RunPath, progress: Progress, chosen: np.ndarray, budget: Budget) -> list[IdentityView]:
    """The chosen samples by identity, in the set's order. Pictures take their room before videos do."""
    keys = progress.samples.take(pa.array(chosen))
    ids = [str(value) for value in keys["sample_id"].to_pylist()]
    owners = [str(value) for value in keys["identity_id"].to_pylist()]
    status = dict(zip(ids, progress.status[chosen].tolist(), strict=True))
    groups: dict[str, list[str]] = {}
    for owner, sample_id in zip(owners, ids, strict=True):
        groups.setdefault(owner, []).append(sample_id)
    rows = _read_samples(run_dir, progress, ids)
    people = _read_identities(run_dir, progress, list(groups))
    failures = _failures_of(progress, ids, owners)
    views = []
    anchors = {sample_id: f"s{number}" for number, sample_id in enumerate(ids, 1)}
    for owner, members in groups.items():
        samples = [_sample(s, anchors[s], status[s], rows, failures.get(s), progress, budget) for s in members]
        own = {name: table.get(owner, {}) for name, table in people.items()}
        absent = next((sample.missing["matting"] for sample in samples), "")
        views.append(IdentityView(**vars(describe(owner, own, absent, budget)), samples=samples))
    for view in views:
        for sample in view.samples:
            sample.clip = clip(run_dir, sample.video.get("video_uri"), budget)
    return views


def failure_groups(progress: Progress, anchors: Mapping[tuple[str, str | None], str]) -> list[FailureGroup]:
    """Every failure that stands, by stage and kind, up to `LISTED` of them.

    Args:
        anchors: (identity, sample or None) to the anchor of its row on the page.
    """
    groups = []
    left = LISTED
    narrow = progress.failures.narrow
    for stage, kind, places in group_failures(narrow, progress.open_failures, list(progress.lookups)):
        shown = places[:left]
        left -= len(shown)
        rows = _read_failures(progress.failures, shown[:TRACEBACKS], traceback=True)
        rows += _read_failures(progress.failures, shown[TRACEBACKS:], traceback=False)
        for row in rows:
            row.anchor = anchors.get((row.identity_id, row.sample_id))
        groups.append(FailureGroup(stage, kind, len(places), rows))
    return groups


def _read_samples(run_dir: RunPath, progress: Progress, ids: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Table to sample to row, of the tables that describe samples."""
    known = {"samples": Lookup.open(run_dir, "samples", ["sample_id"]), **progress.lookups}
    names = [n for n in ("samples", "prompts", "first_frame", "video", "evaluate") if n in known]
    return {name: known[name].rows("sample_id", ids, _all_columns(name)) for name in names}


def _read_identities(run_dir: RunPath, progress: Progress, ids: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    known = {"identities": Lookup.open(run_dir, "identities", ["identity_id"]), **progress.lookups}
    names = [n for n in ("identities", "faces", "matting") if n in known]
    return {name: known[name].rows("identity_id", ids, _all_columns(name)) for name in names}


def _all_columns(table: str) -> list[str]:
    """A table's columns that the page can use; of vectors those that are drawn, so no embeddings."""
    columns = schema.table(table).columns.values()
    return [*(c.name for c in columns if c.name in _DRAWN or not _holds_vectors(c.type)), "seconds"]


def _holds_vectors(kind: pa.DataType) -> bool:
    inner = kind.value_type if pa.types.is_list(kind) else kind
    return bool(pa.types.is_fixed_size_list(inner))


def _read_failures(failures: Lookup, places: np.ndarray, *, traceback: bool) -> list[FailureView]:
    columns = [*_FAILURE_COLUMNS, "traceback"] if traceback else list(_FAILURE_COLUMNS)
    return [
        FailureView(
            stage=row.get("stage") or "?",
            kind=row.get("kind") or "error",
            message=facts.clean(row.get("message") or ""),
            identity_id=row.get("identity_id") or "",
            sample_id=row.get("sample_id"),
            where=row.get("where"),
            attempt=row.get("attempt") or 1,
            when=facts.moment(row.get("failed_at")),
            traceback=facts.clean(row["traceback"]) if row.get("traceback") else None,
        )
        for row in failures.take(places, columns)
    ]


def _failures_of(progress: Progress, ids: list[str], owners: list[str]) -> dict[str, FailureView]:
    """The failure that stopped each sample, by sample; its own or its identity's, at the earliest stage."""
    places = progress.open_failures
    if not len(places) or not ids:
        return {}
    rows = progress.failures.narrow.take(pa.array(places))
    own = pc.is_in(rows["sample_id"], value_set=pa.array(ids, pa.string()))
    whole = pc.and_(
        pc.is_null(rows["sample_id"]), pc.is_in(rows["identity_id"], value_set=pa.array(owners, pa.string()))
    )
    stage = pc.is_in(rows["stage"], value_set=pa.array(list(progress.lookups), pa.string()))
    mask = pc.and_(stage, pc.or_(own, whole)).to_numpy()
    order = {name: number for number, name in enumerate(progress.lookups)}
    found = sorted(_read_failures(progress.failures, places[mask], traceback=True), key=lambda f: order[f.stage])
    by_sample, by_identity = {}, {}
    for failure in reversed(found):  # so that the earliest stage is written last
        if failure.sample_id is None:
            by_identity[failure.identity_id] = failure
        else:
            by_sample[failure.sample_id] = failure
    result = {}
    for sample_id, owner in zip(ids, owners, strict=True):
        stopped_by = by_identity.get(owner) or by_sample.get(sample_id)
        if stopped_by is not None:
            result[sample_id] = stopped_by
    return result


def _sample(
    sample_id: str,
    anchor: str,
    status: int,
    rows: Mapping[str, Mapping[str, Mapping[str, Any]]],
    failure: FailureView | None,
    progress: Progress,
    budget: Budget,
) -> SampleView:
    own = {name: table.get(sample_id, {}) for name, table in rows.items()}
    names = list(progress.lookups)
    failure = failure if status == FAILED else None
    frame_row = own.get("first_frame", {})
    return SampleView(
        anchor=anchor,
        sample_id=sample_id,
        prompt_id=own["samples"].get("prompt_id") or sample_id,
        prompt=own["samples"].get("prompt") or "",
        status={FAILED: "failed", FINISHED: "finished"}.get(status, "waiting"),
        prompts=own.get("prompts", {}),
        frame=picture(frame_row.get("first_frame"), _FRAME_SIDE, budget),
        frame_size=pixels(frame_row.get("first_frame_width"), frame_row.get("first_frame_height")),
        video=own.get("video", {}),
        poster=picture(own.get("video", {}).get("video_poster"), _FRAME_SIDE, budget),
        strip=picture(own.get("video", {}).get("video_strip"), _STRIP_SIDE, budget),
        scores=_scores(own.get("evaluate", {})),
        failure=failure,
        missing={name: _missing(name, names, failure) for name in _MADE_BY},
        seconds=[(name, seconds) for name in names if (seconds := facts.number(own.get(name, {}).get("seconds")))],
    )


def _missing(stage: str, names: Sequence[str], failure: FailureView | None) -> str:
    if stage not in names:
        return "not part of this run"
    if failure is None or failure.stage not in names:
        return "waiting"
    if stage == failure.stage:
        return "failed"
    return "not reached" if names.index(stage) > names.index(failure.stage) else "waiting"


def _scores(row: Mapping[str, Any]) -> list[ScoreView]:
    views = []
    for column in scores.score_columns():
        if column in row:
            value = row[column]
            doc = (schema.table("evaluate").columns[column].metadata or {}).get(b"doc", b"").decode()
            sortable = float(value) if isinstance(value, bool) else facts.number(value)
            views.append(ScoreView(column, scores.label(column), doc, sortable, facts.figure(value), value is False))
    return views
