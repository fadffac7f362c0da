"""The reference picture's geometry against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from ipvg_ray.models import matting
from ipvg_ray.models.mini.face_template import landmarks_106

# Written out from the method's description, so that the ranges in the code are checked against something.
SPEC_ORDER = [
    *[1, 9, 10, 11, 12, 13, 14, 15, 16, 2, 3, 4, 5, 6, 7, 8, 0],
    *[24, 23, 22, 21, 20, 19, 18, 32, 31, 30, 29, 28, 27, 26, 25, 17],
    *[101, 105, 104, 103, 102, 50, 51, 49, 48, 43],
]


def square_face(cx: float, cy: float, scale: float = 1.0) -> np.ndarray:
    """106 landmarks whose polygon is a square of edge 200 · scale around its mean (cx, cy); one landmark, 35, stands
    200 · scale below the centre. The bounding box of all is then 200 wide and 300 high."""
    ring = [(-1, -1)] * 10 + [(-1, -0.5)] + [(-1, 1)] * 10 + [(0, 1)] + [(1, 1)] * 10 + [(1, -0.5)] + [(1, -1)] * 10
    points = np.zeros((106, 2))
    points[SPEC_ORDER] = ring
    points[35] = (0, 2)
    return points * 100 * scale + (cx, cy)


def normal_cdf(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


class TestGeometry:
    def test_polygon_order_is_the_specs(self):
        assert list(matting.FACE_POLYGON) == SPEC_ORDER
        assert len(set(SPEC_ORDER)) == 43

    @pytest.mark.parametrize(
        ("scale", "expected"),
        [  # box 200 x 300: middle 50 below the centre, half 0.75 · 300 = 225, up by 225 / 8 = 28.125
            (1.0, (400.0, 300 + 50 - 28.125, 225.0)),
            (0.5, (400.0, 300 + 25 - 14.0625, 112.5)),
            (2.0, (400.0, 300 + 100 - 56.25, 450.0)),
        ],
    )
    def test_landmark_box(self, scale, expected):
        assert matting.landmark_box(square_face(400, 300, scale)) == pytest.approx(expected)

    def test_longer_edge_may_be_the_width(self):
        points = np.zeros((106, 2))
        points[7], points[99] = (10, 20), (50, 28)  # with (0, 0): 50 wide, 28 high
        assert matting.landmark_box(points) == pytest.approx((25, 14 - 37.5 / 8, 37.5))

    @pytest.mark.parametrize("bad", [np.zeros((5, 2)), np.zeros((106, 2)), np.full((106, 2), np.nan)])
    def test_bad_landmarks(self, bad):
        with pytest.raises(ValueError, match="landmarks"):
            matting.landmark_box(bad)

    def test_polygon_is_scaled_about_its_mean(self):
        face = square_face(400, 300)
        assert matting.face_polygon(face)[0] == pytest.approx((300, 200))
        larger = matting.face_polygon(face, 1.4)
        assert larger.mean(axis=0) == pytest.approx((400, 300))
        assert (larger.min(axis=0), larger.max(axis=0)) == (pytest.approx((260, 160)), pytest.approx((540, 440)))


def spec_mask(shape: tuple[int, int], landmarks: np.ndarray) -> np.ndarray:
    """The mask by the method's own words, in Pillow: polygon scaled by 1.0 about its mean, drawn in a crop of half edge
    0.8 · longer edge, blurred with radius 15 at 512 x 512, brought back and pasted: float64 (H, W), 0 to 1."""
    points = landmarks[SPEC_ORDER]
    x, y = points.mean(axis=0)
    half = 0.8 * np.ptp(points, axis=0).max()
    left, top, side = (math.floor(value + 0.5) for value in (x - half, y - half, 2 * half))
    corners = [tuple(map(float, (point - (left, top) + 0.5) * 512 / side - 0.5)) for point in points]
    drawing = Image.new("L", (512, 512))
    ImageDraw.Draw(drawing).polygon(corners, fill=255)
    blurred = drawing.filter(ImageFilter.GaussianBlur(15)).resize((side, side), Image.Resampling.BILINEAR)
    whole = Image.new("L", shape[::-1])
    whole.paste(blurred, (left, top))
    return np.asarray(whole, np.float64) / 255


def middle(mask: np.ndarray) -> tuple[float, float]:
    """Its centre of mass, x and y."""
    y, x = np.indices(mask.shape)
    return float((x * mask).sum() / mask.sum()), float((y * mask).sum() / mask.sum())


class TestFixedFace:
    """An average face of 106 points against the method's numbers, at three scales, whole and cut by the picture."""

    @pytest.mark.parametrize("scale", [120.0, 300.0, 700.0])
    @pytest.mark.parametrize("place", [(0.5, 0.5), (0.05, 0.5), (0.5, 0.02), (0.97, 0.95)])
    def test_mask(self, scale, place):
        centre = np.array(place) * (1000, 900)
        landmarks = (landmarks_106() - 0.5) * scale + centre
        mask = matting.landmark_mask((900, 1000), landmarks)
        expected = spec_mask((900, 1000), landmarks)
        difference = np.abs(mask - expected)
        # Pillow rounds corners and fills the polygon's edge: 2 px of 512, where the blurred rim rises 0.027 per px.
        assert difference.max() < 0.055
        assert difference.mean() < 0.003
        assert middle(mask) == pytest.approx(middle(expected), abs=0.003 * scale)
        assert mask.max() > 0.8

    @pytest.mark.parametrize("scale", [120.0, 300.0, 700.0])
    def test_box_and_crop(self, scale):
        """The template spans x 0.09 to 0.91 and y 0.225 to 1.0: middle (0.5, 0.6125), longer edge 0.82."""
        landmarks = (landmarks_106() - 0.5) * scale + (40, 30)
        half = 0.75 * 0.82 * scale
        x, y = 40.0, 30 + 0.1125 * scale - half / 8
        assert matting.landmark_box(landmarks) == pytest.approx((x, y, half), abs=1e-3)
        picture = np.random.default_rng(0).integers(128, 256, (400, 500, 3), np.uint8)
        crop = matting.crop_square(picture, x, y, half)
        left, top = math.floor(x - half + 0.5), math.floor(y - half + 0.5)
        assert crop.shape[:2] == (math.floor(2 * half + 0.5),) * 2
        assert left < 0
        assert top < 0
        assert (crop[:-top] == 127).all()
        assert (crop[:, :-left] == 127).all()
        inside = crop[-top : 400 - top, -left : 500 - left]
        assert np.array_equal(inside, picture[: inside.shape[0], : inside.shape[1]])


