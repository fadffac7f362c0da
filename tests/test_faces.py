"""The miniature packs under insightface's own loader, the choice of a face, and the faces stage."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import skimage.data
from PIL import Image

from ipvg_ray import config, schema
from ipvg_ray.media import images
from ipvg_ray.models import faces
from ipvg_ray.models.faces import Face, FaceAnalyser, NoFaceError, SeveralFacesError, choose, iou, matching
from ipvg_ray.models.mini import insightface_pack
from ipvg_ray.models.mini.face_template import landmarks_106
from ipvg_ray.models.mini.lbp_cascade import read_cascade
from ipvg_ray.pipeline.stage import RowError, StageContext
from ipvg_ray.stages.faces import FacesStage

Picture = np.ndarray
ASTRONAUT = np.array([174, 68, 270, 164], dtype=np.float32)
"""Where the astronaut's face is; read off the picture."""


@pytest.fixture(scope="session")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faces")
    insightface_pack.make(root)
    return root


@pytest.fixture(scope="session")
def analyser(packs: Path) -> FaceAnalyser:
    return FaceAnalyser(packs / "insightface/models/mini_buffalo_l", det_sizes=(640,))


@pytest.fixture(scope="session")
def astronaut() -> Picture:
    return np.asarray(skimage.data.astronaut())


@pytest.fixture(scope="session")
def two_faces(astronaut: Picture) -> Picture:
    """The astronaut's head twice: as it is on the left, at 1.5 times the size on the right; 600 x 300."""
    head = Image.fromarray(astronaut[0:200, 120:320])
    sheet = Image.new("RGB", (600, 300), (90, 120, 90))
    sheet.paste(head, (0, 0))
    sheet.paste(head.resize((300, 300)), (300, 0))
    return np.asarray(sheet)


def sample_picture(name: str) -> Picture:
    insightface_data = pytest.importorskip("insightface.data")
    return np.ascontiguousarray(insightface_data.get_image(name)[:, :, ::-1])


def face(x: float = 0, y: float = 0, side: float = 10, score: float = 0.9) -> Face:
    return Face(np.array([x, y, x + side, y + side], np.float32), score, np.zeros((5, 2), np.float32))


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_each_rule_chooses_its_own_face() -> None:
    large, central, confident = face(0, 0, 40, 0.6), face(45, 45, 10, 0.7), face(80, 80, 15, 0.95)
    found = [central, confident, large]
    assert choose(found, "largest", (100, 100)) is large
    assert choose(found, "centre", (100, 100)) is central
    assert choose(found, "confident", (100, 100)) is confident


def test_the_centre_is_taken_in_width_and_height_order() -> None:
    right, low = face(85, 5), face(5, 35)
    assert choose([right, low], "centre", (180, 20)) is right
    assert choose([right, low], "centre", (20, 80)) is low


def test_error_refuses_several_faces_and_accepts_one() -> None:
    only = face()
    assert choose([only], "error", (100, 100)) is only
    with pytest.raises(SeveralFacesError, match="2 faces"):
        choose([only, face(50)], "error", (100, 100))
    with pytest.raises(NoFaceError):
        choose([], "largest", (100, 100))


def test_the_matching_face_is_the_one_that_overlaps_most() -> None:
    box = np.array([0, 0, 10, 10], np.float32)
    assert iou(box, np.array([5, 0, 15, 10], np.float32)) == pytest.approx(1 / 3)
    assert iou(box, np.array([20, 20, 30, 30], np.float32)) == 0
    near, nearer = face(4), face(1)
    assert matching([near, nearer], box) is nearer
    assert matching([face(8)], box) is None
    assert matching([], box) is None


def test_area_and_normed_embedding() -> None:
    assert face(side=4).area == 16
    assert face().normed_embedding is None
    raw = np.full(512, 2, np.float32)
    some = Face(np.zeros(4, np.float32), 1.0, np.zeros((5, 2), np.float32), embedding=raw)
    assert np.linalg.norm(some.normed_embedding) == pytest.approx(1)
    assert some.embedding is raw


