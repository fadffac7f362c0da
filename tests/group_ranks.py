"""Ranks without models for the tests of groups: they add numbers together, step by step, and fail where a file asks."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import ray

from ipvg_ray.models.rendezvous import TorchRendezvous
from ipvg_ray.pipeline.groups import LedGroup
from ipvg_ray.pipeline.places import Room, claimed
from ipvg_ray.pipeline.stage import RankContext, Ranks


class Adder:
    """Writes down who it is and where it stands, into `folder`."""

    def __init__(self, folder: Path, context: RankContext) -> None:
        self.folder = folder
        self.context = context
        self.note("made")

    def note(self, event: str, **values: Any) -> None:
        line = {"t": time.time(), "rank": self.context.rank, "pid": os.getpid(), "event": event, **values}
        with (self.folder / "journal").open("a") as journal:
            journal.write(json.dumps(line) + "\n")

    def add(self, seed: int, steps: int, pause: float = 0.0) -> float:
        """Every step adds up random numbers of all ranks; a step that lacks one of them gives another total."""
        import torch
        import torch.distributed as dist

        generator = torch.Generator().manual_seed(seed + self.context.rank)
        total = 0.0
        for step in range(steps):
            self.context.alive(f"step {step}")
            self.note("step", step=step)
            time.sleep(pause)
            self.fail_as_asked(step)
            share = torch.rand((), generator=generator)
            dist.all_reduce(share)
            total += share.item() * (step + 1)
        return total

    def fail_as_asked(self, step: int) -> None:
        asked = self.folder / f"fail-{self.context.rank}-{step}"
        if not asked.exists():
            return
        how = asked.read_text()
        if not how.startswith("always "):
            asked.unlink()
        self.note("fail")
        match how.removeprefix("always "):
            case "exit":
                os._exit(1)
            case "raise":
                raise RuntimeError("out of memory, it pretends")
            case "hang":
                time.sleep(3600)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)

    def refuse(self, words: str) -> None:
        raise ValueError(words)

    def size(self, payload: bytes) -> int:
        return len(payload)


def import_torch() -> None:
    import torch.distributed  # noqa: F401


def asking(make: Any, size: int = 2, **asked: Any) -> Ranks:
    """Ranks that add together, with as many in reserve."""
    return Ranks(size, make, **{"rendezvous": TorchRendezvous(), "warm": import_torch, **asked})


@ray.remote(num_cpus=0, max_concurrency=2)
class Leader:
    """A stage's worker as far as its group is concerned."""

    def __init__(self, folder: Path, size: int = 2, **asked: Any) -> None:
        make = functools.partial(Adder, folder)
        self.group = LedGroup(asking(make, size, **asked), "cpu", 1)

    def start(self) -> int:
        self.group.start()
        return os.getpid()

    def run(self, method: str, *args: Any) -> Any:
        return self.group.run(method, *args)

    def builds(self) -> int:
        return self.group.builds

    def take_place(self, office: Any) -> None:
        self.group.room = Room(claimed(office))

    def cards(self) -> list[str]:
        """Which card each rank of a group on this worker's cards would see."""
        self.group.device = "cuda"
        return [seat.env["CUDA_VISIBLE_DEVICES"] for seat in self.group._seats()]

    def reserve(self) -> list[int]:
        """Process ids of those in reserve, once they have imported what they shall."""
        assert self.group.reserve is not None
        ray.get([rank.take_on.remote(self.group.asked, None) for rank in self.group.reserve.ranks])
        return [pid for pid, _ in ray.get([rank.process.remote() for rank in self.group.reserve.ranks])]


def journal(folder: Path) -> list[dict[str, Any]]:
    """What the ranks wrote, in order of time."""
    path = folder / "journal"
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted((json.loads(line) for line in lines), key=lambda line: line["t"])


def pids(folder: Path) -> set[int]:
    """Every rank process there has been."""
    return {line["pid"] for line in journal(folder)}