class TestCrop:
    picture = np.arange(6 * 8, dtype=np.uint8).reshape(6, 8)

    def test_inside(self):
        crop = matting.crop_square(self.picture, 4, 3, 2)  # x 2..5, y 1..4
        assert np.array_equal(crop, self.picture[1:5, 2:6])

    def test_padded_outside(self):
        crop = matting.crop_square(self.picture, 1, 5, 2.5, fill=99)  # x -1..3 (-1.5 rounds up), y 3..7
        expected = np.full((5, 5), 99, np.uint8)
        expected[:3, 1:] = self.picture[3:, :4]
        assert np.array_equal(crop, expected)

    @pytest.mark.parametrize("centre", [(-50, 3), (50, 3), (4, -50), (4, 50)])
    def test_wholly_outside(self, centre):
        assert (matting.crop_square(self.picture, *centre, 2, fill=7) == np.full((4, 4), 7)).all()

    def test_colour_and_float(self):
        rgb = np.stack([self.picture] * 3, -1).astype(np.float32)
        assert matting.crop_square(rgb, 0, 0, 2, fill=0.5).shape == (4, 4, 3)
        assert matting.crop_square(rgb, 0, 0, 2, fill=0.5)[0, 0, 0] == 0.5

    @pytest.mark.parametrize("half", [0, -1, math.nan, 1e9])
    def test_no_square(self, half):
        with pytest.raises(ValueError, match="no square"):
            matting.crop_square(self.picture, 4, 3, half)


