"""Two miniature insightface packs with the real packs' file names, inputs and outputs.

insightface's own loader takes them for the real ones. The detector truly finds faces (`face_detector`); landmarks are
an average face's, moved a little by the picture; gender, age and embedding come from random convolutions: they mean
nothing, but they differ between faces and are the same for the same face. As in the real packs, both detectors are
one file under two names.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ipvg_ray.models.mini.face_detector import write_detector
from ipvg_ray.models.mini.face_template import landmarks_106
from ipvg_ray.models.mini.lbp_cascade import read_cascade
from ipvg_ray.models.mini.onnx_graph import Graph

PACKS = {
    "mini_buffalo_l": {"detection": "det_10g", "recognition": "w600k_r50", "embedding": "683"},
    "mini_antelopev2": {"detection": "scrfd_10g_bnkps", "recognition": "glintr100", "embedding": "1333"},
}
"""Name of each pack to the names of its files and of the recognition model's output."""

CROP = 1.5
"""insightface cuts landmarks' and gender's inputs this much larger than the face's box."""


def make(root: Path, seed: int = 0) -> None:
    """Write both packs below `<root>/insightface/models/`.

    Args:
        root: the folder of all models.
        seed: of the random weights; equal seeds give equal bytes.
    """
    from skimage.data import lbp_frontal_face_cascade_filename

    cascade = read_cascade(Path(lbp_frontal_face_cascade_filename()))
    detector = b""
    for number, (name, names) in enumerate(PACKS.items()):
        folder = Path(root) / "insightface" / "models" / name
        file = folder / f"{names['detection']}.onnx"
        if detector:
            folder.mkdir(parents=True, exist_ok=True)
            file.write_bytes(detector)
        else:
            write_detector(file, cascade)
            detector = file.read_bytes()
        weights = [np.random.default_rng([seed, number, model]) for model in range(3)]
        _write_recognition(folder / f"{names['recognition']}.onnx", names["embedding"], weights[0])
        _write_landmarks(folder / "2d106det.onnx", weights[1])
        _write_genderage(folder / "genderage.onnx", weights[2])


def _write_recognition(path: Path, output: str, rng: np.random.Generator) -> None:
    """(n, 3, 112, 112), RGB in [-1, 1], to (n, 512) of a length around 20, as ArcFace's are."""
    g = Graph()
    features = _trunk(g, "input.1", 112, 4, 512, rng)
    g.save(path, {"input.1": ["n", 3, 112, 112]}, {output: (features, ["n", 512])})


def _write_landmarks(path: Path, rng: np.random.Generator) -> None:
    """(n, 3, 192, 192), RGB in [0, 255], to (n, 212): x, y pairs in [-1, 1] from edge to edge of the crop."""
    g = Graph()
    template = ((landmarks_106() - 0.5) * 2 / CROP).reshape(1, 212)
    moves = g.op("Tanh", _trunk(g, _from_bytes(g), 192, 8, 212, rng))
    landmarks = g.op("Add", g.op("Mul", moves, 0.008), template)
    g.save(path, {"data": ["n", 3, 192, 192]}, {"fc1": (landmarks, ["n", 212])})


def _write_genderage(path: Path, rng: np.random.Generator) -> None:
    """(n, 3, 96, 96), RGB in [0, 255], to (n, 3): how female, how male, age in centuries between 0.18 and 0.58."""
    g = Graph()
    values = g.op("Tanh", _trunk(g, _from_bytes(g), 96, 4, 3, rng))
    scale, shift = np.array([[1, 1, 0.2]], np.float32), np.array([[0, 0, 0.38]], np.float32)
    g.save(path, {"data": ["n", 3, 96, 96]}, {"fc1": (g.op("Add", g.op("Mul", values, scale), shift), ["n", 3])})


def _from_bytes(g: Graph) -> str:
    """The input `data`, 0 to 255, brought to [-1, 1] by a node of the name by which insightface knows such models."""
    one, none, half = np.ones(3, np.float32), np.zeros(3, np.float32), np.full(3, 127.5, np.float32)
    return g.op("BatchNormalization", "data", one, none, half, half**2, name="bn_data", epsilon=0.0)


def _trunk(g: Graph, picture: str, side: int, shrink: int, width: int, rng: np.random.Generator) -> str:
    """(n, width) of about unit variance from a picture (n, 3, side, side): blurred, then two random convolutions.

    The norm after each convolution takes away what all pictures share, without which all outputs would be alike.
    """
    value, channels = g.op("AveragePool", picture, kernel_shape=[shrink] * 2, strides=[shrink] * 2), 3
    for wider in (12, 16):
        kernel = rng.standard_normal((wider, channels, 3, 3)).astype(np.float32) / np.float32(np.sqrt(9 * channels))
        value = g.op("Conv", value, kernel, strides=[2, 2], pads=[1, 1, 1, 1])
        value = g.op("InstanceNormalization", value, np.ones(wider, np.float32), np.zeros(wider, np.float32))
        value, channels = g.op("LeakyRelu", value, alpha=0.2), wider
    features = channels * (side // shrink // 4) ** 2
    matrix = rng.standard_normal((features, width)).astype(np.float32) / np.float32(np.sqrt(0.52 * features))
    return g.op("MatMul", g.op("Flatten", value), matrix)
