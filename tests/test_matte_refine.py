"""From a coarse mask to a matte: error against drawn people's true alpha, one person, holes, foreground colours."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from synthetic_people import BACKGROUNDS, draw

from ipvg_ray.models import matte_refine, matting


def error(mask: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(mask - truth).mean())


class TestQuality:
    @pytest.mark.parametrize("background", BACKGROUNDS)
    @pytest.mark.parametrize(("side", "blur"), [(384, 4.0), (384, 7.0), (768, 9.0)])
    def test_half_of_the_coarse_error_at_most(self, background, side, blur):
        for seed in range(2):
            person = draw(seed, background, side)
            coarse = person.coarse(blur)
            matte = matte_refine.refine(person.rgb, coarse, person.face_box)
            assert error(matte, person.alpha) <= 0.5 * error(coarse, person.alpha)

    def test_hair_alone(self):
        """The same where no more than strands are: outside the body, around the head."""
        for seed in range(4):
            person = draw(seed, "leaves", 512)
            coarse = person.coarse(5.0)
            matte = matte_refine.refine(person.rgb, coarse, person.face_box)
            body = cv2.morphologyEx(person.alpha, cv2.MORPH_OPEN, np.ones((9, 9), np.uint8)) > 0.5
            rim = ~cv2.dilate(body.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
            rim[int(0.55 * 512) :] = False
            assert person.alpha[rim].sum() > 100
            assert error(matte[rim], person.alpha[rim]) <= 0.5 * error(coarse[rim], person.alpha[rim])

    def test_from_a_networks_own_resolution(self):
        """Alpha shrunk to an eighth and back, as a network's output is."""
        for seed in range(3):
            person = draw(seed, "tiles", 768)
            small = cv2.resize(person.alpha, (96, 96), interpolation=cv2.INTER_AREA)
            coarse = cv2.resize(small, (768, 768), interpolation=cv2.INTER_LINEAR)
            matte = matte_refine.refine(person.rgb, coarse, person.face_box)
            assert error(matte, person.alpha) <= 0.5 * error(coarse, person.alpha)

    def test_larger_than_the_working_size(self):
        """A picture above 1,024 pixels: coefficients from a smaller one, edges of the large one."""
        person = draw(1, "noise", 1536)
        coarse = person.coarse(18.0)
        rough = cv2.resize(coarse, matte_refine.work_size(1536, 1536)[::-1], interpolation=cv2.INTER_AREA)
        matte = matte_refine.refine(person.rgb, rough, person.face_box)
        assert matte.shape == (1536, 1536)
        assert error(matte, person.alpha) <= 0.5 * error(coarse, person.alpha)

    def test_a_certain_mask_is_not_led_astray(self):
        """A patch in the person's colours far from the person, and one in the scene's within: both stay."""
        person = draw(2, "plain")
        rgb = person.rgb.copy()
        rgb[10:40, 10:40] = rgb[350:380, 180:210]
        rgb[300:320, 180:200] = rgb[60, 350]
        matte = matte_refine.refine(rgb, person.coarse(5.0), person.face_box)
        assert matte[10:40, 10:40].max() < 0.01
        assert matte[300:320, 180:200].min() > 0.99

    def test_what_colours_pull_in_is_dropped(self):
        """A blob of the person's colour within the mask's rim, but beside the person."""
        person = draw(4, "plain")
        rgb, coarse = person.rgb.copy(), person.coarse(7.0)
        blob = np.zeros(coarse.shape, bool)
        blob[300:316, 40:56] = True
        assert not (person.alpha[blob] > 0).any()
        rgb[blob] = rgb[360, 190]
        coarse[blob] = 0.55
        matte = matte_refine.refine(rgb, coarse, person.face_box)
        assert matte[blob].max() < 0.5
        assert error(matte, person.alpha) <= 0.5 * error(person.coarse(7.0), person.alpha)

    @pytest.mark.parametrize("shape", [(1, 1), (3, 200), (40, 7)])
    @pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
    def test_strange_shapes(self, shape, value):
        rgb = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
        matte = matte_refine.refine(rgb, np.full(shape, value, np.float32), (0, 0, 1, 1))
        assert matte.shape == shape
        assert matte == pytest.approx(np.full(shape, value), abs=1e-5)


