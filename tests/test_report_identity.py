"""The report's part on one identity: landmarks, gates, further reference pictures."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from test_report import FakeRun, Page, colour_picture

from ipvg_ray.media import images


@pytest.fixture
def fake(tmp_path: Path) -> FakeRun:
    fake = FakeRun(tmp_path / "run")
    fake.sample("eve", "p", upto="samples")
    fake.run_json()
    return fake


def test_landmarks_are_drawn_as_shares_of_the_picture(fake: FakeRun) -> None:
    fake.identity("eve")  # 64 by 48 pixels
    points = [16.0, 12.0, 32.0, 24.0, -5.0, 24.0] + [32.0, 24.0] * 103
    fake.people("eve", landmarks_106=points, landmarks_5=[48.0, 36.0] * 5)
    paths = {a["class"]: a["d"] for a in Page(fake.page()).all("path")}
    assert paths["points"].startswith("M0.25 0.25h0M0.5 0.5h0M0.5 0.5h0"), "the one beyond the edge is left out"
    assert paths["points"].count("M") == 105
    assert paths["keypoints"] == "M0.75 0.75h0" * 5


def test_landmarks_of_a_small_face_would_hide_it(fake: FakeRun) -> None:
    fake.identity("eve")
    fake.people("eve", landmarks_106=[16.0] * 212, landmarks_5=[16.0] * 10, face_box=[16, 12, 26, 22])
    assert "<path" not in fake.page()


def test_gates_say_what_passed_and_what_did_not(fake: FakeRun) -> None:
    fake.identity("eve")
    fake.people("eve", flaws=["blurred"], sharpness=0.002, yaw=12.4, pitch=-3.6)
    page = fake.page()
    assert '<span class="badge badge-ok">not too small</span>' in page
    assert '<span class="badge badge-fallback">blurred</span>' in page
    assert '<span class="badge badge-ok">not turned away</span>' in page
    assert "odd one out" not in page, "there is one picture"
    assert "yaw 12°, pitch -4°" in page
    assert "sharpness 0.002" in page


def test_further_references_are_shown_with_what_became_of_them(fake: FakeRun) -> None:
    cells = [images.encode(colour_picture(name)) for name in ("one", "two", "three", "four")]
    hashes = [hashlib.sha256(cell["bytes"]).hexdigest() for cell in cells]
    fake.identity("eve", more_images=cells, more_images_sha256=hashes)
    fake.people(
        "eve",
        embeddings=[[0] * 512] * 4,
        reference_numbers=[0, 1, 3, 4],
        reference_used=[True, True, False, False],
        odd_references=[3],
        reference_notes=["reference 2: no_face: no <b>face</b>"],
        reference_spread=0.41,
        flaws=["odd_one_out"],
    )
    html = fake.page()
    page = Page(html)
    labels = [a["alt"] for a in page.all("img") if (a.get("alt") or "").startswith("Reference ")]
    assert labels == [
        "Reference picture of eve",
        "Reference 1, of eve",
        "Reference 2, unused, of eve",
        "Reference 3, odd, of eve",
        "Reference 4, unused, of eve",
    ]
    assert html.count('<figure class="odd">') == 1
    assert "reference 2: no_face: no &lt;b&gt;face&lt;/b&gt;" in html
    assert "4 references, spread 0.41" in html
    assert '<span class="badge badge-fallback">odd one out</span>' in html


def test_many_references_are_bounded(fake: FakeRun) -> None:
    cell = images.encode(np.zeros((8, 8, 3), np.uint8))
    digest = hashlib.sha256(cell["bytes"]).hexdigest()
    fake.identity("eve", more_images=[cell] * 11, more_images_sha256=[digest] * 11)
    assert "3 more not shown" in fake.page()


def test_an_identity_without_faces_yet_has_no_gates(fake: FakeRun) -> None:
    fake.identity("eve")
    page = fake.page()
    assert 'class="gates"' not in page
    assert "<path" not in page
