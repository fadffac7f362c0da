"""What generated pictures say of themselves, read back by Pillow."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from ipvg_ray.media import images, provenance


@pytest.mark.parametrize("kind", ["png", "jpeg"])
@pytest.mark.parametrize("sample", ["id001/prompt1", "é漢/<a>&'\"\udcff"])
def test_files_say_that_they_are_synthetic_with_run_and_row(kind, sample):
    text = provenance.statement("run-7", {"sample_id": sample}, 42)
    grey = np.full((16, 24, 3), 90, np.uint8)
    marked = images.encode(grey, kind, metadata=provenance.metadata(kind, text))["bytes"]
    assert np.array_equal(images.decode(marked), images.decode(images.encode(grey, kind)["bytes"]))
    with Image.open(io.BytesIO(marked)) as picture:
        picture.load()
        tree = ElementTree.fromstring(picture.info["xmp"])
        plain = picture.text["Description"] if kind == "png" else picture.getexif()[0x010E]
    xmp = " ".join(element.text or "" for element in tree.iter())
    assert provenance.SYNTHETIC in xmp
    for words in ("AI-generated", "synthetic", "run run-7", "seed 42"):
        assert words in xmp
        assert words in plain
    if sample.isascii():
        assert f"row {sample}" in plain
        assert f"row {sample}" in xmp
