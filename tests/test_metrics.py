"""Arc-Sim against an analyser whose faces are known, and the motion figure."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from known_faces import KnownFaces

from ipvg_ray.metrics.arc_sim import ArcSim, arc_sim
from ipvg_ray.metrics.motion import motion


@dataclass
class Face:
    box: np.ndarray
    embedding: np.ndarray | None


def face(cosine: float, side: float = 10, length: float = 1.0) -> Face:
    """A face at the given cosine from `REFERENCE`."""
    return Face(np.array([0, 0, side, side]), length * np.array([cosine, np.sqrt(1 - cosine**2), 0.0]))


REFERENCE = np.array([5.0, 0.0, 0.0])


class Analyser(KnownFaces):
    """Knows what each frame shows by the value of its middle pixel, and writes down what it was asked."""

    def __init__(self, shows: dict[int, list[Face]], bordered: dict[int, list[Face]] | None = None) -> None:
        self.shows, self.bordered = shows, bordered or {}
        self.seen: list[np.ndarray] = []

    def faces(self, rgb: np.ndarray) -> list[Face]:
        self.seen.append(rgb)
        number = int(rgb[rgb.shape[0] // 2, rgb.shape[1] // 2, 0])
        return (self.shows if rgb.shape[0] == 40 else self.bordered).get(number, [])

    def numbers(self) -> list[int]:
        return [int(rgb[rgb.shape[0] // 2, rgb.shape[1] // 2, 0]) for rgb in self.seen]


def video(length: int) -> np.ndarray:
    """Frame i is filled with the value i; 40 high, 60 wide."""
    return np.broadcast_to(np.arange(length, dtype=np.uint8)[:, None, None, None], (length, 40, 60, 3))


class TestArcSim:
    def test_frames_are_spread_from_first_to_last(self):
        analyser = Analyser({number: [face(0.5)] for number in range(81)})
        assert arc_sim(video(81), REFERENCE, analyser) == ArcSim(pytest.approx(0.5), 16)
        assert analyser.numbers() == [0, 5, 10, 16, 21, 26, 32, 37, 42, 48, 53, 58, 64, 69, 74, 80]  # int(i · 80 / 15)

    def test_short_video(self):
        analyser = Analyser({0: [face(0.2)], 1: [face(0.8)]})
        result = arc_sim(video(2), REFERENCE, analyser)
        assert analyser.numbers() == [0] * 15 + [1]  # linspace's whole numbers are cut, not rounded
        assert result == ArcSim(pytest.approx((15 * 0.2 + 0.8) / 16), 16)

    def test_lengths_of_embeddings_do_not_matter(self):
        frames, shown = video(1), {0: [face(0.6, length=23.0)]}
        results = [arc_sim(frames, scale * REFERENCE, Analyser(shown)).score for scale in (1, 0.01, 100)]
        assert results == pytest.approx([0.6] * 3)

    def test_largest_face_counts(self):
        wide = Face(np.array([50.0, 50.0, 90.0, 60.0]), face(0.9).embedding)  # 400 square pixels
        analyser = Analyser({0: [face(0.1, side=15), wide, face(0.2, side=19)]})
        assert arc_sim(video(1), REFERENCE, analyser).score == pytest.approx(0.9)

    def test_negative_cosine_is_a_zero_that_counts(self):
        analyser = Analyser({0: [face(-0.8)], 1: [face(0.6)]})
        assert arc_sim(video(2), REFERENCE, analyser, samples=2) == ArcSim(pytest.approx(0.3), 2)

    def test_again_with_a_grey_border(self):
        analyser = Analyser({0: [face(0.4)]}, bordered={1: [face(0.8)]})
        assert arc_sim(video(2), REFERENCE, analyser, samples=2) == ArcSim(pytest.approx(0.6), 2)
        assert [rgb.shape for rgb in analyser.seen] == [(40, 60, 3), (40, 60, 3), (60, 90, 3)]
        bordered = analyser.seen[2].copy()
        assert (bordered[10:50, 15:75] == 1).all()
        bordered[10:50, 15:75] = 128
        assert (bordered == 128).all()
        assert bordered.dtype == np.uint8

    def test_frames_without_a_face_are_left_out(self):
        analyser = Analyser({3: [face(0.7)]})
        assert arc_sim(video(4), REFERENCE, analyser, samples=4) == ArcSim(pytest.approx(0.7), 1)

    def test_no_frame_usable(self):
        assert arc_sim(video(4), REFERENCE, Analyser({})) == ArcSim(0.0, 0)

    @pytest.mark.parametrize("reference", [np.zeros(3), np.array([1, np.nan, 0]), np.array([np.inf, 0, 0])])
    def test_bad_reference(self, reference):
        with pytest.raises(ValueError, match="the reference's embedding is zero"):
            arc_sim(video(1), reference, Analyser({0: [face(0.5)]}))

    @pytest.mark.parametrize(
        ("embedding", "message"),
        [(np.full(3, np.nan), "frame 0's embedding"), (np.ones(5), "one recognition model"), (None, "shape")],
    )
    def test_bad_embedding_of_a_frame(self, embedding, message):
        with pytest.raises(ValueError, match=message):
            arc_sim(video(1), REFERENCE, Analyser({0: [Face(np.array([0, 0, 1, 1]), embedding)]}))

    def test_empty_video(self):
        with pytest.raises(ValueError, match="N ≥ 1"):
            arc_sim(video(0), REFERENCE, Analyser({}))


class TestMotion:
    def test_still(self):
        frames = np.random.default_rng(0).integers(0, 256, (1, 8, 12, 3), np.uint8).repeat(5, axis=0)
        assert motion(frames) == 0

    def test_known_steps(self):
        frames = np.zeros((3, 4, 4, 3), np.uint8)
        frames[1] = 51  # up by 0.2
        frames[2, :2] = 51  # half of the pixels back down by 0.2; unsigned arithmetic would call it 205 / 255
        assert motion(frames) == pytest.approx((0.2 + 0.1) / 2)

    def test_the_most_there_is(self):
        frames = np.zeros((6, 4, 4, 3), np.uint8)
        frames[1::2] = 255
        assert motion(frames) == 1

    def test_one_frame(self):
        assert motion(np.ones((1, 4, 4, 3), np.uint8)) == 0

    @pytest.mark.parametrize(
        "bad", [np.ones((2, 4, 4, 3)), np.ones((4, 4, 3), np.uint8), np.ones((0, 4, 4, 3), np.uint8)]
    )
    def test_bad_frames(self, bad):
        with pytest.raises(ValueError, match="uint8"):
            motion(bad)


def test_the_metrics_import_no_models():
    code = (
        "import sys, ipvg_ray.metrics.arc_sim, ipvg_ray.metrics.motion;"
        "print({'torch', 'ray', 'insightface'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