@pytest.mark.parametrize(("number", "word"), [(0, "female"), (1, "male"), (None, None)])
def test_insightfaces_numbers_become_words(number: int | None, word: str | None) -> None:
    from insightface.app.common import Face as Theirs

    theirs = Theirs(bbox=np.zeros(4), kps=np.zeros((5, 2)), det_score=np.float32(0.5), gender=number, age=31)
    ours = faces._face(theirs)
    assert (ours.gender, ours.age, ours.landmarks_106, ours.embedding) == (word, 31.0, None, None)
    assert ours.box.dtype == ours.landmarks_5.dtype == np.float32


# --- the packs --------------------------------------------------------------------------------------------------------


def test_both_packs_have_the_real_packs_files_and_load_whole(packs: Path) -> None:
    expected = {
        "mini_buffalo_l": {"det_10g", "2d106det", "genderage", "w600k_r50"},
        "mini_antelopev2": {"scrfd_10g_bnkps", "2d106det", "genderage", "glintr100"},
    }
    for name, names in expected.items():
        folder = packs / "insightface/models" / name
        assert {path.stem for path in folder.iterdir()} == names
        assert sum(path.stat().st_size for path in folder.iterdir()) < 5e6
        modules = FaceAnalyser(folder, det_sizes=(256,)).modules
        assert modules == {"detection", "landmark_2d_106", "genderage", "recognition"}


def test_the_seed_alone_decides_the_bytes(packs: Path, tmp_path: Path) -> None:
    def digests(root: Path) -> dict[str, str]:
        return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*.onnx")}

    insightface_pack.make(tmp_path / "same")
    insightface_pack.make(tmp_path / "other", seed=1)
    first = digests(packs)
    assert digests(tmp_path / "same") == first
    other = digests(tmp_path / "other")
    assert {Path(k).stem for k in first if other[k] == first[k]} == {"det_10g", "scrfd_10g_bnkps"}
    assert len(set(first.values())) == len(first) == 8


def test_the_mirrored_cascade_sees_the_mirror_image() -> None:
    cascade = read_cascade(Path(skimage.data.lbp_frontal_face_cascade_filename()))
    assert len(cascade.thresholds) == 20
    patch = np.random.default_rng(0).integers(0, 256, (24, 24))

    def values(some: Any, window: np.ndarray) -> np.ndarray:
        ring = [(0, 0, 128), (0, 1, 64), (0, 2, 32), (1, 2, 16), (2, 2, 8), (2, 1, 4), (2, 0, 2), (1, 0, 1)]
        results = []
        for (x, y, w, h), table in zip(some.rects, some.tables, strict=True):
            sums = window[y : y + 3 * h, x : x + 3 * w].reshape(3, h, 3, w).sum(axis=(1, 3))
            results.append(table[sum(weight for r, c, weight in ring if sums[r, c] >= sums[1, 1])])
        return np.array(results)

    assert np.array_equal(values(cascade.mirrored(), patch[:, ::-1]), values(cascade, patch))
    assert not np.array_equal(values(cascade, patch[:, ::-1]), values(cascade, patch))


def test_the_landmark_template_is_a_symmetric_face() -> None:
    points = landmarks_106()
    assert np.isfinite(points).all()
    assert len(np.unique(points, axis=0)) == 106
    mirrored = points * (-1, 1) + (1, 0)
    assert all(np.abs(points - m).max(axis=1).min() < 1e-5 for m in mirrored)
    assert points[:, 1].argmax() == 0, "landmark 0 is the chin"
    left_eye, right_eye, tip = points[[33, 35, 39, 40]].mean(0), points[[87, 89, 93, 94]].mean(0), points[86]
    assert left_eye[0] < tip[0] < right_eye[0]
    assert left_eye[1] < tip[1] < points[52:72, 1].min()


def test_the_hyperlora_polygon_encloses_eyes_nose_and_mouth() -> None:
    import cv2

    from ipvg_ray.models.matting import face_polygon

    points = landmarks_106().astype(np.float64) * 100
    polygon = face_polygon(points).astype(np.float32)
    for index in (*range(33, 43), *range(52, 97)):
        assert cv2.pointPolygonTest(polygon, points[index].tolist(), False) > 0, index


