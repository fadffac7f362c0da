"""Pictures per second of stage matting, read ahead and refined on threads, against the same stage given one picture at
a time, which decodes, runs the network and refines in turn. Results of both must be equal to the bit.

usage: python benchmarks/matting.py [--pictures 16] [--side 1024] [--network w18_small] [--input 473] [--repeat 3]
Prints medians and the ratio. The network has random weights; its cost is that of trained ones.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

from synthetic_people import draw

from ipvg_ray import config
from ipvg_ray.media import images
from ipvg_ray.models.hrnet import CONFIGS, HRNet
from ipvg_ray.models.mini.face_template import landmarks_106
from ipvg_ray.pipeline.stage import Row, StageContext
from ipvg_ray.stages.matting import MattingStage


def rows(pictures: int, side: int) -> list[Row]:
    """Drawn people as rows of stage faces' columns."""
    made = []
    for seed in range(pictures):
        person = draw(seed, "leaves", side)
        picture = images.encode(person.rgb, "jpeg")
        points = (landmarks_106() - 0.5) * side * 0.3 + (side * 0.5, side * 0.35)
        made.append(
            {
                "image": picture,
                "image_sha256": hashlib.sha256(picture["bytes"]).hexdigest(),
                "reference_numbers": [0],
                "reference_used": [True],
                "reference_boxes": [list(person.face_box)],
                "reference_landmarks": [points.ravel().tolist()],
            }
        )
    return made


def started(folder: Path, network: str, side: int, device: str) -> MattingStage:
    """The stage with a random network of that configuration."""
    torch.manual_seed(0)
    torch.save(HRNet(CONFIGS[network]).state_dict(), folder / "network.pth")
    section = {"model": "network.pth", "input_size": side}
    stage = MattingStage(config.load("gpu", values={"models": {"root": str(folder)}, "matting": section}))
    stage.setup(StageContext(device, 1, None, "unused"))  # type: ignore[arg-type]
    return stage


def seconds(work: object) -> float:
    begun = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--network", choices=sorted(CONFIGS), default="w18_small")
    parser.add_argument("--input", type=int, default=473)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stage = started(Path(folder), given.network, given.input, given.device)
        people = rows(given.pictures, given.side)
        together, alone = stage.process(people), [stage.process([row])[0] for row in people]
        if given.device == "cpu" and together != alone:
            sys.exit("the results differ")
        runs = np.array(
            [
                (seconds(lambda: stage.process(people)), seconds(lambda: [stage.process([row]) for row in people]))
                for _ in range(given.repeat)
            ]
        )
    ours, theirs = (given.pictures / statistics.median(column) for column in runs.T)
    print(f"one at a time {theirs:6.2f} pictures/s")
    print(f"stage         {ours:6.2f} pictures/s, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
