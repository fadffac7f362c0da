"""Seconds per video for all metrics from one decode, against each metric by itself with a decode of its own.

Prints a line a metric, the two sums and their ratio; medians over --repeat, the two taken in turn. On a CPU with
miniature models (the default) the networks cost little and the decode much; with real models on a GPU it also prints
videos per minute.

usage: python benchmarks/evaluate.py [--frames 81] [--width 832] [--height 480] [--repeat 3]
       python benchmarks/evaluate.py --profile gpu --models DIR --device cuda --accept-licence
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from ipvg_ray import config
from ipvg_ray.media import videos
from ipvg_ray.metrics.frames import Clip
from ipvg_ray.metrics.scorer import Scorer, Settings
from ipvg_ray.models.faces import FaceAnalyser
from ipvg_ray.models.mini import insightface_pack, metrics
from ipvg_ray.stages.evaluate import EvaluateStage

PROMPT = "a woman in an orange suit smiles and waves in front of a flag"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--profile", default="cpu-mini")
    parser.add_argument("--models", type=Path, help="folder of the models; miniatures are made if not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--accept-licence", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = options.models or Path(folder)
        if options.models is None:
            insightface_pack.make(root)
            metrics.make(root)
        _run(options, root)


def _run(options: argparse.Namespace, root: Path) -> None:
    values = {"models": {"root": str(root)}, "evaluate": {"accept_licence": options.accept_licence}}
    settings = config.load(options.profile, values=values)
    section = settings.evaluate
    stage = EvaluateStage(settings)
    names, skipped = stage.usable()
    for name, reason in skipped.items():
        print(f"left out: {name}: {reason}")
    modules = ("detection", "recognition")
    pack = stage.models()["pack"]
    analyser = FaceAnalyser(pack, det_sizes=(section.det_size,), modules=modules, device=options.device)
    how = Settings(
        section.frames,
        detector_side=section.detector_side,
        flow_iterations=section.flow_iterations,
        gme_tokens=section.gme_tokens,
        batch=section.batch,
    )
    every = Scorer(names, stage.paths(), analyser, device=options.device, settings=how)
    picture = _astronaut(options.height, options.width)
    data = videos.encode_mp4(np.stack([np.roll(picture, 2 * i, 1) for i in range(options.frames)]), 16, 18)
    found = every.face_on(picture)
    if found is None:
        raise SystemExit("the face detector finds no face on the benchmark's picture")
    embedding, crop = np.asarray(found.face.embedding), found.aligned()

    def clip() -> Clip:
        frames, fps = videos.read_video(data)
        return Clip(frames, fps or 16)

    def alone(name: str) -> Callable[[], object]:
        if name in every.on_video:
            return lambda: every.on_video[name](clip(), PROMPT)
        only = Scorer([name] if name != "arc_sim" else [], stage.paths(), analyser, settings=how, device=options.device)
        return lambda: only.score(clip(), PROMPT, embedding, crop)

    jobs = {"decode alone": clip, "all together": lambda: every.score(clip(), PROMPT, embedding, crop)}
    single = {name: alone(name) for name in ("arc_sim", *(name for name in names if name != "overall"))}
    times: dict[str, list[float]] = {name: [] for name in (*jobs, *single)}
    for job in (*jobs.values(), *single.values()):
        job()  # libraries set themselves up at the first call
    for _ in range(options.repeat):
        for name, job in (jobs | single).items():
            started = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - started)
    seconds = {name: median(values) for name, values in times.items()}
    for name, value in seconds.items():
        print(f"{name:24} {value:8.2f} s")
    one_by_one, together = sum(seconds[name] for name in single), seconds["all together"]
    print(f"{'one by one':24} {one_by_one:8.2f} s")
    print(f"one by one / together    {one_by_one / together:8.2f}   (bar: 1.5)")
    print(f"videos per minute        {60 / together:8.1f}   at {options.frames}x{options.height}x{options.width}")


def _astronaut(height: int, width: int) -> np.ndarray:
    """scikit-image's astronaut, her face in the middle."""
    from PIL import Image
    from skimage import data

    picture = Image.fromarray(data.astronaut()[:300, :512])
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


if __name__ == "__main__":
    main()
