"""The matting stage: rows in and out, batches, failures, what its results depend on."""

from __future__ import annotations

import hashlib
import io
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import skimage.data
import skimage.measure
from PIL import Image
from synthetic_people import draw

from ipvg_ray import config
from ipvg_ray.media import images
from ipvg_ray.models.mini import hrnet as mini_hrnet
from ipvg_ray.models.mini.face_template import landmarks_106
from ipvg_ray.pipeline.stage import RowError, StageContext
from ipvg_ray.stages.matting import MattingStage

LANDMARKS = (landmarks_106() - (0.5, 0.6)) * 135 + (125, 120)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


BOX = [75.0, 60.0, 180.0, 180.0]


def row(identity: str = "id001", data: bytes | None = None, **changes: object) -> dict:
    data = png(skimage.data.astronaut()[:300, 100:400]) if data is None else data
    return {
        "identity_id": identity,
        "image": {"bytes": data, "path": None},
        "image_sha256": hashlib.sha256(data).hexdigest(),
        "more_images": None,
        "more_images_sha256": None,
        "reference_numbers": [0],
        "reference_used": [True],
        "reference_boxes": [BOX],
        "reference_landmarks": [LANDMARKS.ravel().tolist()],
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
        assert picture.shape == (166, 166, 3)  # 2 · 0.75 · 0.82 · 135 = 166.05
        cutout = decoded(result["cutout"])
        assert (cutout.shape, cutout.dtype) == ((166, 166, 4), np.uint8)
        share = cutout[..., 3:] / 255
        assert np.abs(cutout[..., :3] * share + 127 * (1 - share) - picture).max() <= 1.1  # two roundings
        assert result["matting_method"] == method
        assert result["person_share"] == pytest.approx(matte.mean() / 255, abs=0.003)
        assert result["face_share"] == pytest.approx(matte[60:180, 75:180].mean() / 255, abs=0.003)
        assert {"hrnet": 0.02 < result["person_share"] < 0.98, "landmarks": matte[120, 125] == 255}.get(method, True)
        assert method != "none" or (matte == 255).all()

    def test_hrnet_matte_holds_the_face(self, models):
        """The miniature's blots are chance; one region of it is kept, whole, and it is the one at the face."""
        (result,) = started(models, refine=False, feather=0.0).process([row()])
        solid = decoded(result["matte"]) > 128
        assert solid[60:180, 75:180].any()
        assert skimage.measure.label(solid).max() == 1

    @pytest.mark.parametrize("network_batch", [1, 2, 8])
    def test_independent_of_the_batch(self, models, network_batch):
        """To the bit, on a CPU."""
        other = row("id002", png(skimage.data.astronaut()[:200, :333]))
        rows = [other, row(), other, row(), row(), other]
        for method in ("hrnet", "landmarks"):
            stage = started(models, method=method, network_batch=network_batch)
            assert [started(models, method=method).process([r])[0] for r in rows] == stage.process(rows)

    def test_pictures_of_one_size_go_through_the_network_together(self, models, monkeypatch):
        stage = started(models, network_batch=4)
        sizes = []
        run = type(stage._network).run

        def counted(network, batch):
            sizes.append(tuple(batch.shape))
            return run(network, batch)

        monkeypatch.setattr(type(stage._network), "run", counted)
        assert len(stage.process([row(f"id{i}") for i in range(10)])) == 10
        assert sizes == [(4, 3, 128, 128), (4, 3, 128, 128), (2, 3, 128, 128)]

    def test_the_next_batch_is_decoded_while_the_network_works(self, models, monkeypatch):
        """The network waits until a picture of the batch after is decoded: without reading ahead it would for ever."""
        stage = started(models, network_batch=2)
        run, decode = type(stage._network).run, images.decode
        decoded_after, calls = threading.Semaphore(0), []

        def reading(*args):
            decoded_after.release()
            return decode(*args)

        def waiting(network, batch):
            for _ in range(4 if not calls else 0):
                assert decoded_after.acquire(timeout=30)
            calls.append(len(batch))
            return run(network, batch)

        monkeypatch.setattr(images, "decode", reading)
        monkeypatch.setattr(type(stage._network), "run", waiting)
        stage.process([row(f"id{i}") for i in range(4)])
        assert calls == [2, 2]

    @pytest.mark.parametrize("size", [(300, 300), (1200, 1200)])
    def test_refinement_gives_a_matte(self, models, size, monkeypatch):
        """A drawn person, of whom the network sees what a network sees: the matte is far nearer to the truth."""
        person = draw(3, "leaves", size[0])
        stage = started(models, feather=0.0)
        seen = stage._network.prepare.side
        coarse = images.shrunk(np.round(person.coarse(size[0] / 60) * 255).astype(np.uint8), seen) / np.float32(255)
        monkeypatch.setattr(type(stage._network), "run", lambda _, batch: np.stack([coarse] * len(batch)))
        box = list(person.face_box)
        (result,) = stage.process([row(data=png(person.rgb), reference_boxes=[box])])
        error = np.abs(decoded(result["matte"]) / 255 - person.alpha).mean()
        unrefined = started(models, feather=0.0, refine=False)
        (rough,) = unrefined.process([row(data=png(person.rgb), reference_boxes=[box])])
        assert error <= 0.5 * np.abs(decoded(rough["matte"]) / 255 - person.alpha).mean()

    @pytest.mark.parametrize("method", ["hrnet", "landmarks"])
    def test_further_pictures_give_an_id_picture_each(self, models, method):
        """Each as if it were an identity's only one; what is not used is not even read."""
        stage = started(models, method=method, network_batch=2)
        other, third = png(skimage.data.astronaut()[:200, :333]), png(skimage.data.astronaut()[:280, 90:400])
        elsewhere, near = (LANDMARKS + 5).ravel().tolist(), [60.0, 50.0, 190.0, 190.0]
        alone = row("a")
        several = row(
            "b",
            more_images=[{"bytes": data, "path": None} for data in (b"no picture", other, third)],
            more_images_sha256=[hashlib.sha256(data).hexdigest() for data in (b"other bytes", other, third)],
            reference_numbers=[0, 2, 3],
            reference_used=[True, False, True],
            reference_boxes=[BOX, BOX, near],
            reference_landmarks=[LANDMARKS.ravel().tolist(), LANDMARKS.ravel().tolist(), elsewhere],
        )
        single, many, after = stage.process([alone, several, alone])
        assert single == after
        assert single["more_id_pictures"] is None
        assert {**many, "more_id_pictures": None} == single
        (expected,) = stage.process([row(data=third, reference_boxes=[near], reference_landmarks=[elsewhere])])
        assert many["more_id_pictures"] == [expected["id_picture"]]
        stored = pa.Table.from_pylist([single, many], schema=MattingStage.table().schema)
        assert [len(r["more_id_pictures"] or ()) for r in stored.to_pylist()] == [0, 1]

    def test_a_further_picture_that_has_changed_fails_its_identity(self, models):
        stage = started(models, method="landmarks")
        two = {"reference_numbers": [0, 1], "reference_used": [True, True], "reference_boxes": [BOX, BOX]}
        two |= {"reference_landmarks": [LANDMARKS.ravel().tolist()] * 2, "more_images_sha256": ["0" * 64]}
        failed, fine = stage.process([row(more_images=[row()["image"]], **two), row()])
        assert isinstance(failed, RowError)
        assert failed.kind == "image_changed"
        assert failed.message.startswith("reference picture 1 (0 is the first): ")
        assert isinstance(fine, dict)

    def test_without_cutout(self, models):
        (result,) = started(models, method="none", cutout=False).process([row()])
        assert result["cutout"] is None

    def test_no_rows(self, models):
        assert started(models).process([]) == []

    def test_failures_are_the_rows_own(self, models):
        stage = started(models, method="landmarks")
        broken, changed = row(data=b"no picture"), row(image_sha256="0" * 64)
        flat = row(reference_landmarks=[[1.0] * 212])
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
            assert one.fingerprint_settings() == other.fingerprint_settings() == {"method": method, "cutout": True}
        sizes = [stage(method="hrnet", input_size=size).fingerprint_settings() for size in (64, 128)]
        assert sizes[0] != sizes[1]
        batches = [stage(method="hrnet", network_batch=size).fingerprint_settings() for size in (1, 16)]
        assert batches[0] == batches[1]

    def test_mattes_are_grey_pngs(self, models):
        (result,) = started(models, method="landmarks").process([row()])
        assert images.image_bytes(result["matte"]).startswith(b"\x89PNG")
        assert Image.open(io.BytesIO(result["matte"]["bytes"])).mode == "L"
