"""Files and folders of an identity set, on disk or in an object store, by one small interface."""

from __future__ import annotations

import io
import os
import posixpath
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import BinaryIO, TypeVar, cast
from urllib.parse import quote, unquote, urlsplit

import pyarrow.fs as pafs

from ipvg_ray.dataset.problems import DatasetError

REMOTE = ("s3", "gs", "gcs")
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Place:
    """A file or folder that may or may not exist; to name one opens no connection.

    Attributes:
        path: absolute, as its filesystem wants it: `/data/faces`, or `bucket/faces`.
        scheme: `s3`, `gs` or `gcs`; empty for local paths.
        query: options that the URI carried, such as `region=eu-west-1`; they go into every URI below it.
    """

    path: str
    scheme: str = ""
    query: str = ""

    @property
    def filesystem(self) -> pafs.FileSystem:
        """What reads it. Raises DatasetError where an object store cannot be reached."""
        return _remote(self.scheme, self.path.partition("/")[0], self.query) if self.scheme else _local()

    @property
    def uri(self) -> str:
        """Absolute local path, or URI; `pyarrow.fs.FileSystem.from_uri` and `open_place` read the latter."""
        if not self.scheme:
            return self.path
        return f"{self.scheme}://{quote(self.path)}" + (f"?{self.query}" if self.query else "")

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        """Ending with its dot, in lower case."""
        return posixpath.splitext(self.name)[1].lower()

    @property
    def parent(self) -> Place:
        return replace(self, path=posixpath.dirname(self.path))

    def child(self, name: str) -> Place:
        return replace(self, path=posixpath.normpath(posixpath.join(self.path, name)))

    def resolve(self, reference: str) -> Place:
        """What a path or URI means that was written in a file of this folder.

        Raises:
            DatasetError: for a URI of a kind that cannot be read.
        """
        if "://" in reference or posixpath.isabs(reference):
            return open_place(reference)
        return self.child(reference)

    def is_file(self) -> bool:
        return self._type() == pafs.FileType.File

    def is_folder(self) -> bool:
        return self._type() == pafs.FileType.Directory

    def _type(self) -> pafs.FileType:
        try:
            return self.filesystem.get_file_info(self.path).type
        except OSError as error:
            raise DatasetError(f"cannot look at {self.uri}: {error}") from error

    def names(self) -> tuple[list[str], list[str]]:
        """Names of the files and of the folders in this folder, each sorted; hidden ones are left out.

        Raises:
            DatasetError: where it is no folder or cannot be read.
        """
        files: list[str] = []
        folders: list[str] = []
        try:
            for name, is_folder in self._entries():
                if not name.startswith("."):
                    (folders if is_folder else files).append(name)
        except OSError as error:
            raise DatasetError(f"cannot list {self.uri}: {error}") from error
        return sorted(files), sorted(folders)

    def _entries(self) -> Iterator[tuple[str, bool]]:
        if not self.scheme:
            with os.scandir(self.path) as entries:
                yield from ((entry.name, entry.is_dir()) for entry in entries)
            return
        for info in self.filesystem.get_file_info(pafs.FileSelector(self.path)):
            yield info.base_name, info.type == pafs.FileType.Directory

    def open(self) -> BinaryIO:
        """A buffered stream of the file's bytes. Raises OSError."""
        if not self.scheme:
            return open(self.path, "rb")
        stream = self.filesystem.open_input_stream(self.path, compression=None)
        return io.BufferedReader(cast(io.RawIOBase, stream))

    def read(self) -> bytes:
        """All of the file. Raises OSError."""
        if not self.scheme:
            with open(self.path, "rb") as file:
                return file.read()
        with self.filesystem.open_input_stream(self.path, compression=None) as stream:
            return bytes(stream.read())


def open_place(text: str) -> Place:
    """The place that a local path or an `s3://`, `gs://` or `file://` URI names.

    Raises:
        DatasetError: for another scheme, or a URI that is not well formed.
    """
    if "://" not in text:
        return Place(os.path.abspath(os.path.expanduser(text)))
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise DatasetError(f"{text} is not a URI: {error}") from None
    if parts.scheme == "file":
        return Place(os.path.normpath(unquote(parts.path)))
    if parts.scheme not in REMOTE:
        raise DatasetError(f"cannot read {text}: use a local path, or a URI of {', '.join(REMOTE)}")
    if "@" in parts.netloc:
        raise DatasetError(
            f"the {parts.scheme}:// URI carries credentials, which a run would keep in its tables; put them into the "
            "environment (AWS_ACCESS_KEY_ID, …) or a profile instead"
        )
    path = posixpath.normpath(parts.netloc + unquote(parts.path))
    return Place(path, parts.scheme, parts.query)


@lru_cache
def _local() -> pafs.FileSystem:
    return pafs.LocalFileSystem()


@lru_cache
def _remote(scheme: str, bucket: str, query: str) -> pafs.FileSystem:
    """One client per bucket; a client per file would open a connection for each."""
    root = f"{scheme}://{bucket}" + (f"?{query}" if query else "")
    try:
        return pafs.FileSystem.from_uri(root)[0]
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot open {root}: {error}") from error


def ordered_map(pool: Executor, work: Callable[[T], R], items: Iterable[T], window: int) -> Iterator[R]:
    """`work` of each item in order, at most `window` of them begun and not yet handed on."""
    source = iter(items)
    begun = deque(pool.submit(work, item) for item in islice(source, window))
    while begun:
        result = begun.popleft().result()
        begun.extend(pool.submit(work, item) for item in islice(source, 1))
        yield result
