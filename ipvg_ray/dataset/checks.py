"""What makes an id or a prompt unusable, checked on whole batches; the message of each problem."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ipvg_ray.config import DatasetConfig
from ipvg_ray.dataset.problems import Problem, Problems, shown_id

MAX_ID = 200
"""Characters of an identity's or a prompt's id."""
_ID_RULE = f"use 1 to {MAX_ID} characters, none of them a control character"


class Fault(IntEnum):
    """What is wrong with a row as a prompt. `READER`: the row's own `kind` and `message` say it."""

    OK = 0
    NO_PROMPT = 1
    EMPTY = 2
    LONG = 3
    PROMPT_ID = 4
    READER = 5
    DUPLICATE = 6
    OTHER_PICTURE = 7


def with_good_ids(batches: Iterable[pa.RecordBatch], problems: Problems) -> Iterator[pa.RecordBatch]:
    """The batches without rows whose identity_id cannot be used; those become `bad_id` problems."""
    for batch in batches:
        bad = _bad_ids(batch.column("identity_id"))
        for row in np.flatnonzero(bad):
            given = batch.column("identity_id")[int(row)].as_py() or ""
            message = f"the identity_id {shown_id(given)!r} cannot be used; {_ID_RULE}"
            problems.add(Problem("bad_id", message, batch.column("where")[int(row)].as_py(), shown_id(given)))
        yield batch.filter(pa.array(~bad)) if bad.any() else batch


def first_identities(batches: Iterable[pa.RecordBatch], limit: int) -> Iterator[pa.RecordBatch]:
    """Only the rows of the first `limit` identities that appear; all batches are read, rows may stand anywhere."""
    known = pa.array([], pa.string())
    for batch in batches:
        ids = batch.column("identity_id")
        if len(known) < limit:
            known = pc.unique(pa.concat_arrays([known, ids]))[:limit]
        yield batch.filter(pc.is_in(ids, value_set=known))


def faults(batch: pa.RecordBatch, config: DatasetConfig) -> np.ndarray:
    """The `Fault` of each row, int8 (n,), as far as the row alone shows it."""
    prompt, prompt_id = batch.column("prompt"), batch.column("prompt_id")
    empty = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(prompt)), 0)
    long = pc.greater(pc.utf8_length(prompt), config.max_prompt_chars)
    given = pc.is_valid(prompt_id).to_numpy(zero_copy_only=False)
    by_reader = pc.fill_null(pc.not_equal(batch.column("kind"), "missing_image"), False)
    result = np.zeros(len(batch), np.int8)
    for fault, rows in (
        (Fault.LONG, long),
        (Fault.EMPTY, empty),
        (Fault.NO_PROMPT, pc.is_null(prompt)),
        (Fault.READER, by_reader),
    ):
        result[pc.fill_null(rows, False).to_numpy(zero_copy_only=False)] = fault
    result[given & _bad_ids(prompt_id)] = Fault.PROMPT_ID
    return result


def problem_of(fault: Fault, row: dict[str, str | None], config: DatasetConfig) -> Problem:
    """The problem of a row with the columns identity_id, prompt_id, prompt, where, kind and message."""
    kind, message = "unreadable_row", row["message"] or ""
    if fault == Fault.READER:
        kind = row["kind"] or kind
    elif fault == Fault.EMPTY:
        kind, message = "empty_prompt", "the prompt is empty; write one, or remove it"
    elif fault == Fault.LONG:
        size, most = len(row["prompt"] or ""), config.max_prompt_chars
        kind = "prompt_too_long"
        message = f"the prompt has {size} characters, above {most}; shorten it, or raise dataset.max_prompt_chars"
    elif fault == Fault.PROMPT_ID:
        kind = "bad_id"
        message = f"the prompt_id {shown_id(row['prompt_id'] or '')!r} cannot be used; {_ID_RULE}"
    elif fault == Fault.DUPLICATE:
        kind = "duplicate_sample"
        message = "an earlier row has the same sample_id and is used; give this prompt another prompt_id"
    elif fault == Fault.OTHER_PICTURE:
        kind = "duplicate_identity"
        message = "an earlier row gives this identity_id another picture, which is used; give this person another id"
    sample_id = f"{row['identity_id']}/{shown_id(row['prompt_id'] or '')}"
    return Problem(kind, message, row["where"], row["identity_id"] or "", sample_id)


def _bad_ids(ids: pa.Array) -> np.ndarray:
    """Bool (n,): null, blank, with control characters, or too long."""
    blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(ids)), 0)
    bad = pc.or_(pc.or_(blank, pc.match_substring_regex(ids, r"\p{Cc}")), pc.greater(pc.utf8_length(ids), MAX_ID))
    return pc.fill_null(bad, True).to_numpy(zero_copy_only=False)
