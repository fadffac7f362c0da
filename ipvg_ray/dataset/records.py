"""CSV, JSONL and JSON-array files as records: (where, column → value), one at a time."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import TextIO

from ipvg_ray.dataset.json_stream import JsonError, elements
from ipvg_ray.dataset.places import Place
from ipvg_ray.dataset.problems import DatasetError, Problem, Problems

Record = tuple[str, dict[str, object]]
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def check_utf8(place: Place) -> None:
    """Refuse a file that is plainly UTF-16, or cannot be opened. Raises DatasetError."""
    try:
        with place.open() as stream:
            start = stream.read(2)
    except OSError as error:
        raise DatasetError(f"cannot read {place.uri}: {error}") from error
    if start in _UTF16:
        raise DatasetError(f"{place.uri} is UTF-16; save it as UTF-8")


def csv_records(place: Place, problems: Problems, required: Sequence[str]) -> Iterator[Record]:
    """Records of a CSV file with a header line.

    Raises:
        DatasetError: where the file cannot be read, or its header lacks a required column.
    """
    check_utf8(place)
    with _text(place, newline="") as text:
        lines = csv.reader(text)
        try:
            header = [name.strip() for name in next(lines, [])]
        except csv.Error as error:
            raise DatasetError(f"{place.uri}:1: the header cannot be read: {error}") from None
        _check_header(place, header, required)
        while True:
            where = f"{place.uri}:{lines.line_num + 1}"
            try:
                fields = next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                problems.add(Problem("unreadable_row", f"{error}; look for a quote that is not closed", where))
                continue
            if not fields:
                continue
            if len(fields) != len(header):
                message = f"the row has {len(fields)} columns, the header {len(header)}; quote texts that hold commas"
                problems.add(Problem("unreadable_row", message, where))
                continue
            yield where, dict(zip(header, fields, strict=True))


def _check_header(place: Place, header: list[str], required: Sequence[str]) -> None:
    missing = [name for name in required if name not in header]
    if missing:
        raise DatasetError(missing_columns(place.uri, missing, header))
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise DatasetError(f"{place.uri} has the column {', '.join(doubled)} twice; rename one")


def missing_columns(uri: str, missing: Sequence[str], found: Sequence[str]) -> str:
    """The sentence for columns that a table lacks."""
    return (
        f"{uri} has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, found)) or 'none'}. "
        "Say what they are called with dataset.columns, such as --set 'dataset.columns={identity_id: person}'"
    )


def jsonl_records(place: Place, problems: Problems) -> Iterator[Record]:
    """Records of a file with one JSON object per line. Raises DatasetError where it cannot be read."""
    check_utf8(place)
    with _text(place) as text:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            where = f"{place.uri}:{number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                problems.add(Problem("unreadable_row", f"not JSON: {error}", where))
                continue
            if isinstance(value, dict):
                yield where, value
            else:
                problems.add(Problem("unreadable_row", "the line is JSON but not an object like {…}", where))


def json_elements(place: Place, problems: Problems) -> Iterator[tuple[str, str | None, object]]:
    """(where, key, value) of each element of a JSON array or object; see `json_stream.elements`.

    What stands behind a fault is lost, and the problem says so. Raises DatasetError where the file cannot be read.
    """
    check_utf8(place)
    with place.open() as stream:
        try:
            for line, key, value in elements(stream):
                yield f"{place.uri}:{line}", key, value
        except JsonError as error:
            message = f"not JSON from here on, the rest of the file was not read: {error}"
            problems.add(Problem("unreadable_row", message, f"{place.uri}:{error.line}"))


def json_records(place: Place, problems: Problems) -> Iterator[Record]:
    """Records of a JSON array of objects. Raises DatasetError where the file cannot be read."""
    for where, key, value in json_elements(place, problems):
        if isinstance(value, dict) and key is None:
            yield where, value
        else:
            problems.add(Problem("unreadable_row", "expected an array of objects like [{…}, {…}]", where))


def _text(place: Place, newline: str | None = None) -> TextIO:
    """A text stream; bytes that are not UTF-8 come out as lone surrogates, which `rows.pack` names as a problem."""
    return io.TextIOWrapper(place.open(), encoding="utf-8-sig", errors="surrogateescape", newline=newline)