# --- detection --------------------------------------------------------------------------------------------------------


def test_the_astronaut_is_found_where_she_is(analyser: FaceAnalyser, astronaut: Picture) -> None:
    (found,) = analyser.faces(astronaut)
    assert iou(found.box, ASTRONAUT) > 0.8
    assert found.score > 0.8
    assert found.landmarks_106.shape == (106, 2)
    assert found.gender in ("female", "male")
    assert 0 < found.age < 100
    right_eye, left_eye, nose, _, _ = found.landmarks_5
    # Read off the picture: her eyes are near (203, 105) and (241, 105), the tip of her nose near (222, 128).
    assert np.abs(np.stack([right_eye, left_eye, nose]) - [[203, 105], [241, 105], [222, 128]]).max() < 9
    inside = (found.landmarks_106 > found.box[:2] - 5) & (found.landmarks_106 < found.box[2:] + 5)
    assert inside.all()


def test_boxes_agree_with_scikit_images_own_cascade(analyser: FaceAnalyser, astronaut: Picture) -> None:
    from skimage.feature import Cascade

    cascade = Cascade(skimage.data.lbp_frontal_face_cascade_filename())
    theirs = cascade.detect_multi_scale(astronaut, 1.1, 1, (60, 60), (200, 200))
    (ours,) = analyser.faces(astronaut)
    boxes = [np.array([t["c"], t["r"], t["c"] + t["width"], t["r"] + t["height"]]) for t in theirs]
    assert max(iou(ours.box, box) for box in boxes) > 0.6


def test_channels_are_taken_as_rgb(analyser: FaceAnalyser, astronaut: Picture) -> None:
    # The embedding is of a crop turned back to RGB by insightface: swapped channels must change it.
    (right,), (swapped,) = analyser.faces(astronaut), analyser.faces(astronaut[:, :, ::-1])
    raw = right.embedding
    crop_session = analyser._app.models["recognition"].session
    aligned = _aligned(astronaut, right.landmarks_5)
    expected = crop_session.run(None, {"input.1": (aligned.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]})[
        0
    ][0]
    assert np.abs(raw - expected).max() < 0.02 * np.abs(expected).max()
    assert np.abs(raw - swapped.embedding).max() > 0.1 * np.abs(raw).max()


def _aligned(rgb: Picture, points: np.ndarray) -> Picture:
    from insightface.utils import face_align

    return np.asarray(face_align.norm_crop(rgb, points, image_size=112))


@pytest.mark.parametrize("name", ["cat", "chelsea", "coffee", "rocket"])
def test_no_face_on_pictures_without_one(analyser: FaceAnalyser, name: str) -> None:
    assert analyser.faces(np.asarray(getattr(skimage.data, name)())) == []


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_no_face_on_a_blank_picture(analyser: FaceAnalyser, grey: int) -> None:
    assert analyser.faces(np.full((300, 200, 3), grey, np.uint8)) == []


@pytest.mark.slow
@pytest.mark.parametrize("side", [64, 96, 128, 200, 256, 384, 512])
def test_no_face_on_noise(packs: Path, side: int) -> None:
    analyser = FaceAnalyser(packs / "insightface/models/mini_buffalo_l", det_sizes=(640, 512, 384, 256))
    random = np.random.default_rng(side)
    for _ in range(3):
        assert analyser.faces(random.integers(0, 256, (side, side, 3), np.uint8)) == []


def test_a_crowd_and_a_close_up(analyser: FaceAnalyser) -> None:
    crowd = analyser.faces(sample_picture("t1"))
    expected = np.array([[1115, 278, 1232, 395], [725, 355, 843, 473], [449, 274, 581, 406]], np.float32)
    assert all(max(iou(f.box, box) for f in crowd) > 0.6 for box in expected)
    (close_up,) = analyser.faces(sample_picture("Tom_Hanks_54745"))
    assert iou(close_up.box, np.array([15, 18, 98, 102], np.float32)) > 0.7


