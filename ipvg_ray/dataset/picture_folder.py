"""Pictures by identity in a folder: `<id>.png`, or `<id>/image.png` and further ones as `<id>/image*.png`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc

from ipvg_ray.dataset.places import Place
from ipvg_ray.dataset.problems import DatasetError, Problem, Problems

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""Endings of pictures, in the order in which they are preferred."""


def is_picture(name: str) -> bool:
    """Whether a file's name ends as a picture's."""
    return name.lower().endswith(SUFFIXES)


class PictureFolder:
    """What a folder holds, as Arrow arrays: ids are only ever compared with names that stand in its listing.

    Of several pictures with one stem the first by name is used, the others are reported as `duplicate_identity`.

    Raises:
        DatasetError: where the folder cannot be listed.
    """

    def __init__(self, folder: Place, problems: Problems) -> None:
        self.folder = folder
        files, folders = folder.names()
        pictures = [name for name in files if is_picture(name)]
        stems = [name.rpartition(".")[0] for name in pictures]
        seen: set[str] = set()
        kept = []
        for stem, name in zip(stems, pictures, strict=True):
            if stem in seen:
                message = "a second picture of this identity, the first is used; keep one of them, or rename one"
                problems.add(Problem("duplicate_identity", message, folder.child(name).uri, stem))
            else:
                seen.add(stem)
                kept.append(name)
        self._names = _texts(kept)
        self._stems = _texts([name.rpartition(".")[0] for name in kept])
        self._folders = _texts(folders)

    def __len__(self) -> int:
        return len(self._names)

    def pictures(self, limit: int | None = None) -> Iterator[tuple[str, str]]:
        """(stem, URI) of every picture, by name."""
        for stem, name in islice(zip(self._stems, self._names, strict=True), limit):
            yield stem.as_py(), self.folder.child(name.as_py()).uri

    def others(self, ids: pa.Array) -> Iterator[tuple[str, str]]:
        """As `pictures`, without those whose stem is among `ids`."""
        rest = pc.invert(pc.is_in(self._stems, value_set=ids))
        for stem, name in zip(self._stems.filter(rest), self._names.filter(rest), strict=True):
            yield stem.as_py(), self.folder.child(name.as_py()).uri

    def find(self, ids: list[str]) -> list[list[str]]:
        """URIs of each identity's pictures, [] where there is none."""
        wanted = pa.array([_storable(i) for i in ids], pa.large_string())
        by_stem = pc.index_in(wanted, value_set=self._stems).to_pylist()
        in_folder = pc.is_in(wanted, value_set=self._folders).to_pylist()
        found: list[list[str]] = []
        for identity_id, at, inside in zip(ids, by_stem, in_folder, strict=True):
            pictures = self._inside(identity_id) if inside else []
            if not pictures and at is not None:
                pictures = [self.folder.child(self._names[at].as_py()).uri]
            found.append(pictures)
        return found

    def missing(self, identity_id: str) -> str:
        """Where an identity's picture was looked for."""
        endings = ", ".join(SUFFIXES)
        return f"no picture: looked for {identity_id}/image*.* and {identity_id}.* ({endings}) in {self.folder.uri}"

    def _inside(self, identity_id: str) -> list[str]:
        folder = self.folder.child(identity_id)
        try:
            files, _ = folder.names()
        except DatasetError:
            return []  # named as missing_image by the caller
        return [folder.child(name).uri for name in references(files)[0]]


def references(files: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names of an identity's pictures among the files of its folder, `image*` with a picture's ending.

    Returns:
        Those to use: `image.png` first, then `image2.png`, … by number; and those left out because another file of
        the same stem is used, `image.jpg` beside `image.png`.
    """
    pictures = [name for name in files if name.lower().startswith("image") and is_picture(name)]
    by_preference = sorted(pictures, key=lambda name: SUFFIXES.index("." + name.lower().rpartition(".")[2]))
    used: dict[str, str] = {}
    doubled = [name for name in by_preference if used.setdefault(name.lower().rpartition(".")[0], name) != name]
    return [used[stem] for stem in sorted(used, key=natural)], doubled


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts prompt10 behind prompt9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _storable(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return text


def _texts(names: list[str]) -> pa.Array:
    """Names that UTF-8 can hold; no id equals any other."""
    return pa.array([name for name in names if _storable(name) is not None], pa.large_string())
