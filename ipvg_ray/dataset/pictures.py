"""Verify the identities' pictures: read each, decode it for real, measure it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from ipvg_ray.config import DatasetConfig
from ipvg_ray.dataset.places import open_place, ordered_map
from ipvg_ray.dataset.problems import DatasetError
from ipvg_ray.media.images import ImageError, decode


@dataclass(frozen=True)
class Candidate:
    """A picture to verify.

    Attributes:
        uri: absolute path or URI; None where `load` gives the bytes.
        load: reads the encoded bytes that the input carried.
    """

    uri: str | None
    load: Callable[[], bytes] | None = None


@dataclass(frozen=True)
class Picture:
    """A picture that is fit for use; `data` only where the input carried bytes. Width and height are upright pixels."""

    uri: str | None
    data: bytes | None
    sha256: str
    width: int
    height: int


def verify_all(candidates: Iterable[Candidate], config: DatasetConfig, threads: int) -> Iterator[Picture | ImageError]:
    """The outcome of each candidate, in order; at most `4 · threads` pictures are in memory.

    An ImageError's kind is `missing_image`, `broken_image`, `image_too_large` or `image_too_small`.
    """
    with ThreadPoolExecutor(threads) as pool:
        yield from ordered_map(pool, partial(_verify, config=config), candidates, 4 * threads)


def _verify(candidate: Candidate, config: DatasetConfig) -> Picture | ImageError:
    try:
        data = candidate.load() if candidate.load else _read(candidate.uri or "")
        height, width = decode(data, config.max_image_pixels).shape[:2]
        least = config.min_image_side
        if min(width, height) < least:
            reason = f"{width} by {height} pixels, and dataset.min_image_side is {least}; use a larger picture"
            raise ImageError("image_too_small", reason)
    except ImageError as error:
        return _explained(error, candidate.uri or "the picture's bytes", config)
    kept = data if candidate.load else None
    return Picture(candidate.uri, kept, hashlib.sha256(data).hexdigest(), width, height)


def _explained(error: ImageError, name: str, config: DatasetConfig) -> ImageError:
    """The same refusal with the picture's name and the mend."""
    if error.kind == "image_too_large":
        most = config.max_image_pixels
        return ImageError(
            "image_too_large", f"{name} is above {most} pixels; shrink it, or raise dataset.max_image_pixels"
        )
    if error.kind != "broken_image":
        return error
    reason = str(error).removeprefix("cannot decode the picture: ")
    return ImageError("broken_image", f"{name} cannot be decoded ({reason}); replace it")


def _read(uri: str) -> bytes:
    try:
        return open_place(uri).read()
    except (OSError, DatasetError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError("missing_image", f"cannot read {uri}: {reason}; check the path in the input") from error