def test_embeddings_tell_faces_apart_and_know_them_again(analyser: FaceAnalyser, astronaut: Picture) -> None:
    (one,) = analyser.faces(astronaut)
    (again,) = analyser.faces(np.asarray(Image.fromarray(astronaut).resize((400, 400))))
    crowd = analyser.faces(sample_picture("t1"))
    same = float(one.normed_embedding @ again.normed_embedding)
    others = [float(one.normed_embedding @ f.normed_embedding) for f in crowd]
    assert max(others) < 0.7
    assert same > max(others) + 0.1
    assert 5 < np.linalg.norm(one.embedding) < 50, "raw, not normalised"


def test_two_calls_give_the_same_numbers(analyser: FaceAnalyser, astronaut: Picture) -> None:
    (one,), (two,) = analyser.faces(astronaut), analyser.faces(astronaut)
    for field in ("box", "landmarks_5", "landmarks_106", "embedding"):
        assert np.array_equal(getattr(one, field), getattr(two, field)), field
    assert (one.score, one.gender, one.age) == (two.score, two.gender, two.age)


def test_sizes_are_tried_in_order_until_one_shows_a_face(packs: Path, astronaut: Picture) -> None:
    pack = packs / "insightface/models/mini_buffalo_l"
    tried: list[tuple[int, int]] = []

    def watched(*sizes: int) -> list[Face]:
        analyser = FaceAnalyser(pack, det_sizes=sizes, modules=("detection",))
        forward = analyser._app.det_model.forward
        tried.clear()

        def record(picture: np.ndarray, threshold: float) -> Any:
            tried.append(picture.shape[:2])
            return forward(picture, threshold)

        analyser._app.det_model.forward = record
        return analyser.faces(astronaut)

    # Below 55 pixels of the detector's square a face is too small: hers is 96 of 512, so 24 of 128.
    assert watched(128) == []
    assert len(watched(128, 640, 512)) == 1
    assert tried == [(128, 128), (640, 640)]
    (found,) = watched(512, 256)
    assert tried == [(512, 512)]
    assert found.landmarks_106 is None
    assert found.embedding is None
    assert found.gender is None


