"""Downloads of single files: resumed where they were cut, checked before they count, unpacked without surprises."""

from __future__ import annotations

import http.client
import os
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ipvg_ray import files
from ipvg_ray.errors import ChecksumError, FetchError

Report = Callable[[str], object]
_BLOCK = 1 << 20


class NetworkError(FetchError):
    """The other side could not be reached, or kept breaking off. What came is kept and the next try goes on from it."""


class UnsafeArchiveError(FetchError):
    """An archive with a member that would land outside its folder; nothing of it is unpacked."""


@dataclass(frozen=True)
class Downloaded:
    """A file that is whole: its bytes and SHA-256."""

    size: int
    sha256: str


def download(
    url: str,
    target: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    report: Report = print,
    tries: int = 5,
    wait: float = 1.0,
    timeout: float = 30.0,
) -> Downloaded:
    """Fetch `url` to `target`, going on from `<target>.part` where an earlier call left one.

    Args:
        url: http, https or file URL; redirects are followed.
        target: appears only when the file is whole and right.
        size, sha256: what the file must be, where known; of the checksum perhaps only the first digits.
        tries: attempts in a row that may bring nothing before the call gives up; one that brings bytes starts the
            count anew.
        wait: seconds before the second attempt, doubled for each further one up to 30.
        timeout: seconds without a byte after which an attempt counts as cut.

    Raises:
        NetworkError: no attempt got through.
        FetchError: the server says the file is not to be had.
        ChecksumError: size or checksum differ.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(target)
    failed = 0
    while True:
        before = _size(part)
        try:
            if _attempt(url, part, sha256 is not None, report, timeout):
                break
            problem = "the connection was cut"
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise FetchError(f"{url}: the server answers {error.code} {error.reason}") from error
            problem = f"the server answers {error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            problem = str(getattr(error, "reason", None) or error or type(error).__name__)
        failed = 1 if _size(part) > before else failed + 1
        if failed >= tries:
            raise NetworkError(
                f"cannot download {url}: {problem}. {_size(part):,} bytes are kept; run the same command again where "
                "there is a network and it goes on from there"
            )
        time.sleep(min(wait * 2 ** (failed - 1), 30.0))
    found = Downloaded(part.stat().st_size, files.sha256_file(part))
    if (size is not None and found.size != size) or not found.sha256.startswith(sha256 or ""):
        _forget(part)
        raise ChecksumError(
            f"{url}: got {found.size:,} bytes with sha256 {found.sha256}, expected "
            f"{'any size' if size is None else f'{size:,} bytes'} with sha256 {sha256 or 'unknown'}; thrown away"
        )
    os.replace(part, target)
    _forget(part)
    return found


def part_of(target: Path) -> Path:
    """Where an unfinished download of `target` is kept."""
    return target.with_name(target.name + ".part")


def _attempt(url: str, part: Path, checked: bool, report: Report, timeout: float) -> bool:
    """One request; True where the file is whole after it.

    Bytes are added to earlier ones only if the server can be asked whether it is still the same file (`If-Range`), or
    if a checksum will tell at the end.
    """
    notes = _notes_of(part)
    validator = (files.read_json(notes) or {}).get("validator")
    offset = _size(part) if validator or checked else 0
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "ipvg-ray"})
    if offset:
        request.add_header("Range", f"bytes={offset}-")
        if validator:
            request.add_header("If-Range", validator)
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not offset:
            raise
        if _total(error.headers.get("Content-Range")) == offset:  # cut after the last byte, before the renaming
            return True
        _forget(part)
        return False
    with response:
        resumed = response.status == 206
        start = offset if resumed else 0
        total = _total(response.headers.get("Content-Range")) if resumed else _integer(response, "Content-Length")
        files.write_json(notes, {"url": url, "validator": _validator(response)})
        with part.open("ab" if resumed else "wb") as stream:
            _copy(response, stream, start, start if total is None else total, report, part.name)
    return total is None or part.stat().st_size == total


def _copy(
    response: http.client.HTTPResponse, stream: object, start: int, total: int, report: Report, name: str
) -> None:
    done, said = start, -1
    while block := response.read(_BLOCK):
        stream.write(block)  # type: ignore[attr-defined]
        done += len(block)
        tenth = 10 * done // total if total else 0
        if tenth > said and total > 16 * _BLOCK:
            report(f"{name.removesuffix('.part')}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB")
            said = tenth


def _validator(response: http.client.HTTPResponse) -> str | None:
    tag = response.headers.get("ETag")
    if tag and not tag.startswith("W/"):  # a weak tag does not promise equal bytes
        return str(tag)
    return response.headers.get("Last-Modified")


def _total(content_range: str | None) -> int | None:
    text = (content_range or "").rpartition("/")[2]
    return int(text) if text.isdigit() else None


def _integer(response: http.client.HTTPResponse, header: str) -> int | None:
    text = response.headers.get(header, "")
    return int(text) if text.isdigit() else None


def _notes_of(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _notes_of(part).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def unzip(archive: Path, folder: Path, strip: str = "") -> None:
    """Unpack a zip archive into `folder`.

    Args:
        strip: a folder that every member must lie in, taken off the members' paths.

    Raises:
        UnsafeArchiveError: a member has an absolute path, climbs out with `..`, or is a link.
        FetchError: the file is no zip archive, or a member lies outside `strip`.
    """
    try:
        with zipfile.ZipFile(archive) as bundle:
            places = {info: folder / _member(info, strip) for info in bundle.infolist() if not info.is_dir()}
            for info, place in places.items():
                place.parent.mkdir(parents=True, exist_ok=True)
                with bundle.open(info) as source, place.open("wb") as target:
                    shutil.copyfileobj(source, target, _BLOCK)
    except zipfile.BadZipFile as error:
        raise FetchError(f"{archive.name} is not a readable zip archive: {error}") from error


def _member(info: zipfile.ZipInfo, strip: str) -> PurePosixPath:
    path = PurePosixPath(info.filename)
    linked = stat.S_ISLNK(info.external_attr >> 16)
    if path.is_absolute() or ".." in path.parts or "\\" in info.filename or ":" in info.filename or linked:
        raise UnsafeArchiveError(f"the archive holds {info.filename!r}, which would be written outside its folder")
    if strip and (path.parts[0] != strip or len(path.parts) < 2):
        raise FetchError(f"the archive holds {info.filename!r} outside of the folder {strip!r} it should have")
    return PurePosixPath(*path.parts[1:]) if strip else path
