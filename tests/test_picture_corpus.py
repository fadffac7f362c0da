"""Every broken or strange picture ends as a named failure or a right result."""

from __future__ import annotations

import numpy as np
import pytest
from picture_corpus import BLUE, COARSE, GREEN, RED, YELLOW, Case, cases

from ipvg_ray.media import images

CASES = list(cases())


def test_the_corpus_is_what_it_says() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 30
    assert {case.outcome for case in CASES if isinstance(case.outcome, str)} == {"broken_image", "image_too_large"}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_each_picture_is_right_or_refused_by_name(case: Case) -> None:
    if isinstance(case.outcome, str):
        with pytest.raises(images.ImageError) as caught:
            images.decode(case.data)
        assert caught.value.kind == case.outcome
        assert "0x" not in str(caught.value), "an address in memory helps nobody"
        return
    found = images.decode(case.data)
    assert found.dtype == np.uint8
    height, width, channels = found.shape
    assert (width / height, channels) == (1.5, 3)
    middles = found[[height // 4, height // 4, 3 * height // 4, 3 * height // 4], [width // 4, 3 * width // 4] * 2]
    away = np.abs(middles.astype(int) - [RED, GREEN, BLUE, YELLOW]).max()
    assert away <= max(case.outcome, 1), middles.tolist()
    assert away < COARSE + 9, "no quarter may be taken for another"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("photo.heic", "HEIC"),
        ("photo.jp2", "JPEG 2000"),
        ("photo.jxl", "JPEG XL"),
        ("drawing.svg", "SVG"),
        ("not-found.jpg", "web page"),
        ("pages.pdf", "PDF"),
        ("layers.psd", "Photoshop"),
        ("noise.png", "none of PNG, JPEG"),
        ("empty.png", "empty"),
    ],
)
def test_what_it_is_instead_is_said(name: str, words: str) -> None:
    (case,) = (case for case in CASES if case.name == name)
    with pytest.raises(images.ImageError, match=words):
        images.decode(case.data)