class TestLandmarkMask:
    @pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
    def test_edge_profile(self, scale):
        """Crop half edge 0.8 · 200, so 512 / 320 drawing pixels per picture pixel: sigma 15 becomes 9.375 pixels."""
        mask = matting.landmark_mask((900, 1000, 3), square_face(500, 450, scale))
        assert mask.dtype == np.float32
        assert mask.shape == (900, 1000)
        sigma = 9.375 * scale
        for distance in (-2, -1, 0, 1, 2):  # in sigmas, inwards from the middle of each of the square's edges
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
                reach = 100 * scale - distance * sigma
                value = mask[round(450 + dy * reach), round(500 + dx * reach)]
                assert value == pytest.approx(normal_cdf(distance), abs=0.4 / sigma)
        assert mask[450, 500] == pytest.approx(1, abs=1e-4)
        assert not mask[: round(450 - 160 * scale) - 1].any()  # outside the crop
        # The Gaussian's corner: half of a half.
        corner = mask[round(450 - 100 * scale), round(500 - 100 * scale)]
        assert corner == pytest.approx(0.25, abs=0.4 / sigma)

    def test_larger_polygon(self):
        mask = matting.landmark_mask((900, 1000), square_face(500, 450), scale=1.4)
        assert mask[450, 360] == pytest.approx(0.5, abs=0.04)
        assert mask[450, 400] > 0.98

    @pytest.mark.parametrize("shift", [(-450, 0), (480, 0), (0, -400), (0, 430), (-430, 400)])
    def test_cut_at_the_pictures_edge(self, shift):
        dx, dy = shift
        whole = matting.landmark_mask((2700, 3000), square_face(1500, 1350))
        cut = matting.landmark_mask((900, 1000), square_face(500 + dx, 450 + dy))
        expected = whole[900 - dy : 1800 - dy, 1000 - dx : 2000 - dx]
        assert cut.max() > 0.9
        assert np.array_equal(cut, expected)


def id_picture(rgb: np.ndarray, alpha: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    return matting.on_grey(*matting.id_crop(rgb, alpha, landmarks))


class TestIdPicture:
    def picture(self) -> np.ndarray:
        y, x = np.mgrid[0:600, 0:800]
        return np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8)

    def test_box_and_blend(self):
        rgb, face = self.picture(), square_face(400, 300)  # left 400 - 225 = 175, top floor(321.875 - 225 + .5) = 97
        whole = id_picture(rgb, np.ones((600, 800), np.float32), face)
        assert np.array_equal(whole, rgb[97:547, 175:625])
        assert (id_picture(rgb, np.zeros((600, 800)), face) == 127).all()
        half = id_picture(rgb, np.full((600, 800), 0.5), face)
        assert np.array_equal(half, np.round(rgb[97:547, 175:625] * 0.5 + 63.5).astype(np.uint8))

    def test_grey_beyond_the_picture(self):
        rgb, face = self.picture(), square_face(100, 50)  # left -125, top floor(71.875 - 225 + .5) = -153
        result = id_picture(rgb, np.ones((600, 800), np.float32), face)
        assert result.shape == (450, 450, 3)
        assert (result[:153] == 127).all()
        assert (result[:, :125] == 127).all()
        assert np.array_equal(result[153:, 125:], rgb[:297, :325])

    def test_rgba(self):
        rgb, face = self.picture(), square_face(400, 300)
        person, share = matting.id_crop(rgb, np.full((600, 800), 0.5), face)
        cut = matting.rgba(person, share)
        assert (cut.shape, cut.dtype) == ((450, 450, 4), np.uint8)
        assert np.array_equal(cut[..., :3], rgb[97:547, 175:625])
        assert (cut[..., 3] == 128).all()

    def test_large_ones_are_shrunk(self):
        person, share = matting.id_crop(
            np.full((3000, 3000, 3), 9, np.uint8), np.ones((3000, 3000)), square_face(1500, 1400, 6)
        )
        assert person.shape == (1024, 1024, 3)
        assert share.shape == (1024, 1024)

    def test_sizes_must_agree(self):
        with pytest.raises(ValueError, match="equal"):
            id_picture(self.picture(), np.ones((599, 800)), square_face(400, 300))
