"""Prompts keyed by identity, the pictures found in a folder by the identity's name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc

from ipvg_ray.dataset.picture_folder import PictureFolder
from ipvg_ray.dataset.places import Place
from ipvg_ray.dataset.problems import Problem
from ipvg_ray.dataset.records import Record, json_elements
from ipvg_ray.dataset.rows import Columns, Reading, Row, UnreadableError, rows_of, text_of

_CHUNK = 2048

Prompts = tuple[str, str, object, object]
"""(where, identity_id, prompts as `rows.prompts_of` takes them, prompt_id)."""


def join(prompts: Iterable[Prompts], pictures: PictureFolder) -> Iterator[Row]:
    """Rows of `prompts`, each with its identity's picture, looked up some thousand at a time."""
    source = iter(prompts)
    while chunk := list(islice(source, _CHUNK)):
        found = pictures.find([identity_id for _, identity_id, _, _ in chunk])
        for (where, identity_id, value, prompt_id), images in zip(chunk, found, strict=True):
            missing = None if images else pictures.missing(identity_id)
            yield from rows_of(identity_id, images, value, prompt_id, where, missing)


def from_records(records: Iterable[Record], reading: Reading) -> Iterator[Prompts]:
    """Prompts of table rows with columns identity_id, prompt and perhaps prompt_id."""
    columns = Columns.of(reading.config)
    for where, record in records:
        try:
            identity_id = text_of(record.get(columns.identity_id), columns.identity_id)
        except UnreadableError as error:
            reading.problems.add(Problem("unreadable_row", str(error), where))
            continue
        yield where, identity_id, record.get(columns.prompt), record.get(columns.prompt_id)


def from_json(place: Place, reading: Reading) -> Iterator[Prompts]:
    """Prompts of `{id: text}`, `{id: [texts]}`, `{id: {"1": text}}`, or of an array of objects."""
    columns = Columns.of(reading.config)
    for where, key, value in json_elements(place, reading.problems):
        if key is not None:
            yield where, key, value, None
        elif isinstance(value, dict):
            yield from from_records([(where, value)], reading)
        else:
            message = f"expected an object with {columns.identity_id!r} and {columns.prompt!r}"
            reading.problems.add(Problem("unreadable_row", message, where))


class Seen:
    """Which identities passed by, held as Arrow arrays."""

    def __init__(self) -> None:
        self._pieces: list[pa.Array] = []
        self._fresh: set[str] = set()

    def watch(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The same rows, noted."""
        for row in rows:
            self._fresh.add(row.identity_id)
            if len(self._fresh) >= _CHUNK:
                self._settle()
            yield row

    def ids(self) -> pa.Array:
        """All ids so far, some perhaps twice."""
        self._settle()
        return pc.unique(pa.chunked_array(self._pieces, pa.large_string()))

    def _settle(self) -> None:
        texts = [text.encode("utf-8", "replace").decode() for text in self._fresh]
        self._pieces.append(pa.array(texts, pa.large_string()))
        self._fresh.clear()
