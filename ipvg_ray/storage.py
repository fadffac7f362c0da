"""Where runs lie: a folder on disk or a prefix in S3, by the few operations that a run needs of either.

`S3Path` has the shape of `pathlib.Path` as far as runs use it. Objects in S3 appear whole or not at all, so writing one
needs no temporary name. Listings and reads see every write that has ended (S3 is strongly consistent since 2020; stores
that speak its protocol must be too).

Parquet files are read by ranges through pyarrow, everything else goes through boto3. Credentials, region and endpoint
are taken from where boto3 takes them: the environment, profiles, the machine's role. Nothing of them is kept in a run.
"""

from __future__ import annotations

import fnmatch
import os
import posixpath
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ipvg_ray import s3_client
from ipvg_ray.errors import UserError

_PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds between tries of an answer that broke off."""
_MISSING = ("404", "NoSuchKey", "NotFound", "NoSuchBucket")
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired")


class StorageError(UserError, OSError):
    """An object store that refuses or cannot be reached; names the object and what the store said."""


class TornPartError(UserError):
    """A file that is no whole Parquet file: a disk that lost what it had promised to keep."""

    def __init__(self, part: RunPath, error: object) -> None:
        super().__init__(f"{part} is no whole Parquet file ({error}); the next `ipvg-ray run` on it sets it aside")
        self.part = part


@dataclass(frozen=True, order=True)
class S3Path:
    """An object or prefix of a bucket; to name one opens no connection.

    Attributes:
        bucket: name of the bucket.
        key: key of the object, or prefix without its last slash; empty for the bucket as a whole.
        known: size in bytes and time of writing (seconds since 1970), where a listing told them.
    """

    bucket: str
    key: str = ""
    known: tuple[int, float] | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> S3Path:
        return S3Path(self.bucket, posixpath.normpath(posixpath.join(self.key, name)))

    @property
    def name(self) -> str:
        return posixpath.basename(self.key)

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> S3Path:
        return S3Path(self.bucket, posixpath.dirname(self.key))

    def with_name(self, name: str) -> S3Path:
        return self.parent / name

    def resolve(self) -> S3Path:
        return self

    def relative_to(self, other: S3Path) -> str:
        return posixpath.relpath(self.key, other.key or ".")

    # -- looking -------------------------------------------------------------------------------------------------

    def is_file(self) -> bool:
        """Whether there is an object of this key."""
        return self._head() is not None

    def is_dir(self) -> bool:
        """Whether there is any object below this prefix."""
        return bool(self._list(MaxKeys=1).get("KeyCount"))

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def stat(self) -> Any:
        """`st_size` and `st_mtime` as of a file. Raises FileNotFoundError."""
        if self.known is None:
            head = self._head()
            if head is None:
                raise FileNotFoundError(str(self))
            return _stat(head["ContentLength"], head["LastModified"].timestamp())
        return _stat(*self.known)

    def glob(self, pattern: str) -> Iterator[S3Path]:
        """Objects right below this prefix whose names match `pattern` (`*`, `?`)."""
        fixed = pattern.partition("*")[0].partition("?")[0]
        for path in self._objects(fixed, Delimiter="/"):
            if fnmatch.fnmatchcase(path.name, pattern):
                yield path

    def rglob(self, pattern: str) -> Iterator[S3Path]:
        """All objects below this prefix whose names match `pattern`."""
        return (path for path in self._objects() if fnmatch.fnmatchcase(path.name, pattern))

    def folders(self) -> list[str]:
        """Names of the prefixes right below this one."""
        pages = self._pages(Delimiter="/")
        found = [prefix["Prefix"] for page in pages for prefix in page.get("CommonPrefixes", [])]
        return [posixpath.basename(prefix.rstrip("/")) for prefix in found]

    # -- reading and writing -------------------------------------------------------------------------------------

    def read_bytes(self) -> bytes:
        """The whole object. Raises FileNotFoundError, StorageError."""
        return bytes(self._call("get_object", Key=self.key, then=lambda answer: answer["Body"].read()))

    def read_text(self, errors: str = "strict") -> str:
        return self.read_bytes().decode("utf-8", errors)

    def write_bytes(self, data: bytes) -> None:
        """Write the object whole or not at all. Raises StorageError."""
        self._call("put_object", Key=self.key, Body=data)

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def touch(self) -> None:
        self.write_bytes(b"")

    def upload(self, file: Path) -> None:
        """Write the object from a local file of any size, in parts where it is large. Raises StorageError."""
        self._call("upload_file", Filename=str(file), Key=self.key, Config=s3_client.transfer())

    def download(self, file: Path) -> None:
        """Fetch the object, in parallel ranges where it is large, to a local file that is there whole or not at all.

        Raises:
            FileNotFoundError, StorageError: also where the object changed meanwhile.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        self._call("download_file", Key=self.key, Filename=str(file), Config=s3_client.transfer())

    def link(self, seconds: int) -> str:
        """A presigned link to the object: whoever has it may read the object for so long, without credentials.

        One that is signed with a role's credentials ends with these, after some hours, whatever `seconds` says.
        """
        arguments = {"Bucket": self.bucket, "Key": self.key}
        link: str = s3_client.client(os.getpid()).generate_presigned_url(
            "get_object", Params=arguments, ExpiresIn=seconds
        )
        return link

    def copy_to(self, target: S3Path) -> None:
        """Copy the object inside the store."""
        source = {"Bucket": self.bucket, "Key": self.key}
        target._call("copy", CopySource=source, Key=target.key)

    def rename(self, target: S3Path) -> None:
        """Move the object: a copy and a removal, so that a kill in between leaves both."""
        self.copy_to(target)
        self.unlink()

    def unlink(self, missing_ok: bool = True) -> None:
        """Remove the object; S3 does not tell whether it was there."""
        self._call("delete_object", Key=self.key)

    def put_if(self, data: bytes, tag: str | None) -> str | None:
        """Write the object only where it does not exist (`tag` None) or still is the version `tag`.

        Returns:
            The new version's tag, or None where somebody else was first. An answer that got lost and is asked for again
            also looks as if somebody else was first; read the object to tell.
        """
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
        taken = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")
        try:
            return str(self._call("put_object", Key=self.key, Body=data, hasty=True, **condition)["ETag"])
        except StorageError as error:
            if _code(error.__cause__) in (*taken, *(_MISSING if tag else ())):  # missing: that version was removed
                return None
            raise

    def read_tagged(self) -> tuple[bytes, str, float] | None:
        """Bytes, version tag, and seconds since the object was written by the store's own clock; None if missing."""

        def then(answer: Any) -> tuple[bytes, str, float]:
            now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
            written: datetime = answer["LastModified"]
            return answer["Body"].read(), str(answer["ETag"]), (now - written).total_seconds()

        try:
            found: tuple[bytes, str, float] = self._call("get_object", Key=self.key, then=then, hasty=True)
            return found
        except FileNotFoundError:
            return None

    # -- the store's own words -----------------------------------------------------------------------------------

    def _call(self, operation: str, then: Any = lambda answer: answer, hasty: bool = False, **arguments: Any) -> Any:
        """Ask the store; `hasty` gives up within seconds, for a lease, which must not wait longer than it lasts."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            FlexibleChecksumError,
            HTTPClientError,
            IncompleteReadError,
        )

        for pause in (None,) if hasty else (*_PAUSES, None):
            try:
                return then(getattr(s3_client.client(os.getpid(), hasty), operation)(Bucket=self.bucket, **arguments))
            except ClientError as error:
                if _code(error) in _EXPIRED:
                    s3_client.forget_credentials()
                    if pause is not None:
                        time.sleep(pause)
                        continue
                if _code(error) in _MISSING and operation != "put_object":
                    raise FileNotFoundError(f"{self}: {error}") from error
                raise StorageError(f"{self}: {error}") from error
            except (BotoCoreError, Boto3Error) as error:
                # boto3 tries requests again by itself, but not an answer that breaks off while it is read.
                broken = isinstance(error, HTTPClientError | IncompleteReadError | FlexibleChecksumError)
                if pause is None or not broken:
                    raise StorageError(f"{self}: {error}") from error
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _head(self) -> Any:
        try:
            return self._call("head_object", Key=self.key) if self.key else None
        except FileNotFoundError:
            return None

    def _list(self, beginning: str = "", **arguments: Any) -> Any:
        prefix = f"{self.key}/" if self.key else ""
        return self._call("list_objects_v2", Prefix=prefix + beginning, **arguments)

    def _pages(self, beginning: str = "", **arguments: Any) -> Iterator[Any]:
        page = self._list(beginning, **arguments)
        yield page
        while page.get("IsTruncated"):
            page = self._list(beginning, ContinuationToken=page["NextContinuationToken"], **arguments)
            yield page

    def _objects(self, beginning: str = "", **arguments: Any) -> Iterator[S3Path]:
        for page in self._pages(beginning, **arguments):
            for entry in page.get("Contents", []):
                if not entry["Key"].endswith("/"):
                    yield S3Path(self.bucket, entry["Key"], (entry["Size"], entry["LastModified"].timestamp()))


RunPath = Path | S3Path


def run_path(place: str | Path | S3Path) -> RunPath:
    """The path that a text names: `s3://bucket/prefix`, else a local one.

    Raises:
        StorageError: for a URI of another scheme, or one with credentials.
    """
    if not isinstance(place, str) or "://" not in place:
        return place if isinstance(place, S3Path) else Path(place)
    scheme, _, rest = place.partition("://")
    if scheme == "file":
        return Path(rest)
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise StorageError(f"{place}: runs lie in local folders or s3://bucket/prefix")
    if "@" in bucket:
        raise StorageError("the s3:// URI carries credentials; put them into the environment or a profile instead")
    return S3Path(bucket, key.strip("/"))


def parquet(file: RunPath, **options: Any) -> pq.ParquetFile:
    """Open a Parquet file; of one in S3 only the ranges that are asked for are fetched.

    Raises:
        FileNotFoundError, TornPartError: where it is not there, or not whole.
        StorageError: where S3 does not answer.
    """
    try:
        return _parquet(file, options)
    except StorageError as error:
        if not any(code in str(error) for code in _EXPIRED):
            raise
        s3_client.forget_credentials()
        return _parquet(file, options)


def _parquet(file: RunPath, options: dict[str, Any]) -> pq.ParquetFile:
    try:
        if isinstance(file, Path):
            return pq.ParquetFile(file, **options)
        return pq.ParquetFile(
            f"{file.bucket}/{file.key}", filesystem=s3_client.arrow(os.getpid(), file.bucket), **options
        )
    except pa.ArrowInvalid as error:
        raise TornPartError(file, error) from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error}") from error


def folders(place: RunPath) -> list[str]:
    """Names of the folders right below a folder, sorted; none where it does not exist."""
    if isinstance(place, S3Path):
        return sorted(place.folders())
    return sorted(entry.name for entry in place.iterdir() if entry.is_dir()) if place.is_dir() else []


def make_folder(place: RunPath) -> None:
    """Make a folder and those above it; prefixes need no making."""
    if isinstance(place, Path):
        place.mkdir(parents=True, exist_ok=True)


def remove_folder(place: RunPath) -> None:
    """Remove a folder with all that is in it, if it is there."""
    if isinstance(place, Path):
        shutil.rmtree(place, ignore_errors=True)
        return
    doomed = [{"Key": path.key} for path in place.rglob("*")]
    for start in range(0, len(doomed), 1000):
        answer = place._call("delete_objects", Delete={"Objects": doomed[start : start + 1000], "Quiet": True})
        if errors := answer.get("Errors"):
            raise StorageError(f"cannot remove s3://{place.bucket}/{errors[0]['Key']}: {errors[0].get('Message')}")


def copy_file(source: RunPath, target: RunPath) -> None:
    """Copy a file: a hard link on disk where the file system has them, inside the store in S3, else byte by byte."""
    if isinstance(source, S3Path) and isinstance(target, S3Path):
        source.copy_to(target)
    elif isinstance(source, Path) and isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)
    elif isinstance(source, Path) and isinstance(target, S3Path):
        target.upload(source)
    elif isinstance(source, S3Path) and isinstance(target, Path):
        source.download(target)


def _stat(size: int, modified: float) -> Any:
    return SimpleNamespace(st_size=size, st_mtime=modified)


def _code(error: BaseException | None) -> str:
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))
