"""The reference picture's geometry against numbers worked out by hand, the matte, and the matting stage."""

from __future__ import annotations

import hashlib
import io
import math
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from ipvg_ray import config
from ipvg_ray.media import images
from ipvg_ray.models import matting
from ipvg_ray.models.mini import hrnet as mini_hrnet
from ipvg_ray.pipeline.stage import RowError, StageContext
from ipvg_ray.stages.matting import MattingStage

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


class TestIdPicture:
    def picture(self) -> np.ndarray:
        y, x = np.mgrid[0:600, 0:800]
        return np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8)

    def test_box_and_blend(self):
        rgb, face = self.picture(), square_face(400, 300)  # left 400 - 225 = 175, top floor(321.875 - 225 + .5) = 97
        whole = matting.id_picture(rgb, np.ones((600, 800), np.float32), face)
        assert np.array_equal(whole, rgb[97:547, 175:625])
        assert (matting.id_picture(rgb, np.zeros((600, 800)), face) == 127).all()
        half = matting.id_picture(rgb, np.full((600, 800), 0.5), face)
        assert np.array_equal(half, np.round(rgb[97:547, 175:625] * 0.5 + 63.5).astype(np.uint8))

    def test_grey_beyond_the_picture(self):
        rgb, face = self.picture(), square_face(100, 50)  # left -125, top floor(71.875 - 225 + .5) = -153
        result = matting.id_picture(rgb, np.ones((600, 800), np.float32), face)
        assert result.shape == (450, 450, 3)
        assert (result[:153] == 127).all()
        assert (result[:, :125] == 127).all()
        assert np.array_equal(result[153:, 125:], rgb[:297, :325])

    def test_sizes_must_agree(self):
        with pytest.raises(ValueError, match="equal"):
            matting.id_picture(self.picture(), np.ones((599, 800)), square_face(400, 300))


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
        kept = matting.keep_person(alpha, (12, 12, 24, 24))
        assert np.array_equal(kept[:, :40], alpha[:, :40])
        assert not kept[:, 50:].any()

    def test_most_of_the_face(self):
        alpha = self.two_people()
        kept = matting.keep_person(alpha, (25, 12, 90, 24))  # 5 columns of one, 30 of the other
        assert not kept[:, :40].any()
        assert np.array_equal(kept[:, 50:], alpha[:, 50:])

    @pytest.mark.parametrize("box", [(40, 12, 50, 24), (-30, -30, -5, -5), (200, 200, 300, 300)])
    def test_no_region_there(self, box):
        alpha = self.two_people()
        assert np.array_equal(matting.keep_person(alpha, box), alpha)

    def test_nothing_solid(self):
        alpha = np.full((20, 20), 0.5, np.float32)
        alpha[:, 10] = 0
        assert np.array_equal(matting.keep_person(alpha, (0, 0, 8, 20)), alpha)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def row(identity: str = "id001", data: bytes | None = None, **changes: object) -> dict:
    data = png(skimage.data.astronaut()[:300, 100:400]) if data is None else data
    return {
        "identity_id": identity,
        "image": {"bytes": data, "path": None},
        "image_sha256": hashlib.sha256(data).hexdigest(),
        "face_box": [75.0, 60.0, 180.0, 180.0],
        "landmarks_106": square_face(125, 120, 0.45).ravel().tolist(),
        "seed": 1,
        **changes,
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    mini_hrnet.make(root)
    return root


def started(models: Path, **settings: object) -> MattingStage:
    stage = MattingStage(config.load("cpu-mini", values={"models": {"root": str(models)}, "matting": settings}))
    stage.setup(StageContext("cpu", 1, None, "unused"))  # type: ignore[arg-type]
    return stage


def decoded(picture: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture["bytes"])))


class TestStage:
    @pytest.mark.parametrize("method", ["hrnet", "landmarks", "none"])
    def test_row(self, models, method):
        stage = started(models, method=method)
        (result,) = stage.process([row()])
        assert set(result) == set(stage.table().columns)
        matte, picture = decoded(result["matte"]), decoded(result["id_picture"])
        assert (matte.dtype, matte.shape) == (np.uint8, (300, 300))
        assert picture.shape == (203, 203, 3)  # 2 · 0.75 · 135 = 202.5
        assert result["matting_method"] == method
        assert result["person_share"] == pytest.approx(matte.mean() / 255, abs=0.003)
        assert {"hrnet": 0.02 < result["person_share"] < 0.98, "landmarks": matte[120, 125] == 255}.get(method, True)
        assert method != "none" or (matte == 255).all()

    def test_hrnet_matte_holds_the_face(self, models):
        """The miniature's blots are chance; one region of it is kept, whole, and it is the one at the face."""
        (result,) = started(models).process([row()])
        solid = decoded(result["matte"]) > 128
        assert solid[60:180, 75:180].any()
        assert skimage.measure.label(solid).max() == 1

    def test_independent_of_the_batch(self, models):
        other = row("id002", png(skimage.data.astronaut()[:200, :333]))
        stage = started(models)
        together = stage.process([other, row(), other])
        assert together[1] == stage.process([row()])[0]
        assert together[0] == together[2] == started(models).process([other])[0]

    def test_failures_are_the_rows_own(self, models):
        stage = started(models, method="landmarks")
        broken, changed = row(data=b"no picture"), row(image_sha256="0" * 64)
        flat = row(landmarks_106=[1.0] * 212)
        results = stage.process([broken, row(), changed, flat])
        kinds = [result.kind if isinstance(result, RowError) else "ok" for result in results]
        assert kinds == ["broken_image", "ok", "image_changed", "bad_landmarks"]

    def test_too_large_by_the_sets_own_bound(self, models):
        values = {"dataset": {"max_image_pixels": 1000}, "matting": {"method": "none"}}
        stage = MattingStage(config.load("cpu-mini", values=values))
        stage.setup(StageContext("cpu", 1, None, "unused"))  # type: ignore[arg-type]
        (result,) = stage.process([row()])
        assert isinstance(result, RowError)
        assert result.kind == "image_too_large"

    def test_only_hrnet_depends_on_the_network(self, models):
        def stage(**settings: object) -> MattingStage:
            return MattingStage(config.load("cpu-mini", values={"matting": settings}))

        assert set(stage(method="hrnet").models()) == {"model"}
        for method in ("landmarks", "none"):
            one, other = stage(method=method), stage(method=method, model="other.pth", input_size=64)
            assert one.models() == {}
            assert one.fingerprint_settings() == other.fingerprint_settings() == {"method": method}
        sizes = [stage(method="hrnet", input_size=size).fingerprint_settings() for size in (64, 128)]
        assert sizes[0] != sizes[1]

    def test_mattes_are_grey_pngs(self, models):
        (result,) = started(models, method="landmarks").process([row()])
        assert images.image_bytes(result["matte"]).startswith(b"\x89PNG")
        assert Image.open(io.BytesIO(result["matte"]["bytes"])).mode == "L"
