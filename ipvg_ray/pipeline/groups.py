"""Groups: a worker that leads one rank process per card, all working on one row at a time.

The worker is the Ray Data actor; it holds the cards, and its ranks are child actors that hold none and are told which
card is theirs. Ranks talk to each other through what their stage chooses. A peer that is gone leaves the others waiting
in NCCL or gloo for up to half an hour, so nobody waits for that: the leader looks at all of them, and when one dies,
raises alone, or none of them gets any further, it ends every rank's process and makes the group anew.

Most of what a new process does is to import libraries; so a stage that says which has a second crew in reserve.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ipvg_ray.pipeline.crew import Crew, Seat, Whereabouts
from ipvg_ray.pipeline.places import Room
from ipvg_ray.pipeline.spot import Notice
from ipvg_ray.pipeline.stage import Ranks, RowError
from ipvg_ray.pipeline.store import FencedError
from ipvg_ray.storage import StorageError

logger = logging.getLogger(__name__)

BUILD_SECONDS = 1800.0
"""In which a group must be made, its models loaded; large checkpoints on slow storage take minutes."""
_LOOK_SECONDS = 1.0
"""How often the leader asks its ranks how far they are, while none has ended."""
_GRACE_SECONDS = 3.0
"""In which the other ranks must raise too, once one has: then it was the row, and not one rank's own trouble."""
_NOTICE_SECONDS = 10.0
_HERE = "127.0.0.1"
_INHERITED = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENCV_FOR_THREADS_NUM",
    "TOKENIZERS_PARALLELISM",
    "HF_HUB_OFFLINE",
)


class GroupBrokenError(Exception):
    """The ranks cannot go on together; the message says which one was the first and why."""


