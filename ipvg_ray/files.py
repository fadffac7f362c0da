"""Files on disk: checksums, a lock between processes, and JSON that is written whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def git_blob_sha1(path: Path) -> str:
    """The object id that git gives this content; the Hub lists it for files that are not stored with LFS."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def files_below(path: Path) -> list[Path]:
    """All files of a folder in a fixed order; a file stands for itself, nothing for nothing."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file())


def listing(paths: list[Path], root: Path) -> dict[str, dict[str, Any]]:
    """Path relative to `root` to `{size, sha256}` of each file."""
    return {p.relative_to(root).as_posix(): {"size": p.stat().st_size, "sha256": sha256_file(p)} for p in paths}


def differing(files: dict[str, dict[str, Any]], root: Path, *, verify: bool = False) -> list[str]:
    """Which files of a `listing` are gone, of another size, or, with `verify`, of other content."""
    wrong = []
    for name, facts in files.items():
        path = root / name
        same = path.is_file() and path.stat().st_size == facts["size"]
        if not same or (verify and sha256_file(path) != facts["sha256"]):
            wrong.append(name)
    return wrong


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name and move it into place, so that no reader sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no such file or no object in it."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return value if isinstance(value, dict) else None


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold a lock that other processes of this machine wait for; the system frees it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
