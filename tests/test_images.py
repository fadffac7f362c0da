"""Pictures are decoded upright and safely, or refused by a named kind."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ipvg_ray.media import images


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


GRADIENT = np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))


def test_exif_orientation_is_undone() -> None:
    picture = Image.fromarray(np.dstack([GRADIENT] * 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(picture.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=100)
    assert np.abs(images.decode(turned).astype(int) - np.asarray(picture)).max() <= 3


def test_alpha_is_laid_on_white() -> None:
    rgba = Image.fromarray(np.zeros((8, 8, 4), np.uint8))
    assert (images.decode(encoded(rgba)) == 255).all()


@pytest.mark.parametrize(
    ("mode", "values", "white"),
    [
        ("I;16", GRADIENT.astype(np.uint16) * 257, 252),
        ("F", GRADIENT / np.float32(255), 252),
        ("F", GRADIENT.astype(np.float32), 252),
    ],
)
def test_deep_pictures_are_scaled_not_clipped(mode: str, values: np.ndarray, white: int) -> None:
    kind = "PNG" if mode == "I;16" else "TIFF"
    found = images.decode(encoded(Image.fromarray(values), kind))
    assert found.max() == white
    assert np.abs(found[..., 0].astype(int) - GRADIENT).max() <= 1


def test_dark_16_bit_pictures_stay_dark() -> None:
    assert images.decode(encoded(Image.fromarray(np.full((8, 8), 200, np.uint16)))).max() <= 1


def test_cmyk_palette_and_animation() -> None:
    assert images.decode(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG")).max() < 40
    red = Image.new("P", (8, 8))
    red.putpalette([255, 0, 0] * 256)
    assert (images.decode(encoded(red)) == [255, 0, 0]).all()
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert images.decode(moving)[0, 0].tolist() == [255, 0, 0], "the first frame"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "broken_image"),
        (b"not a picture", "broken_image"),
        (encoded(Image.fromarray(GRADIENT))[:60], "broken_image"),
        (encoded(Image.new("L", (400, 300))), "image_too_large"),
    ],
)
def test_what_cannot_be_used_is_named(data: bytes, kind: str) -> None:
    with pytest.raises(images.ImageError) as caught:
        images.decode(data, max_pixels=100_000)
    assert caught.value.kind == kind
    assert "0x" not in str(caught.value)


def test_bombs_are_refused_before_they_are_decoded() -> None:
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    with pytest.raises(images.ImageError) as caught:
        images.decode(bomb)
    assert caught.value.kind == "image_too_large"


def test_no_picture_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands EPS to Ghostscript; a picture set must not be able to."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    with pytest.raises(images.ImageError):
        images.decode(eps)
    assert not (tmp_path / "started").exists()


def test_changed_and_missing_files(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(GRADIENT))
    path = tmp_path / "a.png"
    path.write_bytes(data)
    picture = {"bytes": None, "path": str(path)}
    assert images.image_bytes(picture, hashlib.sha256(data).hexdigest()) == data
    path.write_bytes(data + b" ")
    with pytest.raises(images.ImageError, match="not the file it was") as caught:
        images.image_bytes(picture, hashlib.sha256(data).hexdigest())
    assert caught.value.kind == "image_changed"
    path.unlink()
    with pytest.raises(images.ImageError) as caught:
        images.image_bytes(picture)
    assert caught.value.kind == "missing_image"
