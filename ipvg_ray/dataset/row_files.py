"""CSV, JSONL, and the challenge's `eval.json`: every row names its pictures and its prompts.

Source of the last: the IPVG challenge's 2026 edition, an array of `{img, prompt}`.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Iterator

import pyarrow as pa

from ipvg_ray.dataset.places import Place, open_place
from ipvg_ray.dataset.problems import Problem
from ipvg_ray.dataset.records import Record, csv_records, json_records, jsonl_records
from ipvg_ray.dataset.rows import Columns, Reading, Row, UnreadableError, pack, reference, rows_of, text_of


def read_csv(place: Place, reading: Reading) -> Iterator[pa.RecordBatch]:
    """Batches of `rows.RAW` from a CSV file with a header.

    Raises:
        DatasetError: where it cannot be read or lacks the column identity_id, image or prompt.
    """
    columns = Columns.of(reading.config)
    records = csv_records(place, reading.problems, [columns.identity_id, columns.image, columns.prompt])
    yield from pack(_rows(records, columns, place, reading), reading.problems)


def read_jsonl(place: Place, reading: Reading) -> Iterator[pa.RecordBatch]:
    """Batches of `rows.RAW` from a file with one JSON object per line. Raises DatasetError where it cannot be read."""
    records = jsonl_records(place, reading.problems)
    yield from pack(_rows(records, Columns.of(reading.config), place, reading), reading.problems)


def read_eval_json(place: Place, reading: Reading) -> Iterator[pa.RecordBatch]:
    """Batches of `rows.RAW` from the challenge's file; the identity is the picture's file name without its ending.

    Raises:
        DatasetError: where it cannot be read.
    """
    columns = Columns.of(reading.config, image="img")
    records = _with_ids(json_records(place, reading.problems), columns)
    yield from pack(_rows(records, columns, place, reading), reading.problems)


def _with_ids(records: Iterable[Record], columns: Columns) -> Iterator[Record]:
    for where, record in records:
        image = record.get(columns.image)
        if isinstance(image, str) and columns.identity_id not in record:
            stem = posixpath.splitext(posixpath.basename(image))[0]
            yield where, {**record, columns.identity_id: stem}
        else:
            yield where, record


def _rows(records: Iterable[Record], columns: Columns, place: Place, reading: Reading) -> Iterator[Row]:
    base = open_place(reading.config.images) if reading.config.images else place.parent
    for where, record in records:
        identity_id = ""
        try:
            images = _pictures(record.get(columns.image), columns.image)
            identity_id = text_of(record.get(columns.identity_id), columns.identity_id)
            uris = [reference(base, image) for image in images]
        except UnreadableError as error:
            reading.problems.add(Problem("unreadable_row", str(error), where, identity_id))
            continue
        yield from rows_of(identity_id, uris, record.get(columns.prompt), record.get(columns.prompt_id), where)


def _pictures(value: object, column: str) -> list[str]:
    """The pictures a row names: one, or a list of them, which CSV writes as JSON: `["a.png", "b.png"]`."""
    if isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]"):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UnreadableError(
                f'{column!r} looks like a list of pictures and is not JSON ({error}); write ["a.png", "b.png"]'
            ) from None
    if not isinstance(value, list):
        return [_picture(value, column)]
    if not value:
        raise UnreadableError(f"the list of pictures in {column!r} is empty; give it one")
    return [_picture(one, column) for one in value]


def _picture(value: object, column: str) -> str:
    if isinstance(value, dict):
        value = value.get("path")
    return text_of(value, column)
