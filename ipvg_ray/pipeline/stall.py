"""A run that stands still is named, and where that can mend it, given up: when nothing is in work and no CPU is free.

Ray Data's own tasks, which read rows and deal them to the pools, take free CPUs. Where a cluster has lost nodes since
the run began, or was never large enough, pools may fill it, and these tasks wait for ever, without a word.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ipvg_ray.pipeline.ledger import Event

_NAMED_S = 60.0
"""Seconds without any sign from the workers after which the cluster is looked at."""
_GIVEN_UP_S = 600.0
"""Longer than readers try again at a storage that fails, and than a cloud takes to bring a node back."""
_EVERY_S = 10.0


@dataclass(frozen=True)
class Room:
    """A cluster's living nodes, its CPUs, and the most of them that are free on one node."""

    nodes: frozenset[str]
    cpus: float
    free: float


@dataclass
class StallWatch:
    """Looks whether a run stands still.

    Attributes:
        room: what the cluster has; asked only where the workers are silent.
        needed: CPUs that must be free on one node for rows to be read and dealt.
        say: told once for each time that it stands still.
        give_up: called, with why, where it goes on standing still; None where nodes may still come.
        whole: CPUs from which on it is waited for all the same: on a cluster that is not the run's alone those it had
            when the execution began, as then it is others' work that fills it, and will end.
        clock: seconds.
        loading: nodes on which workers are loading now; asked as `room` is.
        open: per stage and batch in work, its node.
        since: when the run was last seen to move.
        due: when to look again.
        said: whether it was named since.
    """

    room: Callable[[], Room]
    needed: float
    say: Callable[[str], None]
    give_up: Callable[[str], None] | None = None
    clock: Callable[[], float] = time.monotonic
    loading: Callable[[], Sequence[str]] = tuple
    whole: float = math.inf
    open: dict[tuple[str, str], str] = field(default_factory=dict)
    since: float = 0.0
    due: float = 0.0
    said: bool = False

    def __post_init__(self) -> None:
        self.restart(self.loading, self.whole)

    def restart(self, loading: Callable[[], Sequence[str]] = tuple, whole: float = math.inf) -> None:
        """Begin to count anew, as with each execution."""
        self.loading, self.whole = loading, whole
        self.open.clear()
        self.since, self.said = self.clock(), False
        self.due = self.since + _NAMED_S

    def look(self, events: Sequence[Event]) -> None:
        """Take in what workers told, if anything, and look; call often."""
        now = self.clock()
        if events:
            self.since, self.due, self.said = now, now + _NAMED_S, False
        for event in events:
            if event.began:
                self.open[event.stage, event.batch] = event.node
            if event.ended:
                self.open.pop((event.stage, event.batch), None)
        if now < self.due:
            return
        self.due = now + _EVERY_S
        room = self.room()
        if room.free >= self.needed or any(node in room.nodes for node in (*self.open.values(), *self.loading())):
            self.since = now  # rows can be dealt, or something is in work or loads
            return
        silent = now - self.since
        why = (
            f"no row is in work, and of the cluster's {room.cpus:g} CPUs no node has {self.needed:g} free, which "
            "reading and dealing rows take: the pools, or other work there, fill it"
        )
        mendable = self.give_up if room.cpus < self.whole else None
        if not self.said:
            self.said = True
            mend = (
                ""
                if mendable
                else "; if nothing there ends and no nodes come, stop the run and go on with --in-turn or smaller pools"
            )
            self.say(f"nothing moves: {why}{mend}")
        if mendable and silent >= _GIVEN_UP_S:
            self.due = now + _GIVEN_UP_S
            mendable(f"{why}; where this comes again, lower the stages' pools")
