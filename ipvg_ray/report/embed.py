"""Pictures and videos for the page: small copies packed into it as data: URIs while there is room, else links.

Every picture is decoded and encoded anew, so that nothing of the original file but its pixels reaches the page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from PIL import Image

from ipvg_ray.media import images
from ipvg_ray.report import facts
from ipvg_ray.storage import RunPath, S3Path


class Budget:
    """Bytes of data: URIs that may still go into the page; and for how many seconds links into S3 are to be signed.

    Where `links_s` is 0, links are relative to the run, and whoever opens the page needs access of their own.
    """

    def __init__(self, size: int, links_s: int = 0) -> None:
        self.left = size
        self.links_s = links_s

    def allows(self, size: int) -> bool:
        """Whether `size` bytes still fit once they are written as base64."""
        return _encoded(size) <= self.left

    def data_uri(self, kind: str, data: bytes) -> str:
        """Take the room and make the URI; ask `allows` first."""
        self.left -= _encoded(len(data))
        return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _encoded(size: int) -> int:
    return (size + 2) // 3 * 4


@dataclass(frozen=True)
class Picture:
    """A picture of the page: `src` is its data: URI, or None, and then `note` says why. Size in pixels, as embedded."""

    src: str | None
    note: str = ""
    width: int = 0
    height: int = 0


def picture(
    cell: Mapping[str, Any] | None, side: int, budget: Budget, *, sha256: str | None = None, grey: bool = False
) -> Picture:
    """A small copy of a table's picture.

    Args:
        cell: `{"bytes", "path"}`, or None where the table has no such row.
        side: longest side of the copy, pixels.
        sha256: hash that the picture must have, since a file may have changed after the run read it.
        grey: embed as 8-bit grey PNG instead of RGB JPEG.
    """
    if not cell:
        return Picture(None, "not made yet")
    try:
        image = Image.fromarray(images.decode(images.image_bytes(cell, sha256)))
    except images.ImageError as error:
        return Picture(None, facts.clean(str(error)))
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    buffer = io.BytesIO()
    if grey:
        image.convert("L").save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=85, optimize=True)
    data = buffer.getvalue()
    if not budget.allows(len(data)):
        return Picture(None, "left out: the page has reached report.embed_mb")
    return Picture(budget.data_uri("image/png" if grey else "image/jpeg", data), "", *image.size)


@dataclass(frozen=True)
class Clip:
    """A video of the page: `src` is a data: URI or `link`, the file relative to the run; None where `note` says why."""

    src: str | None
    link: str | None
    note: str = ""


def clip(run_dir: RunPath, uri: str | None, budget: Budget) -> Clip:
    """A video of the run, packed into the page where it fits.

    Args:
        uri: its path relative to the run, as the video table holds it.
    """
    if not uri:
        return Clip(None, None, "not made yet")
    link = _relative_link(uri)
    if link is None:
        return Clip(None, None, f"the video's path {uri!r} does not lie in the run")
    if budget.links_s and isinstance(run_dir, S3Path):
        link = (run_dir / uri).link(budget.links_s)
    try:
        size = (run_dir / uri).stat().st_size
        if not size:
            return Clip(None, link, "the video file is empty")
        if not budget.allows(size):
            return Clip(link, link)
        return Clip(budget.data_uri("video/mp4", (run_dir / uri).read_bytes()), link)
    except OSError as error:
        return Clip(None, link, f"cannot read {uri}: {error.strerror}")


def _relative_link(uri: str) -> str | None:
    """The URI as a link that cannot lead out of the run's folder, or None where it does."""
    path = PurePosixPath(uri)
    if path.is_absolute() or ".." in path.parts or "\0" in uri or "://" in uri:
        return None
    return "./" + quote(str(path), safe="/")