def test_small_and_odd_pictures_and_wrong_arrays(analyser: FaceAnalyser) -> None:
    assert analyser.faces(np.zeros((1, 1, 3), np.uint8)) == []
    assert analyser.faces(np.zeros((3, 700, 3), np.uint8)) == []
    for wrong in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((0, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            analyser.faces(wrong)


def test_missing_packs_say_what_mends_them(packs: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"buffalo_l\.zip"):
        FaceAnalyser(tmp_path / "buffalo_l", det_sizes=(640,))
    (tmp_path / "antelopev2/antelopev2").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="move them up"):
        FaceAnalyser(tmp_path / "antelopev2", det_sizes=(640,))
    headless = tmp_path / "headless"
    headless.mkdir()
    whole = packs / "insightface/models/mini_buffalo_l"
    (headless / "genderage.onnx").write_bytes((whole / "genderage.onnx").read_bytes())
    with pytest.raises(FileNotFoundError, match="no face detector"):
        FaceAnalyser(headless, det_sizes=(640,))
    for sizes in ((), (100,), (0,)):
        with pytest.raises(ValueError, match="det_sizes"):
            FaceAnalyser(whole, det_sizes=sizes)


def test_nothing_is_printed(packs: Path) -> None:
    program = (
        "import numpy as np, skimage.data, sys\nfrom pathlib import Path\n"
        "from ipvg_ray.models.faces import FaceAnalyser\n"
        "a = FaceAnalyser(Path(sys.argv[1]), det_sizes=(512,)); assert a.faces(np.asarray(skimage.data.astronaut()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(packs / "insightface/models/mini_buffalo_l")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    assert "Warning" not in done.stderr


# --- the stage --------------------------------------------------------------------------------------------------------


def make_stage(root: Path, **section: Any) -> FacesStage:
    values: dict[str, Any] = {"models": {"root": str(root)}, "faces": section}
    if "pack" in section:
        values["evaluate"] = {"pack": section["pack"]}  # the configuration wants one pack for both
    stage = FacesStage(config.load("cpu-mini", values=values))
    stage.setup(StageContext(device="cpu", threads=1, media=None, run_dir=""))  # type: ignore[arg-type]
    return stage


@pytest.fixture(scope="session")
def stage(packs: Path) -> FacesStage:
    return make_stage(packs)


def row_of(rgb: Picture, **changes: Any) -> dict[str, Any]:
    picture = images.encode(rgb)
    digest = hashlib.sha256(picture["bytes"]).hexdigest()
    return {"identity_id": "id001", "image": picture, "image_sha256": digest, "seed": 1, **changes}


def done(stage: FacesStage, row: dict[str, Any]) -> dict[str, Any]:
    (result,) = stage.process([row])
    assert isinstance(result, dict), result
    return result


def refused(stage: FacesStage, row: dict[str, Any]) -> RowError:
    (result,) = stage.process([row])
    assert isinstance(result, RowError), result
    return result


def test_importing_the_stage_loads_no_library() -> None:
    program = (
        "import sys, ipvg_ray.stages.faces\n"
        "print([m for m in ('torch', 'insightface', 'onnxruntime', 'cv2') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_the_row_is_the_schemas(stage: FacesStage, astronaut: Picture) -> None:
    result = done(stage, row_of(astronaut))
    assert tuple(result) == tuple(FacesStage.table().columns)
    pa.Table.from_pylist([result], schema=schema.table("faces").schema).validate(full=True)
    assert result["face_count"] == 1
    assert iou(np.array(result["face_box"]), ASTRONAUT) > 0.8
    assert result["target"] == {"female": "A woman", "male": "A man"}[result["gender"]]
    for name in ("embedding", "id_embedding"):
        assert np.linalg.norm(result[name]) == pytest.approx(1, abs=1e-5)
    assert np.dot(result["embedding"], result["id_embedding"]) < 0.9, "two packs, two embeddings"


def test_the_id_embedding_is_made_from_the_crop(stage: FacesStage, packs: Path, astronaut: Picture) -> None:
    # What the specification says, worked out here: centre of the landmarks' box moved up by 1/8 of the half edge,
    # which is 0.75 times the longer edge; the ArcFace crop is twice that.
    result = done(stage, row_of(astronaut))
    points = np.array(result["landmarks_106"]).reshape(106, 2)
    half = 0.75 * np.ptp(points, axis=0).max()
    centre = (points.min(0) + points.max(0)) / 2 - (0, half / 8)
    left, top = np.maximum(np.round(centre - 2 * half), 0).astype(int)
    right, bottom = np.minimum(np.round(centre + 2 * half), (512, 512)).astype(int)
    pack = FaceAnalyser(packs / "insightface/models/mini_antelopev2", det_sizes=(640,))
    (in_crop,) = pack.faces(astronaut[top:bottom, left:right])
    (in_whole,) = pack.faces(astronaut)
    assert np.allclose(result["id_embedding"], in_crop.normed_embedding, atol=1e-6)
    assert not np.allclose(result["id_embedding"], in_whole.normed_embedding, atol=1e-3)


def test_the_whole_picture_stands_in_where_the_crop_shows_no_face(
    stage: FacesStage, astronaut: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stage._id_analyser.faces
    monkeypatch.setattr(stage._id_analyser, "faces", lambda rgb: real(rgb) if rgb.shape == astronaut.shape else [])
    (whole,) = real(astronaut)
    assert np.allclose(done(stage, row_of(astronaut))["id_embedding"], whole.normed_embedding, atol=1e-6)
    monkeypatch.setattr(stage._id_analyser, "faces", lambda rgb: [])
    error = refused(stage, row_of(astronaut))
    assert error.kind == "no_face"
    assert "mini_antelopev2" in error.message


def test_a_bystanders_embedding_is_not_taken(
    stage: FacesStage, astronaut: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage._id_analyser, "faces", lambda rgb: [face(0, 0, 20)])
    assert refused(stage, row_of(astronaut)).kind == "no_face"


def test_a_cat_is_refused_and_its_neighbour_is_not(stage: FacesStage, astronaut: Picture) -> None:
    cat, person = stage.process([row_of(np.asarray(skimage.data.cat())), row_of(astronaut)])
    assert isinstance(cat, RowError)
    assert cat.kind == "no_face"
    assert "640, 512, 384, 256" in cat.message
    assert "det_threshold" in cat.message
    assert isinstance(person, dict)


def test_several_faces(packs: Path, stage: FacesStage, two_faces: Picture) -> None:
    largest = done(stage, row_of(two_faces))
    assert largest["face_count"] == 2
    assert largest["face_box"][0] > 300
    error = refused(make_stage(packs, choose="error"), row_of(two_faces))
    assert error.kind == "several_faces"


def test_unreadable_and_changed_pictures_keep_their_kind(stage: FacesStage, astronaut: Picture) -> None:
    garbage = b"no picture"
    broken = {"bytes": garbage, "path": None}
    assert refused(stage, row_of(astronaut, image=broken)).kind == "image_changed"
    digest = hashlib.sha256(garbage).hexdigest()
    assert refused(stage, row_of(astronaut, image=broken, image_sha256=digest)).kind == "broken_image"
    absent = {"bytes": None, "path": "/nowhere/at/all.png"}
    assert refused(stage, row_of(astronaut, image=absent)).kind == "missing_image"


def test_the_picture_is_turned_upright_first(stage: FacesStage, astronaut: Picture) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn to the left
    Image.fromarray(np.rot90(astronaut)).save(buffer, "PNG", exif=exif)
    data = buffer.getvalue()
    row = row_of(astronaut, image={"bytes": data, "path": None}, image_sha256=hashlib.sha256(data).hexdigest())
    assert done(stage, row) == done(stage, row_of(astronaut))


def test_rows_do_not_depend_on_their_batch(stage: FacesStage, astronaut: Picture, two_faces: Picture) -> None:
    rows = [row_of(astronaut), row_of(two_faces)]
    together = stage.process(rows)
    assert [done(stage, row) for row in reversed(rows)] == list(reversed(together))


def test_a_pack_without_gender_gives_a_person_and_one_without_landmarks_is_refused(
    packs: Path, tmp_path: Path, astronaut: Picture
) -> None:
    whole = packs / "insightface/models/mini_buffalo_l"
    for name in ("det_10g", "w600k_r50", "2d106det"):
        (tmp_path / f"{name}.onnx").write_bytes((whole / f"{name}.onnx").read_bytes())
    result = done(make_stage(packs, pack=str(tmp_path)), row_of(astronaut))
    assert (result["gender"], result["age"], result["target"]) == (None, None, "A person")
    (tmp_path / "2d106det.onnx").unlink()
    with pytest.raises(FileNotFoundError, match="landmark_2d_106"):
        make_stage(packs, pack=str(tmp_path))


def test_a_missing_pack_stops_the_worker(tmp_path: Path) -> None:
    stage = FacesStage(config.load("cpu-mini", values={"models": {"root": str(tmp_path)}}))
    assert set(stage.models()) == {"pack", "id_pack"}
    with pytest.raises(FileNotFoundError, match="mini_buffalo_l"):
        stage.setup(StageContext(device="cpu", threads=1, media=None, run_dir=""))  # type: ignore[arg-type]


@pytest.mark.shared
@pytest.mark.parametrize("identity", [f"id00{n}" for n in range(1, 6)])
def test_the_sample_identities_go_through(stage: FacesStage, shared: Path, identity: str) -> None:
    data = (shared / f"data/vip200k/raw/{identity}/image.png").read_bytes()
    picture = {"bytes": data, "path": None}
    result = done(
        stage, row_of(np.zeros((1, 1, 3), np.uint8), image=picture, image_sha256=hashlib.sha256(data).hexdigest())
    )
    x0, y0, x1, y1 = result["face_box"]
    height, width = images.decode(data).shape[:2]
    assert -0.05 * width < x0 < x1 < 1.05 * width
    assert -0.05 * height < y0 < y1 < 1.05 * height
    assert x1 - x0 > 0.4 * width
