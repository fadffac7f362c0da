"""Pictures per second of the faces stage beside a plain loop over insightface's FaceAnalysis, at equal results.

Both read the same encoded pictures with the same two packs on the same cores: all of them, as onnxruntime takes them
where nobody says otherwise (the loop), and as threads of the stage. The loop is what one writes first: decode, `get`
with the evaluation pack, take the largest face, cut HyperLoRA's crop, `get` with HyperLoRA's pack, each pack with only
the models that are needed. The results of each run are compared; their boxes and embeddings may differ by 1e-3.

The packs are the miniatures, whose other models cost nothing beside their detector. With --real-sizes their networks
are replaced by random ones that cost what the published ones do: a detector of SCRFD-10G's 13 billion multiplications
for 640 × 640 pixels that answers with the place of the portraits' face, and recognition of the sizes of IResNet-50 and
IResNet-100.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
from PIL import Image

from ipvg_ray import config
from ipvg_ray.media import images
from ipvg_ray.models.matting import landmark_box
from ipvg_ray.models.mini import insightface_pack
from ipvg_ray.models.mini.face_detector import KEYPOINTS
from ipvg_ray.models.mini.onnx_graph import Graph
from ipvg_ray.pipeline.stage import StageContext
from ipvg_ray.stages.faces import FacesStage

PACK, ID_PACK = "insightface/models/mini_buffalo_l", "insightface/models/mini_antelopev2"
BLOCKS = {50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}
"""Blocks of IResNet-50 and -100 at each of the four widths."""
FACE = (184.0, 165.0, 466.0, 447.0)
"""Where the portraits' face is once they are fitted into 640 × 640 pixels."""


def main() -> None:
    arguments = _arguments()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        insightface_pack.make(root)
        if arguments.real_sizes:
            write_real_sizes(root)
        for kind in ["portraits"] if arguments.real_sizes else arguments.kinds:
            data = pictures(kind, arguments.pictures)
            ways: dict[str, Callable[[], list[tuple[Any, ...]]]] = {
                "plain loop": PlainLoop(root, data).run,
                f"stage, {cores} threads": StagePath(root, data, cores).run,
            }
            report(kind, ways, len(data), arguments.repeats)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--real-sizes", action="store_true", help="networks as costly as the published")
    parser.add_argument("--kinds", nargs="+", choices=("portraits", "scenes"), default=["portraits", "scenes"])
    return parser.parse_args()


