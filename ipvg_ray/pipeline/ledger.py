"""What is noted ahead of every try, so that a death can be laid at the door of the rows that were in work.

A try that is begun and never ends has taken its worker down, unless the worker's whole node was lost: then nobody is to
blame. `ipvg_ray.pipeline.desk` says where ledgers lie, so that they outlive the workers.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Who:
    """A worker process.

    Attributes:
        worker: name that stays the same when the worker is started again.
        process: name of this one process.
        node: id of its node.
        host: name of its node, for people.
        trace: file in which the process leaves its last words; see `ipvg_ray.pipeline.deaths`.
        oom_kills: processes that the node's kernel had killed for memory when this one began.
        alone: of a try: whether no other batch was in work in the process, so that its death can be nobody else's.
        began: of a try: when, seconds since 1970.
    """

    worker: str
    process: str
    node: str
    host: str
    trace: str
    oom_kills: int = 0
    alone: bool = True
    began: float = 0.0


@dataclass(frozen=True)
class Event:
    """What a worker tells of a batch: that it begins, with so many rows; or that it has ended, with what came of it.

    Attributes:
        alone: of one that begins: whether no other batch is in work in the process.
        at: of one that begins: when, seconds since 1970.
        node: of one that begins: the id of the node it is in work on.
        closed: of one that has ended: whether its rows are on disk; else it was taken apart.
        node_age: of a process's first: seconds from its node's start until then.
    """

    stage: str
    batch: str
    began: int = 0
    alone: bool = True
    at: float = 0.0
    node: str = ""
    ended: bool = False
    closed: bool = False
    done: int = 0
    failed: int = 0
    seconds: float = 0.0
    node_age: float = 0.0


class Ledger(Protocol):
    """What a worker asks of the ledger."""

    def begin_setup(self, stage: str, who: Who) -> tuple[list[Who], int]:
        """Note ahead that a worker begins to load.

        Returns:
            The processes that have died while they loaded this worker, since it last could be loaded; and how often
            workers of the stage were started again since it last ended a batch.
        """
        ...

    def end_setup(self, stage: str, who: Who) -> None:
        """Note that it has loaded, or said why it cannot."""
        ...

    def begin(self, event: Event, who: Who) -> list[Who]:
        """Note ahead that a batch is begun; returns the workers that died in earlier tries of it."""
        ...

    def end(self, event: Event) -> None:
        """Note that a batch has ended and forget its tries."""
        ...


@dataclass
class TryLedger:
    """The ledger itself, plain Python.

    Attributes:
        node_lost: whether a node, by its id, has left the cluster.
        tries: per stage and batch, the tries that have begun and not ended.
        loading: per stage, the processes that have begun to load and not told that they ended it.
        processes: per worker, those that were started, in order.
        restarts: per stage, processes that took a dead one's place since a batch of the stage last ended.
        lost_tries: tries that were not held against their rows, because a node was lost.
    """

    node_lost: Callable[[str], bool] = lambda node: False
    tries: dict[tuple[str, str], list[Who]] = field(default_factory=dict)
    loading: dict[str, list[Who]] = field(default_factory=lambda: defaultdict(list))
    processes: dict[str, list[Who]] = field(default_factory=lambda: defaultdict(list))
    restarts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    lost_tries: int = 0

    def begin_setup(self, stage: str, who: Who) -> tuple[list[Who], int]:
        """See `Ledger`. A worker that starts again has died before, while it loaded or after it."""
        before = self.processes[who.worker]
        if before and not self.node_lost(before[-1].node):
            self.restarts[stage] += 1
        before.append(who)
        died = [w for w in self.loading[stage] if w.worker == who.worker and not self.node_lost(w.node)]
        self.loading[stage] = [w for w in self.loading[stage] if w.worker != who.worker] + [*died, who]
        return died, self.restarts[stage]

    def predecessors(self, who: Who) -> list[Who]:
        """The processes whose place a process takes, in order."""
        return [w for w in self.processes[who.worker] if w.process != who.process]

    def end_setup(self, stage: str, who: Who) -> None:
        """See `Ledger`."""
        self.loading[stage] = [w for w in self.loading[stage] if w.worker != who.worker]

    def begin(self, event: Event, who: Who) -> list[Who]:
        """See `Ledger`."""
        batch = (event.stage, event.batch)
        earlier = [w for w in self.tries.get(batch, []) if w.process != who.process]
        died = [w for w in earlier if not self.node_lost(w.node)]
        self.lost_tries += len(earlier) - len(died)
        self.tries[batch] = [*died, dataclasses.replace(who, alone=event.alone, began=event.at)]
        return died

    def end(self, event: Event) -> None:
        """See `Ledger`."""
        self.tries.pop((event.stage, event.batch), None)
        if event.closed:
            self.worked([event.stage])

    def worked(self, stages: Sequence[str]) -> None:
        """Note that batches of these stages came to an end."""
        for stage in stages:
            self.restarts[stage] = 0

    def lose(self, tries: int) -> None:
        """Note tries that ended with their node."""
        self.lost_tries += tries

    def take_in(self, event: Event, who: Who) -> None:
        """Note what a process had told."""
        if event.ended:
            self.end(event)
        else:
            self.begin(event, who)
