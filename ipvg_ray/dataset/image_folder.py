"""A folder of pictures and one file of prompts: the identity is the picture's file name without its ending."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from ipvg_ray.dataset import keyed
from ipvg_ray.dataset.picture_folder import PictureFolder
from ipvg_ray.dataset.places import Place, open_place
from ipvg_ray.dataset.problems import DatasetError
from ipvg_ray.dataset.records import csv_records, jsonl_records
from ipvg_ray.dataset.rows import Columns, Reading, Row, pack

PROMPT_FILES = tuple(f"prompts.{suffix}" for suffix in ("txt", "csv", "jsonl", "json"))
"""Looked for beside the pictures where `dataset.prompts` is not set."""


def read(place: Place, reading: Reading) -> Iterator[pa.RecordBatch]:
    """Batches of `rows.RAW`.

    The prompts file is text (each line is a prompt of every picture), or CSV, JSONL or JSON keyed by identity.

    Raises:
        DatasetError: where the folder or the prompts file cannot be read.
    """
    prompts = _prompts_file(place, reading.config.prompts)
    pictures = PictureFolder(place, reading.problems)
    if not len(pictures):
        raise DatasetError(f"{place.uri} holds no picture (.png, .jpg, .jpeg, .webp)")
    rows = _every(pictures, prompts, reading) if prompts.suffix == ".txt" else _keyed(pictures, prompts, reading)
    yield from pack(rows, reading.problems)


def _prompts_file(place: Place, given: str | None) -> Place:
    if given is not None:
        file = open_place(given)
        if not file.is_file():
            raise DatasetError(f"dataset.prompts: there is no file {file.uri}")
        return file
    for name in PROMPT_FILES:
        if place.child(name).is_file():
            return place.child(name)
    raise DatasetError(
        f"{place.uri} is a folder of pictures without prompts; put {PROMPT_FILES[0]} into it (one prompt a "
        "line, for every picture) or name a .txt, .csv, .jsonl or .json with dataset.prompts"
    )


def _every(pictures: PictureFolder, prompts: Place, reading: Reading) -> Iterator[Row]:
    try:
        text = prompts.read().decode("utf-8-sig")
    except OSError as error:
        raise DatasetError(f"cannot read {prompts.uri}: {error}") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{prompts.uri} is not UTF-8 ({error.reason} at byte {error.start}); save it so") from None
    lines = [line.strip() for line in text.split("\n")]
    lines = [line for line in lines if line]
    if not lines:
        raise DatasetError(f"{prompts.uri} holds no prompt; write one a line")
    for identity_id, image in pictures.pictures(reading.config.limit):
        for number, line in enumerate(lines, 1):
            yield Row(identity_id, image, line, f"prompt{number}", image)


def _keyed(pictures: PictureFolder, prompts: Place, reading: Reading) -> Iterator[Row]:
    columns = Columns.of(reading.config)
    if prompts.suffix == ".csv":
        records = csv_records(prompts, reading.problems, [columns.identity_id, columns.prompt])
        keys = keyed.from_records(records, reading)
    elif prompts.suffix in (".jsonl", ".ndjson"):
        keys = keyed.from_records(jsonl_records(prompts, reading.problems), reading)
    elif prompts.suffix == ".json":
        keys = keyed.from_json(prompts, reading)
    else:
        raise DatasetError(f"dataset.prompts is {prompts.uri}; use a .txt, .csv, .jsonl or .json file")
    seen = keyed.Seen()
    yield from seen.watch(keyed.join(keys, pictures))
    for identity_id, image in pictures.others(seen.ids()):
        yield Row(identity_id, image, None, None, image)