def report(kind: str, ways: dict[str, Callable[[], list[tuple[Any, ...]]]], count: int, repeats: int) -> None:
    """Run the ways in turn, check that they agree, print the medians and ratios."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    expected: list[tuple[Any, ...]] | None = None
    for _ in range(repeats + 1):
        for name, run in ways.items():
            started = time.perf_counter()
            results = run()
            seconds[name].append(time.perf_counter() - started)
            expected = expected or results
            check_equal(name, results, expected)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first warms up
    base = medians["plain loop"]
    print(f"{count} {kind}, median of {repeats}; results equal")
    for name, median in medians.items():
        print(f"  {name:<18} {count / median:6.2f} pictures/s, {base / median:.2f} x the plain loop", flush=True)


def check_equal(name: str, results: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> None:
    for number, (ours, theirs) in enumerate(zip(results, expected, strict=True)):
        for field, mine, other in zip(("count", "box", "embedding", "id embedding"), ours, theirs, strict=True):
            if not np.allclose(mine, other, atol=1e-3):
                sys.exit(f"{name}: the {field} of picture {number} is not the plain loop's")


class PlainLoop:
    """insightface, one picture at a time."""

    def __init__(self, root: Path, data: list[bytes]) -> None:
        from insightface.app import FaceAnalysis

        self.data = data
        self.apps = []
        for pack, modules in ((PACK, None), (ID_PACK, ["detection", "recognition"])):
            app = FaceAnalysis(
                name=str(root / pack),
                allowed_modules=modules,
                providers=["CPUExecutionProvider"],
                static_shape_sessions=False,
            )
            app.prepare(ctx_id=0, det_size=(640, 640))
            self.apps.append(app)

    def run(self) -> list[tuple[Any, ...]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return [self._one(data) for data in self.data]

    def _one(self, data: bytes) -> tuple[Any, ...]:
        rgb = images.decode(data)
        found = self.apps[0].get(np.ascontiguousarray(rgb[:, :, ::-1]))
        face = max(found, key=lambda f: (f.bbox[2] - f.bbox[0]) * (f.bbox[3] - f.bbox[1]))
        x, y, half = landmark_box(face.landmark_2d_106)
        corners = np.round([x - 2 * half, y - 2 * half, x + 2 * half, y + 2 * half]).astype(int)
        height, width = rgb.shape[:2]
        left, top, right, bottom = np.clip(corners, 0, [width, height, width, height])
        inside = self.apps[1].get(np.ascontiguousarray(rgb[top:bottom, left:right, ::-1]))
        middle = (face.bbox[:2] + face.bbox[2:]) / 2 - (left, top)
        same = min(inside, key=lambda f: float(np.linalg.norm((f.bbox[:2] + f.bbox[2:]) / 2 - middle)))
        return len(found), face.bbox, face.normed_embedding, same.normed_embedding


class StagePath:
    """The faces stage as a worker with so many threads runs it."""

    def __init__(self, root: Path, data: list[bytes], threads: int) -> None:
        values = {
            "models": {"root": str(root)},
            "faces": {"det_sizes": [640], "pool": {"batch_size": len(data), "threads": threads}},
        }
        self.stage = FacesStage(config.load("cpu-mini", values=values))
        self.stage.setup(StageContext(device="cpu", threads=threads, media=None, run_dir=""))  # type: ignore[arg-type]
        self.rows = [
            {
                "identity_id": f"id{number}",
                "image": {"bytes": one, "path": None},
                "image_sha256": hashlib.sha256(one).hexdigest(),
                "more_images": [],
                "more_images_sha256": [],
                "seed": number,
            }
            for number, one in enumerate(data)
        ]

    def run(self) -> list[tuple[Any, ...]]:
        results = []
        for row in self.stage.process(self.rows):
            if isinstance(row, Exception):
                raise row
            results.append((row["face_count"], row["face_box"], row["embedding"], row["id_embedding"]))
        return results


def pictures(kind: str, count: int) -> list[bytes]:
    """Encoded pictures, PNG and JPEG in turn.

    Portraits are a head that fills about half the width, as VIP-200K's pictures are; scenes are a person further away
    and a group of six.
    """
    from insightface.data import get_image

    astronaut = Image.fromarray(skimage.data.astronaut())
    people = Image.fromarray(np.ascontiguousarray(get_image("t1")[:, :, ::-1]))
    made = []
    for number in range(count):
        if kind == "portraits":
            image = astronaut.crop((110, 10, 330, 230)).resize((360 + 60 * (number % 5),) * 2)
        else:
            image = people if number % 2 else astronaut
        buffer = io.BytesIO()
        image.save(buffer, "PNG" if number % 2 else "JPEG")
        made.append(buffer.getvalue())
    return made


def write_real_sizes(root: Path) -> None:
    """Replace the packs' detectors and recognition networks by random ones of the published ones' cost."""
    write_recognition(root / PACK / "w600k_r50.onnx", BLOCKS[50])
    write_recognition(root / ID_PACK / "glintr100.onnx", BLOCKS[100])
    write_detector(root / PACK / "det_10g.onnx")
    (root / ID_PACK / "scrfd_10g_bnkps.onnx").write_bytes((root / PACK / "det_10g.onnx").read_bytes())


class Network(Graph):
    """A graph of random convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(5)

    def conv(self, value: str, inputs: int, outputs: int, stride: int = 1, size: int = 3) -> str:
        kernel = self.rng.standard_normal((outputs, inputs, size, size)).astype(np.float32)
        kernel *= np.float32((inputs * size * size) ** -0.5)
        return self.op("Conv", value, kernel, strides=[stride] * 2, pads=[size // 2] * 4)

    def relu(self, value: str) -> str:
        return self.op("LeakyRelu", value, alpha=0.2)


def write_recognition(path: Path, blocks: tuple[int, ...]) -> None:
    """A residual network for 112 × 112 inputs, under the output's name that the file has."""
    g = Network()
    value, channels = g.relu(g.conv("input.1", 3, 64)), 64
    for width, count in zip((64, 128, 256, 512), blocks, strict=True):
        for block in range(count):
            stride = 2 if block == 0 else 1
            inner = g.op("Mul", g.conv(g.relu(g.conv(value, channels, width)), width, width, stride), 0.3)
            value = g.op("Add", inner, g.conv(value, channels, width, stride, 1) if block == 0 else value)
            channels = width
    matrix = g.rng.standard_normal((channels * 49, 512)).astype(np.float32) * np.float32((channels * 49) ** -0.5)
    (name,) = outputs_of(path)
    g.save(path, {"input.1": ["n", 3, 112, 112]}, {name: (g.op("MatMul", g.op("Flatten", value), matrix), ["n", 512])})


def write_detector(path: Path) -> None:
    """A network of SCRFD-10G's cost that always finds the same face, under the outputs' names that the file has."""
    g = Network()
    value = g.relu(g.conv(g.relu(g.conv("input.1", 3, 32, 2)), 32, 64, 2))
    for width, count in ((64, 4), (128, 5), (256, 5)):
        if width > 64:
            value = g.relu(g.conv(value, width // 2, width, 2))
        for _ in range(count):
            value = g.relu(g.conv(value, width, width))
    nothing = g.op("Mul", g.op("ReduceMean", value, keepdims=0), 1e-30)  # keeps the network from being cut away
    x0, y0, x1, y1 = FACE
    keypoints = (KEYPOINTS * (x1 - x0, y1 - y0) + (x0, y0) - 320).ravel()
    answers = {1: [1.0], 4: [320 - x0, 320 - y0, x1 - 320, y1 - 320], 10: keypoints}
    outputs = {}
    for place, name in enumerate(outputs_of(path)):
        stride, (width, answer) = (8, 16, 32)[place % 3], list(answers.items())[place // 3]
        rows = np.zeros((2 * (640 // stride) ** 2, width), np.float32)
        if stride == 32:
            rows[2 * (10 * 20 + 10)] = np.array(answer, np.float32) / (1 if width == 1 else stride)
        outputs[name] = (g.op("Add", nothing, rows), list(rows.shape))
    g.save(path, {"input.1": [1, 3, "height", "width"]}, outputs)


def outputs_of(path: Path) -> list[str]:
    """Names of an ONNX file's outputs."""
    import onnx

    return [output.name for output in onnx.load(str(path), load_external_data=False).graph.output]


if __name__ == "__main__":
    main()
