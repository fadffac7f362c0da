"""Which reader an identity set wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyarrow as pa

from ipvg_ray.config import DatasetConfig
from ipvg_ray.dataset import image_folder, parquet, row_files, tpige_json, vip200k
from ipvg_ray.dataset.picture_folder import is_picture
from ipvg_ray.dataset.places import Place, open_place
from ipvg_ray.dataset.problems import DatasetError
from ipvg_ray.dataset.records import check_utf8
from ipvg_ray.dataset.rows import Reading

Reader = Callable[[Place, Reading], Iterator[pa.RecordBatch]]
READERS: dict[str, Reader] = {
    "vip200k": vip200k.read,
    "images": image_folder.read,
    "csv": row_files.read_csv,
    "jsonl": row_files.read_jsonl,
    "parquet": parquet.read,
    "eval_json": row_files.read_eval_json,
    "tpige_json": tpige_json.read,
}
FOLDERS = ("vip200k", "images", "parquet")
"""Formats that are, or may be, folders."""
_SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_LOOKED_AT = 20
"""Subfolders looked into before a folder is given up."""


def open_set(config: DatasetConfig) -> tuple[Place, Reader]:
    """The identity set's place and its reader.

    Raises:
        DatasetError: where no path is set, nothing is there, or the format cannot be told.
    """
    if not config.path:
        raise DatasetError("no identity set: name one with dataset.path (a folder, a table, or an s3:// or gs:// URI)")
    place = open_place(config.path)
    folder = place.is_folder()
    if not folder and not place.is_file():
        raise DatasetError(f"there is no file or folder {place.uri}")
    kind = detect_format(config.path) if config.format == "auto" else config.format
    if kind == "eval_json" and folder:
        place, folder = place.child("eval.json"), False
        if not place.is_file():
            raise DatasetError(f"there is no file {place.uri}")
    if folder != (kind in FOLDERS) and kind != "parquet":
        want, have = ("a folder", "a file") if kind in FOLDERS else ("a file", "a folder")
        raise DatasetError(f"dataset.format {kind} wants {want}, and {place.uri} is {have}")
    return place, READERS[kind]


def detect_format(path: str) -> str:
    """The format of what lies at a path or URI, as `dataset.format` names it.

    Raises:
        DatasetError: where it cannot be told; the message says what was looked for and what was seen.
    """
    place = open_place(path)
    return _of_folder(place) if place.is_folder() else _of_file(place)


def _of_file(place: Place) -> str:
    if place.suffix in _SUFFIXES:
        return _SUFFIXES[place.suffix]
    if place.suffix == ".json":
        check_utf8(place)
        with place.open() as stream:
            start = stream.read(4096).decode("utf-8-sig", "replace").lstrip()[:1]
        if start in ("[", "{"):
            return "eval_json" if start == "[" else "tpige_json"
        raise DatasetError(
            f"{place.uri} begins with {start!r}; a JSON identity set is an array of {{img, prompt}} or an "
            'object {id: {"1": text}}'
        )
    raise DatasetError(
        f"cannot tell the format of {place.uri} by its ending; use .csv, .jsonl, .parquet or .json, or set "
        "dataset.format"
    )


def _of_folder(place: Place) -> str:
    files, folders = place.names()
    if "raw" in folders:
        return "vip200k"
    if any(name.endswith(".parquet") for name in files):
        return "parquet"
    if "eval.json" in files:
        return "eval_json"
    if any(is_picture(name) for name in files):
        return "images"
    for name in folders[:_LOOKED_AT]:
        inside, _ = place.child(name).names()
        if any(n.lower().startswith("prompt") for n in inside) or any(
            n.startswith("image.") and is_picture(n) for n in inside
        ):
            return "vip200k"
    seen = ", ".join([*files[:5], *(f"{name}/" for name in folders[:5])]) or "nothing"
    raise DatasetError(
        f"cannot tell the format of {place.uri}: looked for raw/ or folders with image.png and prompt1.txt (vip200k), "
        f"pictures (images), *.parquet, eval.json; saw {seen}. Point dataset.path at one of them, or set dataset.format"
    )