class TestKeepPerson:
    def two_people(self) -> np.ndarray:
        alpha = np.zeros((60, 100), np.float32)
        alpha[10:50, 8:32] = 0.4  # soft rim
        alpha[12:48, 10:30] = 0.9
        alpha[8:56, 58:96] = 0.4
        alpha[10:54, 60:94] = 0.8  # the larger one
        return alpha

    def test_the_one_with_the_face(self):
        alpha = self.two_people()
        kept = matte_refine.keep_person(alpha, (12, 12, 24, 24))
        assert np.array_equal(kept[:, :40], alpha[:, :40])
        assert not kept[:, 50:].any()

    def test_most_of_the_face(self):
        alpha = self.two_people()
        kept = matte_refine.keep_person(alpha, (25, 12, 90, 24))  # 5 columns of one, 30 of the other
        assert not kept[:, :40].any()
        assert np.array_equal(kept[:, 50:], alpha[:, 50:])

    @pytest.mark.parametrize("box", [(40, 12, 50, 24), (-30, -30, -5, -5), (200, 200, 300, 300)])
    def test_the_largest_where_none_holds_the_face(self, box):
        alpha = self.two_people()
        kept = matte_refine.keep_person(alpha, box)
        assert not kept[:, :40].any()
        assert np.array_equal(kept[:, 50:], alpha[:, 50:])

    def test_nothing_solid(self):
        alpha = np.full((20, 20), 0.5, np.float32)
        alpha[:, 10] = 0
        assert np.array_equal(matte_refine.keep_person(alpha, (0, 0, 8, 20)), alpha)

    def test_in_a_matte_that_needs_no_refinement(self):
        """At full size, above the working size, with the rim of the kept person untouched."""
        alpha = cv2.resize(self.two_people(), (2000, 1200), interpolation=cv2.INTER_LINEAR)
        kept = matte_refine.one_person(alpha, (240, 240, 480, 480))
        assert np.array_equal(kept[:, :700], alpha[:, :700])
        assert not kept[:, 1000:].any()


class TestFillHoles:
    def person(self) -> np.ndarray:
        mask = np.zeros((100, 100), np.float32)
        mask[20:100, 20:80] = 1.0
        return mask

    def test_small_ones_are_filled_with_their_soft_rim(self):
        mask = self.person()
        mask[40:46, 40:46] = 0.6
        mask[42:44, 42:44] = 0.1
        assert np.array_equal(matte_refine.fill_holes(mask, (0, 0, 1, 1)), self.person())

    def test_gaps_stay(self):
        mask = self.person()
        mask[60:75, 30:45] = 0.0  # 225 of 4,800 pixels
        assert np.array_equal(matte_refine.fill_holes(mask, (0, 0, 1, 1)), mask)

    def test_large_ones_on_the_face_are_filled(self):
        mask = self.person()
        mask[25:45, 30:50] = 0.0
        assert np.array_equal(matte_refine.fill_holes(mask, (30, 22, 60, 50)), self.person())

    def test_a_notch_is_no_hole(self):
        mask = self.person()
        mask[20:24, 40:44] = 0.0
        assert np.array_equal(matte_refine.fill_holes(mask, (30, 22, 60, 50)), mask)


class TestForeground:
    @pytest.mark.parametrize("background", ["plain", "tiles", "leaves"])
    def test_less_of_the_scene_shines_through(self, background):
        """The person on grey, against the same drawing with its true colours on grey."""
        for seed in range(3):
            person = draw(seed, background)
            truth = matting.on_grey(person.colours, person.alpha)
            plain = matting.on_grey(person.rgb, person.alpha)
            mended = matting.on_grey(matte_refine.foreground(person.rgb, person.alpha), person.alpha)
            rim = (person.alpha > 0) & (person.alpha < 1)
            assert error(mended[rim] * 1.0, truth[rim]) < 0.6 * error(plain[rim] * 1.0, truth[rim])

    def test_the_person_itself_stays(self):
        person = draw(0, "noise")
        mended = matte_refine.foreground(person.rgb, person.alpha)
        assert np.array_equal(mended[person.alpha >= 1], person.rgb[person.alpha >= 1])


@pytest.mark.parametrize(
    ("box", "share"), [((10, 0, 30, 40), 0.5), ((20, 5, 25, 9), 1.0), ((-9, -9, 0, 0), 0.0), ((90, 90, 95, 95), 0.0)]
)
def test_share_in(box: tuple[float, ...], share: float) -> None:
    matte = np.zeros((40, 40), np.float32)
    matte[:, 20:] = 1
    assert matte_refine.share_in(matte, box) == share


def test_feather() -> None:
    mask = np.zeros((41, 41), np.float32)
    mask[:, 20:] = 1
    assert matte_refine.feathered(mask, 0) is mask
    soft = matte_refine.feathered(mask, 2.0)
    assert soft[20, 19] == pytest.approx(0.4013, abs=0.01)  # half a pixel, a quarter of a deviation, outside
    assert soft.mean() == pytest.approx(mask.mean(), abs=1e-3)
