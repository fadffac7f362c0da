"""What readers hand on: one row per prompt, in batches of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from ipvg_ray.config import DatasetConfig
from ipvg_ray.dataset.places import Place
from ipvg_ray.dataset.problems import DatasetError, Problem, Problems, shown_id, storable

BATCH_ROWS = 8192
BATCH_BYTES = 16 << 20

RAW = pa.schema(
    {
        "identity_id": pa.string(),
        "image": pa.string(),  # absolute path or URI; `sha256:…` where image_bytes holds the picture; null: missing
        "image_bytes": pa.binary(),
        "prompt": pa.string(),  # null: the identity has no prompts, or `kind` says what is wrong with this one
        "prompt_id": pa.string(),  # null: by position
        "where": pa.string(),
        "kind": pa.string(),  # a problem of this row that the reader found
        "message": pa.string(),
        "more": pa.list_(pa.string()),  # further pictures of the person, as `image`; null: none
        "more_bytes": pa.list_(pa.binary()),  # the bytes of those that the input carried, null for paths
    }
)
"""Schema of the readers' batches."""


class Row(NamedTuple):
    """One prompt of one identity; see `RAW`. With `kind` and `message` it is refused but keeps its place and name."""

    identity_id: str
    image: str | None
    prompt: str | None
    prompt_id: str | None
    where: str
    kind: str | None = None
    message: str | None = None
    more: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Reading:
    """What a reader is given besides the place: configuration, where problems go, threads it may use."""

    config: DatasetConfig
    problems: Problems
    threads: int = 8


class UnreadableError(ValueError):
    """A row that cannot be read; the message says why and what mends it."""


@dataclass(frozen=True)
class Columns:
    """What the input calls our columns."""

    identity_id: str
    image: str
    prompt: str
    prompt_id: str

    @classmethod
    def of(cls, config: DatasetConfig, **defaults: str) -> Columns:
        """The configuration's names, else `defaults`, else our own."""
        ours = ("identity_id", "image", "prompt", "prompt_id")
        return cls(**{name: config.columns.get(name, defaults.get(name, name)) for name in ours})


def pack(rows: Iterable[Row], problems: Problems) -> Iterator[pa.RecordBatch]:
    """Batches of `RAW` from rows, each of at most `BATCH_ROWS` rows and about `BATCH_BYTES` bytes.

    Text that UTF-8 cannot hold (it was not UTF-8 in the input) becomes a `prompt_encoding` or `bad_id` problem.
    """
    held: list[Row] = []
    size = 0
    for row in rows:
        checked = _encodable(row, problems)
        if checked is None:
            continue
        held.append(checked)
        size += len(checked.prompt or "")
        if len(held) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield _batch(held)
            held, size = [], 0
    if held:
        yield _batch(held)


def _encodable(row: Row, problems: Problems) -> Row | None:
    if all(map(_is_utf8, (row.identity_id, row.prompt_id, row.image, *(row.more or ())))):
        if _is_utf8(row.prompt):
            return row if _is_utf8(row.where) else row._replace(where=storable(row.where))
        message = "the prompt is not UTF-8; save the file in that encoding"
        return row._replace(prompt=None, where=storable(row.where), kind="prompt_encoding", message=message)
    who = shown_id(row.identity_id)
    message = "the id or the picture's path is not UTF-8; rename it, or save the file in that encoding"
    problems.add(Problem("bad_id", message, row.where, who))
    return None


def _is_utf8(text: str | None) -> bool:
    if text is None or text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _batch(rows: list[Row]) -> pa.RecordBatch:
    columns = dict(zip(Row._fields, zip(*rows, strict=True), strict=True))
    arrays = [
        pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(len(rows), field.type)
        for field in RAW
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=RAW)


def text_of(value: object, column: str) -> str:
    """An id or path as text; whole numbers are taken too. Raises UnreadableError."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None or value == "":
        raise UnreadableError(
            f"the row has no value for {column!r}; give it one, or say what the column is called in dataset.columns"
        )
    raise UnreadableError(f"{column!r} holds {type(value).__name__} {str(value)[:40]!r}, not text")


def prompts_of(value: object, prompt_id: object = None) -> list[tuple[str | None, str | None]]:
    """(prompt_id, prompt) pairs of a value: a text, a list of texts, or `{"1": text}`; `1` is named `prompt1`.

    An element that is no text comes out as a None prompt; an empty list as none at all.

    Args:
        prompt_id: the name of a single prompt, or a list of names as long as the list of prompts.

    Raises:
        UnreadableError: where the value is none of these, or the names do not fit.
    """
    if isinstance(value, dict):
        if prompt_id is not None:
            raise UnreadableError("the prompts are named twice, by their keys and by a prompt_id; leave one out")
        return [(f"prompt{key}" if key.isdecimal() else key, _text_or_none(text)) for key, text in value.items()]
    if isinstance(value, list):
        names = prompt_id if isinstance(prompt_id, list) else [None] * len(value)
        if (prompt_id is not None and not isinstance(prompt_id, list)) or len(names) != len(value):
            raise UnreadableError(f"{len(value)} prompts need a list of {len(value)} prompt_ids, or none")
        return [(_name(name), _text_or_none(text)) for name, text in zip(names, value, strict=True)]
    if isinstance(value, str):
        return [(_name(prompt_id), value)]
    if value is None:
        raise UnreadableError("the row has no prompt; give it a text or a list of texts")
    raise UnreadableError(f"the prompt is {type(value).__name__} {str(value)[:40]!r}, not a text or a list of texts")


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _name(value: object) -> str | None:
    return None if value is None or value == "" else text_of(value, "prompt_id")


def rows_of(
    identity_id: str,
    images: Sequence[str],
    value: object,
    prompt_id: object,
    where: str,
    missing: str | None = None,
) -> list[Row]:
    """The rows of one identity's prompts, as `prompts_of` understands `value`.

    Args:
        images: absolute paths or URIs of its pictures, the first of them its own; none where there is no picture.
        missing: where there is no picture, the sentence that says where it was looked for.
    """
    image, more = (images[0] if images else None), tuple(images[1:]) or None
    kind = "missing_image" if image is None else None
    try:
        pairs = prompts_of(value, prompt_id)
    except UnreadableError as error:
        if kind:
            return [Row(identity_id, None, None, None, where, kind, missing)]
        return [Row(identity_id, image, None, None, where, "unreadable_row", str(error), more)]
    if not pairs:
        return [Row(identity_id, image, None, None, where, kind, missing, more)]
    rows = []
    for name, text in pairs:
        if text is None and kind is None:
            rows.append(Row(identity_id, image, None, name, where, "unreadable_row", "the prompt is not a text", more))
        else:
            rows.append(Row(identity_id, image, text, name, where, kind, missing, more))
    return rows


def reference(base: Place, value: str) -> str:
    """Absolute path or URI of a picture that the input names. Raises UnreadableError."""
    try:
        return base.resolve(value).uri
    except DatasetError as error:
        raise UnreadableError(str(error)) from None
