"""A mirror of models: a shared folder or an s3:// prefix from which every node takes one copy to its own disk.

Beside each model the mirror keeps a listing with the size and SHA-256 of its files, written last. A node takes a model
under a lock, so that many workers of one node fetch it once; a copy counts only when every file has the listed sum, and
what came before a cut is kept.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from ipvg_ray import files
from ipvg_ray.errors import ChecksumError, FetchError
from ipvg_ray.storage import RunPath, copy_file

_FILES_AT_ONCE = 4
"""Files of a model on their way at a time; of each large one several ranges are."""
_TRIES = 3


def publish(name: str, root: Path, mirror: RunPath, report: Callable[[str], object] = print) -> bool:
    """Put a model into the mirror; False where the same is there already.

    Args:
        name: of the model, below `root`.

    Raises:
        FetchError: where `root` does not hold it.
    """
    source = root / name
    if not source.exists():
        raise FetchError(f"{source} is not there; fetch it with `ipvg-ray models pull`")
    facts: dict[str, Any] = {"model": name, "files": files.listing(files.files_below(source), source)}
    if _listing(name, mirror) == facts:
        return False
    _listing_place(name, mirror).unlink(missing_ok=True)  # while files change the mirror does not have the model
    size = sum(file["size"] for file in facts["files"].values())
    report(f"{name}: {len(facts['files'])} files, {size / 1e9:.1f} GB")
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        list(pool.map(lambda part: _put(source / part, mirror / name, part), facts["files"]))
    place = _listing_place(name, mirror)
    if isinstance(place, Path):
        place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(facts))
    return True


def take(name: str, root: Path, mirror: RunPath, report: Callable[[str], object] = print) -> bool:
    """Have a model of the mirror below `root`; False where this machine has it already.

    A copy that did not come from the mirror is its owner's: one of the listed sizes is used as it is.

    Raises:
        FetchError: where the mirror does not have the model or lists files outside of it, the disk has no room for it,
            or another copy than the mirror's own lies in its place.
        ChecksumError: where files keep coming with another sum than is listed.
    """
    wanted = _listing(name, mirror)
    target, note = root / name, root / ".mirrored" / f"{_flat(name)}.json"
    if wanted is None:
        raise FetchError(f"the mirror {mirror} does not have {name}; put it there with `ipvg-ray models mirror`")
    _ask_paths(name, wanted["files"], mirror)
    with files.file_lock(root / ".mirrored" / f"{_flat(name)}.lock"):
        same, mirrored = not files.differing(wanted["files"], target), note.is_file() and not target.is_symlink()
        if same and (not mirrored or files.read_json(note) == wanted):
            return False
        if not mirrored and (target.exists() or target.is_symlink()):
            raise FetchError(
                f"{target} did not come from the mirror {mirror}, and is another {name} than it has; "
                "move it away, or set models.mirror to null"
            )
        stage = root / ".mirrored" / f"{_flat(name)}.part"
        stage.mkdir(parents=True, exist_ok=True)
        _ask_disk(name, wanted["files"], stage)
        report(f"taking {name} from {mirror}")
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            list(pool.map(lambda item: _take(mirror / name, stage / "model", *item), wanted["files"].items()))
        files.write_json(note, {})  # what is cut off from here on is the mirror's copy, and not whole
        if target.is_dir():
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(stage / "model", target)
        files.write_json(note, wanted)
        shutil.rmtree(stage, ignore_errors=True)
    return True


def holds(name: str, mirror: RunPath) -> bool:
    """Whether the mirror has a model."""
    return _listing(name, mirror) is not None


def _put(source: Path, place: RunPath, part: str) -> None:
    target = place if part == "." else place / part
    _copy(source, target)


def _copy(source: RunPath, target: RunPath) -> None:
    """Byte by byte on disk: what is linked would change with its source."""
    if isinstance(source, Path) and isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    else:
        copy_file(source, target)


def _take(place: RunPath, stage: Path, part: str, facts: dict[str, Any]) -> None:
    """One file, checked; one that came whole before a cut is not fetched again."""
    source, target = (place, stage) if part == "." else (place / part, stage / part)
    for _ in range(_TRIES):
        if target.is_file() and target.stat().st_size == facts["size"] and files.sha256_file(target) == facts["sha256"]:
            return
        target.unlink(missing_ok=True)
        try:
            _copy(source, target)
        except FileNotFoundError as error:
            raise FetchError(f"{source} is listed in the mirror and is not there; mirror the model again") from error
    raise ChecksumError(f"{source} has another SHA-256 than the mirror lists; mirror the model again")


def _ask_paths(name: str, wanted: Iterable[str], mirror: RunPath) -> None:
    """A listing is what others wrote: none of its paths may lead out of the model's folder."""
    for part in wanted:
        path = PurePosixPath(part)
        if path.is_absolute() or ".." in path.parts:
            raise FetchError(f"the mirror {mirror} lists {part!r} for {name}, which lies outside of the model")


def _ask_disk(name: str, wanted: dict[str, dict[str, Any]], stage: Path) -> None:
    held = sum(p.stat().st_size for p in files.files_below(stage))
    need, free = sum(file["size"] for file in wanted.values()) - held, shutil.disk_usage(stage).free
    if need > free:
        raise FetchError(f"{name} needs {need / 1e9:.1f} GB more and {stage} has {free / 1e9:.1f} GB free")


def _listing(name: str, mirror: RunPath) -> dict[str, Any] | None:
    try:
        return dict(json.loads(_listing_place(name, mirror).read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _listing_place(name: str, mirror: RunPath) -> RunPath:
    return mirror / ".listings" / f"{_flat(name)}.json"


def _flat(name: str) -> str:
    return name.replace("/", "__")
