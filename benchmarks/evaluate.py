"""Seconds per video for all metrics from one decode, against each metric by itself with a decode of its own; and for
videos scored in batches, the next ones decoded meanwhile, against one video after the other.

Prints a line a metric, the sums and their ratios; medians over --repeat, all taken in turn. On a CPU with miniature
models (the default) the networks cost little and the decode much, and batches gain little: what they save is the GPU's
waiting for small pieces of work. With real models on a GPU it also prints videos per minute.

usage: python benchmarks/evaluate.py [--frames 81] [--width 832] [--height 480] [--repeat 3] [--videos 8] [--together 4]
       python benchmarks/evaluate.py --profile gpu --models DIR --device cuda --accept-licence
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ipvg_ray import config
from ipvg_ray.media import images, videos
from ipvg_ray.metrics.frames import Clip
from ipvg_ray.metrics.metric import Sampled
from ipvg_ray.metrics.scorer import Scorer, Settings, Video
from ipvg_ray.models.faces import FaceAnalyser
from ipvg_ray.models.mini import insightface_pack, metrics
from ipvg_ray.pipeline.stage import RowError, StageContext
from ipvg_ray.stages.evaluate import EvaluateStage

ONE_AFTER_THE_OTHER, IN_BATCHES = "videos one by one", "videos in batches"
PROMPT = "a woman in an orange suit smiles and waves in front of a flag"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--videos", type=int, default=8, help="for the comparison of batches; 0 leaves it out")
    parser.add_argument("--together", type=int, default=4, help="videos in a batch")
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
    data = _video(picture, options.frames, 2)
    found = every.face_on(picture)
    if found is None:
        raise SystemExit("the face detector finds no face on the benchmark's picture")
    embedding, crop = np.asarray(found.face.embedding), found.aligned()

    def clip() -> Clip:
        frames, fps = videos.read_video(data)
        return Clip(frames, fps or 16)

    def alone(name: str) -> Callable[[], object]:
        if name in every.on_video:
            metric = every.on_video[name]
            return lambda: metric.score([Sampled(clip().take(metric.rule), PROMPT)])
        only = Scorer([name] if name != "arc_sim" else [], stage.paths(), analyser, settings=how, device=options.device)
        return lambda: only.score([Video(clip(), PROMPT, embedding, crop)])

    jobs: dict[str, Callable[[], object]] = {
        "decode alone": clip,
        "all together": lambda: every.score([Video(clip(), PROMPT, embedding, crop)]),
    }
    if options.videos:
        jobs |= _batched(options, stage, picture, embedding, root / "run")
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
    if options.videos:
        single_file, batched = (seconds[name] / options.videos for name in (ONE_AFTER_THE_OTHER, IN_BATCHES))
        print(f"a video, one after other {single_file:8.2f} s")
        print(f"a video, in batches      {batched:8.2f} s")
        print(f"one after other / in batches of {options.together} {single_file / batched:8.2f}")
        together = min(together, batched)
    print(f"videos per minute        {60 / together:8.1f}   at {options.frames}x{options.height}x{options.width}")


def _batched(
    options: argparse.Namespace, stage: EvaluateStage, picture: np.ndarray, embedding: np.ndarray, run: Path
) -> dict[str, Callable[[], object]]:
    """The stage's own work on several videos, one by one, and in batches from two threads as the engine calls it."""
    reference = images.encode(picture)
    given = {"image": reference, "image_sha256": hashlib.sha256(reference["bytes"]).hexdigest(), "face_box": None}
    rows = []
    (run / "videos").mkdir(parents=True)
    for number in range(options.videos):
        (run / f"videos/{number}.mp4").write_bytes(_video(picture, options.frames, 1 + number))
        row = {"video_uri": f"videos/{number}.mp4", "prompt": f"{PROMPT}, take {number}", "embedding": embedding}
        rows.append(given | row)
    stage.setup(StageContext(options.device, 1, None, str(run)))  # type: ignore[arg-type] # it publishes nothing

    def checked(results: Any) -> None:
        if failed := [result for result in results if isinstance(result, RowError)]:
            raise SystemExit(f"a video fails: {failed[0]}")

    def one_after_the_other() -> None:
        for row in rows:
            checked(stage.process([row]))

    def in_batches() -> None:
        parts = [rows[start : start + options.together] for start in range(0, len(rows), options.together)]
        with ThreadPoolExecutor(2) as threads:
            for results in threads.map(stage.process, parts):
                checked(results)

    return {ONE_AFTER_THE_OTHER: one_after_the_other, IN_BATCHES: in_batches}


def _video(picture: np.ndarray, frames: int, step: int) -> bytes:
    """The picture, moving to the right by so many pixels a frame."""
    return videos.encode_mp4(np.stack([np.roll(picture, step * i, 1) for i in range(frames)]), 16, 18)


def _astronaut(height: int, width: int) -> np.ndarray:
    """scikit-image's astronaut, her face in the middle."""
    from PIL import Image
    from skimage import data

    picture = Image.fromarray(data.astronaut()[:300, :512])
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


if __name__ == "__main__":
    main()