class LedGroup:
    """A leader's ranks; see `ipvg_ray.pipeline.stage.Group`. Made and used in the leader's process alone.

    Args:
        asked: what the stage wants.
        device: of the ranks, `cuda` or `cpu`.
        threads: that each may use.
        room: where groups may span nodes, where their ranks work.
    """

    def __init__(self, asked: Ranks, device: str, threads: int, room: Room | None = None) -> None:
        self.asked = asked
        self.device = device
        self.threads = threads
        self.room = room
        self.crew: Crew | None = None
        self.reserve: Crew | None = None
        self.turn = threading.Lock()
        self.builds = 0

    def start(self) -> None:
        """Make the ranks, unless they stand. Raises what all raise alike, and GroupBrokenError as `run` bounds it."""
        for left in reversed(range(self.asked.rebuilds + 1)):
            try:
                return self._stand()
            except GroupBrokenError as error:
                logger.warning("a group of %d ranks could not start: %s", self.asked.size, error)
                if not left:
                    raise
        raise AssertionError("unreachable")

    def run(self, method: str, *args: Any) -> Any:
        with self.turn:  # a worker with several batches in work calls from several threads
            return self._run(method, args)

    def _run(self, method: str, args: tuple[Any, ...]) -> Any:
        words = []
        for _ in range(self.asked.rebuilds + 1):
            try:
                self._stand()
                packed = ray.put(args)  # one copy for all ranks
                return self._all([rank.call.remote(method, packed) for rank in self.ranks], self.asked.stall_s)
            except GroupBrokenError as error:
                logger.warning("a group of %d ranks is made anew: %s", self.asked.size, error)
                words.append(str(error))
                self._disband()
            except (StorageError, FencedError):
                self.close()  # others may wait for the rank that raised; the run's place is no better in a new group
                raise
        times = f"{len(words)} times" if len(words) > 1 else "once"
        raise RowError(
            "group_lost", f"the group that worked on this row was lost {times}, the last time so: {words[-1]}"
        )

    def close(self) -> None:
        """End every process, those in reserve too, and come back when they are gone and their cards free."""
        self._disband()
        if self.reserve is not None:
            self.reserve.end()
            self.reserve = None

    def _disband(self) -> None:
        """End the ranks; the reserve stays."""
        if self.crew is not None:
            self.crew.end()
            self.crew = None

    def notice(self) -> Notice | None:
        """Of a node on which one of the ranks works, and which will be taken away; asked from any thread."""
        asked = [rank.notice.remote() for rank in self.ranks]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=_NOTICE_SECONDS) if asked else ([], [])
        for ref in answered:
            with suppress(ray.exceptions.RayError):  # a rank that is gone is the business of who called it
                if (notice := ray.get(ref)) is not None:
                    return notice
        return None

    @property
    def ranks(self) -> list[Any]:
        """The processes that stand."""
        crew = self.crew  # other threads ask too
        return crew.ranks if crew is not None else []

    # -- making it -------------------------------------------------------------------------------------------------

    def _stand(self) -> None:
        if self.crew is not None:
            return
        if self.room is not None:
            self.room.wait()  # after a lost node Ray looks for another; no rebuild helps before that is there
        self.builds += 1
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        crew = self._muster()
        host = crew.told[0].address if self.asked.across_nodes else _HERE
        place = self._all([crew.ranks[0].open.remote(host)], limit_s=BUILD_SECONDS)
        setups = [rank.setup.remote(place, self.device, self.threads) for rank in crew.ranks]
        self._all(setups, limit_s=BUILD_SECONDS)
        if self.asked.warm is not None:  # only now: its imports would slow down the ranks' start
            self.reserve = self._recruit(crew.told)

    def _muster(self) -> Crew:
        """Have processes for all ranks: the reserve, if all of it lives, else new ones."""
        if self.reserve is not None:
            self.crew, self.reserve = self.reserve, None
            try:
                return self._call_roll(self.crew)
            except GroupBrokenError as error:
                logger.warning("the processes in reserve are not all there: %s", error)
                self._disband()
        self.crew = self._recruit()
        return self._call_roll(self.crew)

    def _call_roll(self, crew: Crew) -> Crew:
        """The crew, once all of it has told where it is."""
        calls = [rank.process.remote() for rank in crew.ranks]
        crew.present(self._all(calls, limit_s=BUILD_SECONDS, every=True), here=not self.asked.across_nodes)
        return crew

    def _recruit(self, before: Sequence[Whereabouts] = ()) -> Crew:
        host = ray.util.get_node_ip_address() if self.asked.across_nodes else _HERE
        return Crew(self.asked, self._seats(), host, before)

    def _seats(self) -> list[Seat]:
        """For each rank where it works."""
        env = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        if self.room is not None:
            # Rank and reserve share what is set aside for one; Ray tells both of the same card.
            share = {"num_gpus": 0.5 if self.asked.warm else 1} if self.device == "cuda" else {}
            return [
                Seat({"scheduling_strategy": PlacementGroupSchedulingStrategy(self.room.place, bundle), **share}, env)
                for bundle in self.room.bundles()
            ]
        here = ray.get_runtime_context()
        there = {"scheduling_strategy": NodeAffinitySchedulingStrategy(here.get_node_id(), soft=False)}
        if self.device != "cuda":
            return [Seat(there, env)] * self.asked.size
        cards = here.get_accelerator_ids()["GPU"]
        if len(cards) != self.asked.size:
            raise ValueError(f"a group of {self.asked.size} ranks has {len(cards)} cards; pool.gpus must be the same")
        return [Seat(there, {**env, "CUDA_VISIBLE_DEVICES": str(card)}) for card in cards]

    # -- waiting for it --------------------------------------------------------------------------------------------

    def _all(self, refs: Sequence[Any], stall_s: float = 0.0, limit_s: float = 0.0, every: bool = False) -> Any:
        """What the first rank answers, or every rank, once all have.

        Raises:
            GroupBrokenError: as soon as one dies, or raises without the others, or none has moved for `stall_s`, or
                `limit_s` have passed.
            StorageError, FencedError: what one raised: the run's place cannot be reached, and no rank is to blame.
            Exception: what all raised.
        """
        number = {ref: i for i, ref in enumerate(refs)}
        answers: dict[int, Any] = {}
        raised: dict[int, Exception] = {}
        pending, watch, started = list(refs), _Watch(stall_s), time.monotonic()
        grace = float("inf")
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=_LOOK_SECONDS)
            for ref in done:
                try:
                    answers[number[ref]] = ray.get(ref)
                except ray.exceptions.RayTaskError as error:
                    raised[number[ref]] = error
                    grace = min(grace, time.monotonic() + _GRACE_SECONDS)
                except ray.exceptions.RayError as error:
                    raise GroupBrokenError(f"rank {number[ref]} died: {_line(error)}") from error
            if not done and stall_s and not raised:
                watch.look(self._progress())
            if limit_s and time.monotonic() - started > limit_s:
                raise GroupBrokenError(f"its ranks did not stand within {limit_s:g} s")
            if pending and time.monotonic() > grace:
                break
        if raised:
            causes = [getattr(error, "cause", None) or error for error in raised.values()]
            if storage := next((cause for cause in causes if isinstance(cause, (StorageError, FencedError))), None):
                raise storage
            if len(raised) == len(refs):
                raise causes[0]
            rank, first = next(iter(raised.items()))
            raise GroupBrokenError(f"rank {rank} raised, and others did not: {_line(first)}") from first
        return [answers[i] for i in range(len(refs))] if every else answers[0]

    def _progress(self) -> list[tuple[int, str] | None]:
        """How far each rank is; None for those that do not answer."""
        asked = [rank.progress.remote() for rank in self.ranks]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=_LOOK_SECONDS)
        found: list[tuple[int, str] | None] = []
        for ref in asked:
            try:
                found.append(ray.get(ref) if ref in answered else None)
            except ray.exceptions.RayError:
                found.append(None)  # its death is told by the call that it has in work
        return found


class _Watch:
    """Notices when no rank has told anything new for so many seconds; a rank that falls silent has told nothing new."""

    def __init__(self, stall_s: float) -> None:
        self.stall_s = stall_s
        self.told: dict[int, tuple[int, str]] = {}
        self.since = time.monotonic()

    def look(self, progress: list[tuple[int, str] | None]) -> None:
        """Raises GroupBrokenError where it has been the same for too long."""
        news = {i: answer for i, answer in enumerate(progress) if answer is not None and answer != self.told.get(i)}
        if news:
            self.told |= news
            self.since = time.monotonic()
        elif time.monotonic() - self.since > self.stall_s:
            stood = ", ".join(f"{i}: {answer[1] if answer else 'no answer'}" for i, answer in enumerate(progress))
            raise GroupBrokenError(f"no rank got any further for {self.stall_s:g} s ({stood})")


def _line(error: BaseException) -> str:
    """The last line of what an error says of itself."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[-1].strip()[:300]}"
