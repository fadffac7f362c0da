"""The frames each metric takes, against lists worked out from the published rules."""

from __future__ import annotations

import numpy as np
import pytest

from ipvg_ray.metrics import frames

FPS = (16, 24, 25)


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


ENDS_16 = {
    17: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16],
    49: [0, 3, 6, 9, 12, 16, 19, 22, 25, 28, 32, 35, 38, 41, 44, 48],
    81: [0, 5, 10, 16, 21, 26, 32, 37, 42, 48, 53, 58, 64, 69, 74, 80],
    121: [0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120],
}
STARTS_16 = {
    17: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    49: [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45],
    81: [0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75],
    121: [0, 7, 15, 22, 30, 37, 45, 52, 60, 68, 75, 83, 90, 98, 105, 113],
}
AT_MOST_32 = {
    17: list(range(17)),
    49: numbers("0 1 3 4 6 7 9 10 12 13 15 17 18 20 21 23 24 26 27 29 30 32 34 35 37 38 40 41 43 44 46 48"),
    81: numbers("0 2 5 7 10 12 15 18 20 23 25 28 30 33 36 38 41 43 46 49 51 54 56 59 61 64 67 69 72 74 77 80"),
    121: numbers("0 3 7 11 15 19 23 27 30 34 38 42 46 50 54 58 61 65 69 73 77 81 85 89 92 96 100 104 108 112 116 120"),
}
MIDDLES_8 = {
    17: [0, 2, 4, 6, 8, 10, 12, 15],
    49: [2, 8, 14, 20, 26, 32, 38, 45],
    81: [4, 14, 24, 34, 44, 54, 64, 75],
    121: [7, 22, 37, 52, 67, 82, 97, 112],
}
STEPS = {16: 2, 24: 3, 25: 3}


@pytest.mark.parametrize("fps", FPS)
@pytest.mark.parametrize("count", [17, 49, 81, 121])
def test_the_rules(count, fps):
    assert frames.ends(16)(count, fps) == ENDS_16[count]
    assert frames.starts(16)(count, fps) == STARTS_16[count]
    assert frames.at_most(16)(count, fps) == ENDS_16[count]
    assert frames.at_most(32)(count, fps) == AT_MOST_32[count]
    assert frames.middles(8)(count, fps) == MIDDLES_8[count]
    assert frames.all_frames(count, fps) == [*range(count)]
    assert frames.eight_a_second(count, fps) == [i for i in range(count) if i % STEPS[fps] == 0]


def test_eight_a_second_of_the_worked_case():
    assert len(frames.eight_a_second(81, 16)) == 41


@pytest.mark.parametrize(("fps", "step"), [(3.9, 1), (8, 1), (12, 2), (20, 2), (23.976, 3), (30, 4), (60, 8)])
def test_eight_a_second_rounds_to_even(fps, step):
    assert frames.eight_a_second(20, fps) == list(range(0, 20, step))


def test_short_videos():
    assert frames.middles(8)(3, 16) == [0, 1, 2, 2, 2, 2, 2, 2]
    assert frames.ends(16)(1, 16) == [0] * 16
    assert frames.starts(16)(2, 16) == [0] * 8 + [1] * 8
    assert frames.at_most(16)(16, 16) == [*range(16)]


def test_a_clip_gives_the_frames_of_a_rule():
    clip = frames.Clip(np.arange(5, dtype=np.uint8).repeat(12).reshape(5, 2, 2, 3), 8)
    assert clip.take(frames.ends(3))[:, 0, 0, 0].tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("shape", "fps", "message"), [((0, 2, 2, 3), 8, "N ≥ 1"), ((2, 2, 2), 8, "uint8"), ((1, 2, 2, 3), 0, "above 0")]
)
def test_bad_clips(shape, fps, message):
    with pytest.raises(ValueError, match=message):
        frames.Clip(np.zeros(shape, np.uint8), fps)
