"""The VIP-200K layout: `raw/idNNN/image.png` and `prompt1.txt` … beside it; `raw` may be left out.

Further pictures of a person lie beside the first as `image2.png` and so on, which the published set has none of.

Source: the sample data of github.com/rain152/IPVG.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow as pa

from ipvg_ray.dataset.picture_folder import natural, references
from ipvg_ray.dataset.places import Place, ordered_map
from ipvg_ray.dataset.problems import DatasetError, Problem
from ipvg_ray.dataset.rows import Reading, Row, pack

_PROMPT = re.compile(r"prompt.*\.txt", re.IGNORECASE)


def root_of(place: Place) -> Place:
    """The folder that holds the identities' folders."""
    raw = place.child("raw")
    return raw if raw.is_folder() else place


def read(place: Place, reading: Reading) -> Iterator[pa.RecordBatch]:
    """Batches of `rows.RAW`, identities in the order of their names, prompts by number.

    Only the identities' names are held; their folders are read by `reading.threads` threads, a few ahead of the caller.

    Raises:
        DatasetError: where the folder cannot be listed.
    """
    root = root_of(place)
    _, names = root.names()
    names = names[: reading.config.limit]
    yield from pack(_rows(root, names, reading), reading.problems)


def _rows(root: Place, names: list[str], reading: Reading) -> Iterator[Row]:
    with ThreadPoolExecutor(reading.threads) as pool:
        for rows, problem in ordered_map(pool, partial(_identity, root), names, 8 * reading.threads):
            if problem is not None:
                reading.problems.add(problem)
            yield from rows


def _identity(root: Place, name: str) -> tuple[list[Row], Problem | None]:
    """One identity's rows, and what else is wrong with its folder."""
    folder = root.child(name)
    try:
        files, _ = folder.names()
    except DatasetError as error:
        return [], Problem("unreadable_row", f"{error}; make the folder readable", folder.uri, name)
    pictures, doubled = references(files)
    prompts = sorted((file for file in files if _PROMPT.fullmatch(file)), key=natural)
    problem = None
    if doubled:
        message = f"another picture of the same name beside {', '.join(pictures)}, which is used; keep one of them"
        problem = Problem("duplicate_identity", message, folder.child(doubled[0]).uri, name)
    if pictures:
        first, *more = (folder.child(file).uri for file in pictures)
        bare = Row(name, first, None, None, folder.uri, more=tuple(more) or None)
    else:
        missing = f"no image.png, .jpg, .jpeg or .webp in {folder.uri}; put one there"
        bare = Row(name, None, None, None, folder.uri, "missing_image", missing)
    return [_prompt_row(bare, folder.child(file)) for file in prompts] or [bare], problem


def _prompt_row(row: Row, file: Place) -> Row:
    row = row._replace(prompt_id=file.stem, where=file.uri)
    if row.kind is not None:
        return row
    try:
        return row._replace(prompt=file.read().decode("utf-8-sig").strip())
    except UnicodeDecodeError as error:
        message = f"the file is not UTF-8 ({error.reason} at byte {error.start}); save it in that encoding"
        return row._replace(kind="prompt_encoding", message=message)
    except OSError as error:
        return row._replace(kind="unreadable_row", message=f"{error}; make the file readable")
