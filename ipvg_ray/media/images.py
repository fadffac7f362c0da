"""Encoded pictures: decode them upright and safely, encode them the same everywhere.

A picture in a table is `{"bytes": bytes | None, "path": str | None}` (`ipvg_ray.schema.IMAGE`).
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.fs as pafs
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

# Pillow's warning of pictures it finds large: the bound that counts is ours. Set once, since decoding runs in threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

MAX_PIXELS = 100_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
"""Kinds of pictures that are read. Not EPS: Pillow would start Ghostscript on it; nor the rarely tested decoders."""


class ImageError(ValueError):
    """A picture that cannot be used. `kind` is one of `missing_image`, `broken_image`, `image_too_large`,
    `image_changed`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def read_uri(uri: str) -> bytes:
    """All bytes of a local path or an `s3://`, `gs://` or `file://` URI.

    Raises:
        ImageError: `missing_image`, where nothing can be read there.
    """
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri) if "://" in uri else (pafs.LocalFileSystem(), uri)
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())
    except (OSError, ValueError) as error:
        raise ImageError("missing_image", f"cannot read {uri}: {error}") from error


def image_bytes(picture: Mapping[str, Any], sha256: str | None = None) -> bytes:
    """The encoded bytes of a table's picture, read from its path where it carries none.

    Raises:
        ImageError: `missing_image`; or `image_changed` where the bytes are not those of `sha256`.
    """
    data = picture.get("bytes")
    if data is None:
        if not picture.get("path"):
            raise ImageError("missing_image", "the picture has neither bytes nor a path")
        data = read_uri(str(picture["path"]))
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise ImageError(
            "image_changed",
            f"{picture.get('path')} is not the file it was when the run started; start a new run or --fork",
        )
    return bytes(data)


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode to sRGB, uint8, (height, width, 3): first frame of animations, upright by EXIF, alpha laid on white.

    Raises:
        ImageError: `image_too_large` above `max_pixels` (checked before decoding), else `broken_image`.
    """
    if not data:
        raise ImageError("broken_image", f"{_CANNOT}it is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    "image_too_large", f"{width}×{height} is above {max_pixels} pixels; shrink the picture"
                )
            image.load()
            return np.asarray(_to_rgb(_in_srgb(_upright(image)), image.format))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own bound, which it checks before we can read the size
        raise ImageError("image_too_large", f"more pixels than {max_pixels}; shrink the picture") from error
    except UnidentifiedImageError as error:
        raise ImageError("broken_image", f"{_CANNOT}{_instead(data)}") from error
    except Exception as error:  # Pillow raises many kinds, SyntaxError and struct.error among them
        raise ImageError("broken_image", f"{_CANNOT}{error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)  # the same picture where EXIF says nothing
    except Exception:  # EXIF that cannot be read says nothing; the picture itself is fine
        return image


def _in_srgb(image: Image.Image) -> Image.Image:
    """The picture with its colours as sRGB has them, where a profile says that they are another's (Display P3, say)."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode) or image
    except (ImageCms.PyCMSError, OSError, ValueError):  # a profile that cannot be read says nothing
        return image


_CANNOT = "cannot decode the picture: "

_SIGNATURES = (
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 picture"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 picture"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL picture"),
    (b"\xff\x0a", "a JPEG XL picture"),
    (b"8BPS", "a Photoshop file"),
    (b"%PDF", "a PDF file"),
    (b"%!PS", "a PostScript file"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML file, perhaps an SVG drawing"),
    (b"<!doctype html", "a web page; the download went wrong"),
    (b"<html", "a web page; the download went wrong"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"PK\x03\x04", "a zip archive"),
)


def _instead(data: bytes) -> str:
    """What data is that is no picture of a kind that is read."""
    known = ", ".join(FORMATS)
    start = data[:64].lstrip().lower()
    found = next((name for signature, name in _SIGNATURES if start.startswith(signature.lower())), None)
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1"):
        found = "a HEIC picture"
    return f"it is {found}; save it as one of {known}" if found else f"it is none of {known}"


def _to_rgb(image: Image.Image, kind: str | None) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16-bit grey and friends: Pillow's own conversion clips instead of scaling
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ImageError("broken_image", "the picture holds values that are no numbers")
        white = _white(image.mode, values.max(), kind)
        image = Image.fromarray((np.clip(values / white, 0, 1) * 255).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, rgba)
    return image.convert("RGB")


def _white(mode: str, brightest: float, kind: str | None) -> float:
    """The value that stands for white: 16-bit modes and PPM say it; other 32-bit ones are told by what they hold."""
    if mode.startswith("I;16") or (mode == "I" and kind == "PPM") or brightest > 255:
        return 65535.0
    return 1.0 if mode == "F" and brightest <= 1 else 255.0


def shrunk(array: np.ndarray, side: int) -> np.ndarray:
    """A uint8 picture whose longer side is at most `side` pixels; one that already is comes back as it is."""
    height, width = array.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return array
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.LANCZOS))


def resized(array: np.ndarray, width: int, height: int) -> np.ndarray:
    """A uint8 picture at another size, its shape not kept."""
    return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.LANCZOS))


def grey(rgb: np.ndarray) -> np.ndarray:
    """The same picture without colour: uint8 RGB (H, W, 3), all channels the luma of ITU-R BT.601."""
    return np.asarray(Image.fromarray(rgb).convert("L").convert("RGB"))


def encode(
    array: np.ndarray, kind: str = "png", quality: int = 95, metadata: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A table's picture from uint8 (height, width) grey or (height, width, 3) RGB; `kind` is png or jpeg.

    `metadata` are Pillow's arguments for what the file says of itself, such as `ipvg_ray.media.provenance` makes.
    """
    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": quality, "subsampling": 0} if kind == "jpeg" else {"compress_level": 3}
    Image.fromarray(array).save(buffer, format=kind.upper(), **options, **(metadata or {}))
    return {"bytes": buffer.getvalue(), "path": None}
