"""What a group costs beside the bare call: the hand-off of a video to a rank and back, on the miniature.

One rank, so that nothing is split: what is more is the hand-off alone. The bare call is the same maker of videos in
this process; both in turn, `--repeat` times, medians. Then the hand-off of full-size frames without any model, the time
to start a group of two, and from a rank's kill to the next attempt's first sign of life: without processes in reserve,
with them, and with them where the next kill comes before the reserve has imported its libraries.

usage: python benchmarks/groups.py [--repeat 7] [--kills 5] [--steps 4]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Ray starts workers with less right to the cores than this process has.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's own spelling

import numpy as np
import ray
import torch

from ipvg_ray import config
from ipvg_ray.models.mini import wan_vace
from ipvg_ray.models.rendezvous import TorchRendezvous
from ipvg_ray.models.wan.load import import_ahead
from ipvg_ray.models.wan.maker import VideoMaker, VideoRank
from ipvg_ray.models.wan.tasks import Pictures
from ipvg_ray.models.wan.video import Sample
from ipvg_ray.pipeline.execute import connect
from ipvg_ray.pipeline.groups import LedGroup
from ipvg_ray.pipeline.stage import RankContext, Ranks

FULL = (81, 480, 832, 3)


class Rank(VideoRank):
    """The stage's rank, which can also hand back frames that cost nothing, and work without a model until killed."""

    def __init__(self, section: Any, folder: Path, signs: Path, context: RankContext) -> None:
        super().__init__(section, folder, context)
        self.context, self.signs = context, signs
        self.blank = np.zeros(FULL, np.uint8)

    def frames(self, picture: bytes) -> np.ndarray:
        return self.blank

    def work(self, steps: int) -> int:
        """Says when and in which process it began."""
        with (self.signs / "signs").open("a") as signs:
            signs.write(f"{time.time()} {os.getpid()} {self.context.rank}\n")
        for _ in range(steps):
            torch.distributed.all_reduce(torch.zeros(1))
            time.sleep(0.02)
        return steps


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def sample() -> tuple[list[Sample], torch.Tensor]:
    picture = np.random.default_rng(0).integers(0, 255, (96, 176, 3), np.uint8)
    return [Sample(Pictures(first=picture), torch.randn(40, 32), 1)], torch.randn(60, 32)


def hand_off(section: Any, folder: Path, signs: Path, repeat: int) -> None:
    make = functools.partial(Rank, section, folder, signs)
    group = LedGroup(Ranks(1, make, rendezvous=TorchRendezvous()), "cpu", 1)
    print(f"start of a group of 1: {seconds(group.start):.1f} s")
    bare, work = VideoMaker(section, folder, "cpu"), sample()
    bare.make(*work)
    group.run("make", *work, None)
    ours, alone = [], []
    for _ in range(repeat):
        alone.append(seconds(lambda: bare.make(*work)))
        ours.append(seconds(lambda: group.run("make", *work, None)))
    base, led = statistics.median(alone), statistics.median(ours)
    print(f"video of the miniature: bare call {base:.2f} s, through a group {led:.2f} s, ratio {led / base:.3f}")
    picture, blank = os.urandom(1_500_000), np.zeros(FULL, np.uint8)
    group.run("frames", picture)
    led = statistics.median(seconds(lambda: group.run("frames", picture)) for _ in range(3 * repeat))
    base = statistics.median(seconds(blank.copy) for _ in range(3 * repeat))
    print(
        f"1.5 MB in, {blank.nbytes / 1e6:.0f} MB of frames out: {led * 1e3:.0f} ms, copying them {base * 1e3:.0f} ms, "
        f"ratio {led / base:.1f}; of a video of one minute {led / 60:.2%}"
    )
    group.close()


def rebuilds(section: Any, folder: Path, signs: Path, kills: int) -> None:
    make = functools.partial(Rank, section, folder, signs)
    asked = Ranks(2, make, rebuilds=kills, rendezvous=TorchRendezvous(), warm=import_ahead)
    bare = dataclasses.replace(asked, warm=None)
    start, base = _waits(bare, signs, kills, ready=False)
    print(f"start of a group of 2: {start:.1f} s; from a kill to the next attempt, without reserve: {_words(base)}")
    for words, ready in (("reserve ready", True), ("kill upon kill", False)):
        _, waits = _waits(asked, signs, kills, ready)
        print(f"  {words}: {_words(waits)}, ratio {statistics.median(waits) / statistics.median(base):.2f}")


def _waits(asked: Ranks, signs: Path, kills: int, ready: bool) -> tuple[float, list[float]]:
    """Seconds to start a group, and from each kill to the next attempt; `ready`: the reserve has imported by then."""
    group = LedGroup(asked, "cpu", 1)
    start = seconds(group.start)
    waits = []
    for _ in range(kills):
        if ready and group.reserve is not None:
            ray.get([rank.take_on.remote(asked, None) for rank in group.reserve.ranks])
        running = threading.Thread(target=group.run, args=("work", 100))
        before = len(told(signs))
        running.start()
        while len(told(signs)) < before + 2:
            time.sleep(0.02)
        os.kill(int(told(signs)[-1][1]), signal.SIGKILL)
        killed = time.time()
        running.join()
        waits.append(min(float(sign[0]) for sign in told(signs) if float(sign[0]) > killed) - killed)
    group.close()
    return start, waits


def _words(waits: list[float]) -> str:
    return f"median {statistics.median(waits):.1f} s, worst of {len(waits)} {max(waits):.1f} s"


def told(signs: Path) -> list[list[str]]:
    path = signs / "signs"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    connect()
    with tempfile.TemporaryDirectory() as folder:
        wan_vace.make(Path(folder))
        values = {"models": {"root": folder}, "video": {"steps": options.steps}}
        settings = config.load("cpu-mini", values=values)
        alone, model = settings.video, Path(folder) / wan_vace.NAME
        hand_off(alone, model, Path(folder), options.repeat)
        values["video"]["group"] = {"gpus": 2, "ulysses": 2}  # type: ignore[index]
        pair = config.load("cpu-mini", values=values).video
        rebuilds(pair, model, Path(folder), options.kills)
    ray.shutdown()


if __name__ == "__main__":
    main()
