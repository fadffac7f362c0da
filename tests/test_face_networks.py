"""Several pictures and faces at once give what insightface gives one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from face_pictures import Picture, astronaut, sample_picture, two_faces

from ipvg_ray.models import face_networks
from ipvg_ray.models.face_networks import Detector
from ipvg_ray.models.faces import Face, FaceAnalyser
from ipvg_ray.models.mini.onnx_graph import Graph

STRIDES = (8, 16, 32)


@pytest.fixture(scope="module")
def pack(packs: Path) -> Path:
    return packs / "insightface/models/mini_buffalo_l"


@pytest.fixture(scope="module")
def theirs(pack: Path) -> Any:
    """insightface itself."""
    from insightface.app import FaceAnalysis

    app = FaceAnalysis(name=str(pack), providers=["CPUExecutionProvider"], static_shape_sessions=False)
    app.prepare(ctx_id=0, det_size=(640, 640))
    return app


def assert_same(ours: list[Face], expected: list[Any]) -> None:
    assert len(ours) == len(expected)
    for our, their in zip(ours, expected, strict=True):
        assert np.array_equal(our.box, their.bbox)
        assert our.score == their.det_score
        assert np.array_equal(our.landmarks_5, their.kps)
        assert np.array_equal(our.embedding, their.embedding)
        assert np.allclose(our.landmarks_106, their.landmark_2d_106, atol=1e-4)
        assert (our.gender, our.age) == ("male" if their.gender == 1 else "female", their.age)
        assert 0.5 <= our.gender_probability <= 1


@pytest.mark.parametrize("picture", [astronaut, two_faces, lambda: sample_picture("t1")])
def test_one_at_a_time_equals_insightface(pack: Path, theirs: Any, picture: Any) -> None:
    rgb = picture()
    expected = theirs.get(np.ascontiguousarray(rgb[:, :, ::-1]))
    assert expected
    assert_same(FaceAnalyser(pack, det_sizes=(640,)).faces(rgb), expected)


def test_a_batch_equals_one_at_a_time_but_for_the_last_bits(pack: Path) -> None:
    alone, together = FaceAnalyser(pack, det_sizes=(640,)), FaceAnalyser(pack, det_sizes=(640,), batch=3)
    pictures = [astronaut(), two_faces(), np.zeros((64, 64, 3), np.uint8), sample_picture("t1")]
    found = together.detect(pictures)
    assert [len(faces) for faces in found] == [1, 2, 0, len(alone.detect([pictures[3]])[0])]
    described = together.describe([(rgb, f) for rgb, faces in zip(pictures, found, strict=True) for f in faces])
    expected = [f for rgb in pictures for f in alone.faces(rgb)]
    assert len(described) == len(expected) > 4
    for ours, one in zip(described, expected, strict=True):
        assert np.allclose(ours.embedding, one.embedding, atol=1e-3 * np.abs(one.embedding).max())
        assert np.allclose(ours.landmarks_106, one.landmarks_106, atol=1e-2)
        assert ours.gender == one.gender
        assert ours.gender_probability == pytest.approx(one.gender_probability, abs=1e-4)


def test_faces_of_several_pictures_share_a_call(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    analyser = FaceAnalyser(pack, det_sizes=(640,), batch=2)
    sizes: list[int] = []
    real = face_networks.embeddings

    def watched(model: Any, pictures: list[Picture], points: list[np.ndarray]) -> np.ndarray:
        sizes.append(len(pictures))
        return real(model, pictures, points)

    monkeypatch.setattr("ipvg_ray.models.faces.embeddings", watched)
    (found,) = analyser.detect([astronaut()])
    analyser.describe([(astronaut(), found[0])] * 5)
    assert sizes == [2, 2, 1]
    assert analyser.describe([]) == []


# --- a detector whose file lets its batch grow ------------------------------------------------------------------------


def write_random_detector(path: Path) -> None:
    """SCRFD's outputs with a batch axis, from random convolutions: scores (n, k, 1), boxes (n, k, 4), points."""
    rng = np.random.default_rng(3)
    g = Graph()
    shape = g.op("Shape", "input.1", end=1)
    outputs: dict[str, Any] = {}
    for width, name in ((1, "score"), (4, "box"), (10, "points")):
        for stride in STRIDES:
            pooled = g.op("AveragePool", "input.1", kernel_shape=[stride] * 2, strides=[stride] * 2)
            kernel = rng.standard_normal((2 * width, 3, 3, 3)).astype(np.float32)
            value = g.op("Conv", pooled, kernel, pads=[1, 1, 1, 1])
            value = g.op("Sigmoid", value) if name == "score" else g.op("Abs", value)
            last = g.op("Transpose", value, perm=[0, 2, 3, 1])
            rows = g.op("Reshape", last, g.op("Concat", shape, np.array([-1, width]), axis=0))
            outputs[f"{name}_{stride}"] = (rows, ["n", f"k{stride}", width])
    g.save(path, {"input.1": ["n", 3, "height", "width"]}, outputs)


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from insightface.model_zoo import model_zoo

    file = tmp_path_factory.mktemp("detector") / "det.onnx"
    write_random_detector(file)
    model = model_zoo.get_model(str(file), providers=["CPUExecutionProvider"], static_shape_sessions=False)
    model.prepare(0, input_size=(128, 128), det_thresh=0.5)
    return model


def test_a_growing_detector_takes_all_pictures_at_once(growing: Any) -> None:
    rng = np.random.default_rng(0)
    pictures = [astronaut()[:300], cv2.resize(two_faces(), (90, 200)), rng.integers(0, 256, (128, 128, 3), np.uint8)]
    detector = Detector(growing, batch=4)
    assert detector.batch == 4
    calls: list[int] = []
    run = growing.session.run

    class Watched:
        def run(self, names: Any, inputs: dict[str, np.ndarray]) -> Any:
            calls.append(len(inputs["input.1"]))
            return run(names, inputs)

    growing.session, kept = Watched(), growing.session
    try:
        together = detector.detect(pictures, 128)
    finally:
        growing.session = kept
    assert calls == [3]
    for picture, (boxes, points) in zip(pictures, together, strict=True):
        expected_boxes, expected_points = growing.detect(picture, input_size=(128, 128))
        assert len(expected_boxes) > 3
        assert np.allclose(boxes, expected_boxes, atol=1e-3)
        assert np.allclose(points, expected_points, atol=1e-3)


def test_a_detector_of_fixed_batch_goes_one_by_one(pack: Path) -> None:
    assert FaceAnalyser(pack, det_sizes=(640,), batch=8)._detector.batch == 1
