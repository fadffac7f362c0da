"""Broken and strange pictures, made here: name, encoded bytes, and what must become of each.

All that can be right show four quarters: red, green above blue, yellow. An outcome is the tolerance per channel of a
right result, or the kind of the failure.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, TiffImagePlugin

RED, GREEN, BLUE, YELLOW = (220, 30, 30), (20, 180, 40), (30, 40, 200), (230, 220, 40)
WIDTH, HEIGHT = 96, 64
EXACT, LOSSY, COARSE = 0, 12, 40


class Case(NamedTuple):
    """A picture and its outcome."""

    name: str
    data: bytes
    outcome: int | str


def quarters(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """uint8 (height, width, 3)."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2], picture[: height // 2, width // 2 :] = RED, GREEN
    picture[height // 2 :, : width // 2], picture[height // 2 :, width // 2 :] = BLUE, YELLOW
    return picture


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def cases() -> Iterator[Case]:
    """All of them."""
    for group in (_turned, _transparent, _deep, _colour_spaces, _moving, _containers, _broken, _foreign, _bombs):
        yield from group()


def _plain() -> Image.Image:
    return Image.fromarray(quarters())


# Each EXIF orientation's way from the upright picture to the one that is stored.
_STORED: dict[int, Callable[[Image.Image], Image.Image]] = {
    1: lambda i: i,
    2: lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda i: i.transpose(Image.Transpose.ROTATE_180),
    4: lambda i: i.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda i: i.transpose(Image.Transpose.TRANSPOSE),
    6: lambda i: i.transpose(Image.Transpose.ROTATE_90),
    7: lambda i: i.transpose(Image.Transpose.TRANSVERSE),
    8: lambda i: i.transpose(Image.Transpose.ROTATE_270),
}


def _turned() -> Iterator[Case]:
    for orientation, stored in _STORED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield Case(f"exif-{orientation}.jpg", encoded(stored(_plain()), "JPEG", exif=exif, quality=95), LOSSY)
    for kind, outcome in (("PNG", EXACT), ("WEBP", EXACT), ("TIFF", EXACT), ("AVIF", COARSE)):
        exif = Image.Exif()
        exif[0x0112] = 8
        options = {"lossless": True} if kind == "WEBP" else {}
        yield Case(f"exif-8.{kind.lower()}", encoded(_STORED[8](_plain()), kind, exif=exif, **options), outcome)
    exif = Image.Exif()
    exif[0x0112] = 9
    yield Case("exif-9.jpg", encoded(_plain(), "JPEG", exif=exif, quality=95), LOSSY)
    jpeg = encoded(_plain(), "JPEG", quality=95)
    rubbish = b"Exif\0\0" + bytes(range(256))
    segment = b"\xff\xe1" + struct.pack(">H", len(rubbish) + 2) + rubbish
    yield Case("exif-rubbish.jpg", jpeg[:2] + segment + jpeg[2:], LOSSY)
    png = encoded(_plain())
    yield Case("exif-rubbish.png", _png_with(png, b"eXIf", b"II*\0\xff\xff\xff\x7f"), EXACT)


def _transparent() -> Iterator[Case]:
    opaque = np.dstack([quarters(), np.full((HEIGHT, WIDTH), 255, np.uint8)])
    yield Case("opaque.png", encoded(Image.fromarray(opaque)), EXACT)
    # What is left out of the quarters is drawn by the white that alpha is laid on: a fifth of yellow's way to white.
    thin = opaque.copy()
    thin[..., 3] = 204
    yield Case("thin.png", encoded(Image.fromarray(thin)), 48)
    yield Case("thin.webp", encoded(Image.fromarray(thin), "WEBP", lossless=True), 48)
    palette = _plain().quantize(8)
    palette.info["transparency"] = 7
    yield Case("palette-transparent.png", encoded(palette, transparency=7), EXACT)
    yield Case("key-colour.png", encoded(_plain(), transparency=(1, 2, 3)), EXACT)


def _deep() -> Iterator[Case]:
    yield Case("rgb-16-bit.png", _png(16, 2, quarters().astype(">u2") * 257), EXACT)
    rgba = np.dstack([quarters(), np.full((HEIGHT, WIDTH), 255, np.uint8)]).astype(">u2") * 257
    yield Case("rgba-16-bit.png", _png(16, 6, rgba), EXACT)
    deep = b"P6 96 64 65535\n" + (quarters().astype(">u2") * 257).tobytes()
    yield Case("rgb-16-bit.ppm", deep, EXACT)
    yield Case("rgb-16-bit.tif", _deep_tiff(), EXACT)


def _colour_spaces() -> Iterator[Case]:
    yield Case("palette.png", encoded(_plain().quantize(8)), EXACT)
    yield Case("palette.gif", encoded(_plain().quantize(8), "GIF"), EXACT)
    yield Case("palette.bmp", encoded(_plain().quantize(8), "BMP"), EXACT)
    yield Case("cmyk.jpg", encoded(_plain().convert("CMYK"), "JPEG", quality=95), LOSSY)
    yield Case("cmyk.tif", encoded(_plain().convert("CMYK"), "TIFF"), EXACT)
    yield Case("ycbcr.tif", encoded(_plain().convert("YCbCr"), "TIFF"), LOSSY)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield Case("profile.jpg", encoded(_plain(), "JPEG", quality=95, icc_profile=profile), LOSSY)
    swapped = Image.fromarray(np.ascontiguousarray(quarters()[..., ::-1]))
    yield Case("profile-of-swapped-colours.png", encoded(swapped, icc_profile=_swapped(profile)), LOSSY)
    alpha = Image.fromarray(np.dstack([quarters()[..., ::-1], np.full((HEIGHT, WIDTH), 255, np.uint8)]))
    yield Case("profile-and-alpha.png", encoded(alpha, icc_profile=_swapped(profile)), LOSSY)
    yield Case("profile-rubbish.png", encoded(_plain(), icc_profile=b"no profile"), EXACT)
    srgb, cielab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = encoded(ImageCms.profileToProfile(_plain(), srgb, cielab, outputMode="LAB"), "TIFF")
    yield Case("lab.tif", lab, LOSSY)


def _swapped(srgb: bytes) -> bytes:
    """A profile whose red is sRGB's blue and the other way round, under a name of its own."""
    place = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}
    profile = bytearray(srgb.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be")).replace(b"sRGB", b"test"))
    for tag in range(128 + 4, 128 + 4 + 12 * struct.unpack_from(">I", profile, 128)[0], 12):
        name = bytes(profile[tag : tag + 4])
        profile[tag : tag + 4] = place.get(name, name)
    return bytes(profile)


def _moving() -> Iterator[Case]:
    others = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("black", "white")]
    for kind, outcome in (("WEBP", EXACT), ("GIF", EXACT), ("PNG", EXACT), ("TIFF", EXACT), ("AVIF", COARSE)):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(_plain(), kind, save_all=True, append_images=others, **options)
        yield Case(f"moving.{kind.lower()}", data, outcome)
    yield Case("two-pictures.mpo", encoded(_plain(), "MPO", save_all=True, append_images=others, quality=95), LOSSY)
    moving = encoded(_plain(), "WEBP", save_all=True, append_images=others, lossless=True)
    yield Case("moving-cut.webp", moving[: len(moving) // 3], "broken_image")


def _containers() -> Iterator[Case]:
    png, jpeg = encoded(_plain()), encoded(_plain(), "JPEG", quality=95)
    yield Case("a-png-called.jpg", png, EXACT)
    yield Case("a-jpeg-called.png", jpeg, LOSSY)
    yield Case("progressive.jpg", encoded(_plain(), "JPEG", quality=95, progressive=True), LOSSY)
    yield Case("with-a-tail.png", png + b"rubbish" * 100, EXACT)
    yield Case("with-a-tail.jpg", jpeg + png, LOSSY)
    for compression in ("tiff_lzw", "tiff_deflate", "packbits"):
        yield Case(f"{compression}.tif", encoded(_plain(), "TIFF", compression=compression), EXACT)
    tall = TiffImagePlugin.ImageFileDirectory_v2()
    tall[278] = 1  # a strip per row
    yield Case("strips.tif", encoded(_plain(), "TIFF", compression="tiff_lzw", tiffinfo=tall), EXACT)
    yield Case("top-down.bmp", _top_down_bmp(), EXACT)


def _broken() -> Iterator[Case]:
    png, jpeg = encoded(_plain()), encoded(_plain(), "JPEG", quality=95)
    yield Case("empty.png", b"", "broken_image")
    yield Case("signature-only.png", png[:8], "broken_image")
    yield Case("cut.png", png[: len(png) * 2 // 3], "broken_image")
    yield Case("cut.jpg", jpeg[: len(jpeg) // 2], "broken_image")
    yield Case("no-pixels.png", _png(8, 2, np.zeros((0, 0, 3), np.uint8)), "broken_image")
    for kind in ("WEBP", "GIF", "TIFF", "BMP", "AVIF"):
        data = encoded(_plain(), kind)
        yield Case(f"cut.{kind.lower()}", data[: len(data) // 3], "broken_image")
    wrong = bytearray(png)
    wrong[len(wrong) // 2] ^= 0xFF
    yield Case("wrong-checksum.png", bytes(wrong), "broken_image")
    yield Case("noise.png", np.random.default_rng(0).bytes(5000), "broken_image")
    nan = np.full((8, 8), np.nan, np.float32)
    yield Case("no-numbers.tif", encoded(Image.fromarray(nan), "TIFF"), "broken_image")


def _foreign() -> Iterator[Case]:
    yield Case("photo.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), "broken_image")
    yield Case("photo.jp2", encoded(_plain(), "JPEG2000"), "broken_image")
    yield Case("photo.jxl", b"\xff\x0a" + bytes(64), "broken_image")
    yield Case("drawing.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "broken_image")
    yield Case("not-found.jpg", b"<!DOCTYPE html><html><title>404</title></html>", "broken_image")
    yield Case("pages.pdf", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + bytes(64), "broken_image")
    yield Case("layers.psd", b"8BPS\0\1" + bytes(64), "broken_image")
    yield Case("icon.ico", encoded(_plain(), "ICO"), "broken_image")


def _bombs() -> Iterator[Case]:
    yield Case("bomb.png", encoded(Image.new("1", (20_000, 20_000))), "image_too_large")
    yield Case("bomb.gif", _gif_of_size(20_000, 20_000), "image_too_large")
    yield Case("bomb.bmp", _bmp_of_size(20_000, 20_000), "image_too_large")
    yield Case("bomb.tif", _tiff_of_size(20_000, 20_000), "image_too_large")
    yield Case("bomb.ppm", b"P6 20000 20000 255\n", "image_too_large")
    yield Case("bomb.jpg", _jpeg_of_size(20_000, 20_000), "image_too_large")
    yield Case("above.png", encoded(Image.new("1", (11_000, 10_000))), "image_too_large")
    text = zlib.compress(bytes(100_000_000))
    yield Case("text-bomb.png", _png_with(encoded(_plain()), b"zTXt", b"Comment\0\0" + text), "broken_image")


# --- files written byte by byte ---------------------------------------------------------------------------------------


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _png(bits: int, colour: int, values: np.ndarray) -> bytes:
    """A PNG of (height, width, channels) big-endian values."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, body) for name, body in chunks)


def _png_with(png: bytes, name: bytes, body: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    return png[:33] + _chunk(name, body) + png[33:]


def _top_down_bmp() -> bytes:
    """A BMP whose height is negative: rows from the top."""
    header = struct.pack("<2sIHHI", b"BM", 54 + WIDTH * HEIGHT * 3, 0, 0, 54)
    info = struct.pack("<IiiHHIIiiII", 40, WIDTH, -HEIGHT, 1, 24, 0, 0, 0, 0, 0, 0)
    return header + info + np.ascontiguousarray(quarters()[..., ::-1]).tobytes()


def _deep_tiff() -> bytes:
    """A TIFF of three 16-bit channels, little-endian."""
    pixels = (quarters().astype("<u2") * 257).tobytes()
    bits = 8 + 2 + 10 * 12 + 4  # where the numbers that do not fit into their tag stand
    tags = [(256, 4, 1, WIDTH), (257, 4, 1, HEIGHT), (258, 3, 3, bits), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 1, bits + 6), (277, 3, 1, 3), (278, 4, 1, HEIGHT), (279, 4, 1, len(pixels)), (284, 3, 1, 1)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + struct.pack("<HHH", 16, 16, 16) + pixels


def _bmp_of_size(width: int, height: int) -> bytes:
    bmp = encoded(Image.new("1", (8, 8)), "BMP")
    return bmp[:18] + struct.pack("<ii", width, height) + bmp[26:]


def _gif_of_size(width: int, height: int) -> bytes:
    gif = encoded(Image.new("P", (8, 8)), "GIF")
    return gif[:6] + struct.pack("<HH", width, height) + gif[10:]


def _tiff_of_size(width: int, height: int) -> bytes:
    data = encoded(_plain(), "TIFF")
    for tag, old, new in ((256, WIDTH, width), (257, HEIGHT, height)):
        data = data.replace(struct.pack("<HHII", tag, 4, 1, old), struct.pack("<HHII", tag, 4, 1, new))
    return data


def _jpeg_of_size(width: int, height: int) -> bytes:
    data = bytearray(encoded(_plain(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)
