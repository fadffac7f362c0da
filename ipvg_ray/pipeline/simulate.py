"""A run on a virtual clock: stages, pools, nodes that start and are lost, and what the GPUs do meanwhile. No Ray.

Rows are counts here, not objects, so a million samples take seconds. What is simulated follows the engine: batches are
dealt one by one to free workers, the rows that wait in front of a stage are bounded, pools grow while they have a
backlog, and the batches in work on a lost node are done again.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ipvg_ray.pipeline.estimate import Load
from ipvg_ray.pipeline.nodes import Kind
from ipvg_ray.pipeline.plan import rows_ahead

_BINS = 512


@dataclass(frozen=True)
class Conditions:
    """What happens around the stages.

    Attributes:
        node_s: seconds from asking for a node until workers can start on it.
        load_s: seconds in which a worker loads its models.
        spot_hours: mean hours until a spot node is taken away; 0 for never.
        seed: of the losses and of the rows' times.
    """

    node_s: float = 300.0
    load_s: float = 120.0
    spot_hours: float = 0.0
    seed: int = 1


class Timeline:
    """A sum of steps over time, kept in bins of equal width that double when time runs out of them."""

    def __init__(self) -> None:
        self.width = 1.0
        self.sums = np.zeros(_BINS)

    def add(self, start: float, end: float, weight: float) -> None:
        """Add `weight` from `start` to `end`, both in seconds."""
        while end > self.width * _BINS:
            self.sums = np.concatenate([self.sums.reshape(-1, 2).sum(1), np.zeros(_BINS // 2)])
            self.width *= 2
        first, last = int(start / self.width), min(int(end / self.width), _BINS - 1)
        if first >= last:
            self.sums[first if first < _BINS else -1] += (end - start) * weight
            return
        self.sums[first] += ((first + 1) * self.width - start) * weight
        self.sums[first + 1 : last] += self.width * weight
        self.sums[last] += (end - last * self.width) * weight

    def levels(self) -> np.ndarray:
        """Mean weight in each bin: (512,)."""
        return self.sums / self.width


@dataclass
class StageResult:
    """What a stage did: seconds of its first begin and last end, of its work, rows done again, its GPUs over time."""

    workers: int
    slots: int
    first: float = float("inf")
    last: float = 0.0
    busy: float = 0.0
    redone: int = 0
    gpus: Timeline = field(default_factory=Timeline)


@dataclass
class Outcome:
    """A simulated run: seconds, per stage what it did, node hours by kind, nodes lost, the GPUs that were paid for."""

    seconds: float
    stages: dict[str, StageResult]
    node_hours: dict[str, float]
    lost_nodes: int
    held: Timeline

    def idle_share(self, stage: str) -> float:
        """The share of a stage's workers' time that was not work, between the run's first and last row."""
        begun = min(result.first for result in self.stages.values())
        ended = max(result.last for result in self.stages.values())
        return idle_share(self.stages[stage].busy, self.stages[stage].slots, ended - begun)


def idle_share(busy: float, slots: int, span: float) -> float:
    """What of `slots` times `span` seconds was not `busy`."""
    return 1 - busy / (slots * span) if span > 0 else 0.0


@dataclass
class _Node:
    kind: Kind
    asked: float
    ready: bool = False
    gone: bool = False
    cpus: float = 0.0
    gpus: float = 0.0
    workers: list[_Worker] = field(default_factory=list)
    placed: list[int] = field(default_factory=list)


@dataclass
class _Worker:
    stage: int
    node: _Node
    batches: dict[int, tuple[float, int]] = field(default_factory=dict)
    gone: bool = False


def simulate(
    loads: Sequence[Load],
    places: Mapping[str, Kind],
    workers: Mapping[str, int],
    conditions: Conditions = Conditions(),
) -> Outcome:
    """Play a run.

    Args:
        loads: the stages in order; where one has more rows than the one before it, each row becomes so many.
        places: the kind of node each stage runs on.
        workers: the largest pool of each stage.
    """
    return _Simulation(loads, places, workers, conditions).play()


class _Simulation:
    def __init__(
        self,
        loads: Sequence[Load],
        places: Mapping[str, Kind],
        workers: Mapping[str, int],
        conditions: Conditions,
    ) -> None:
        self.loads = [load for load in loads if load.rows]
        self.kinds = [places[load.name] for load in self.loads]
        self.most = [workers[load.name] for load in self.loads]
        self.conditions = conditions
        self.luck = random.Random(conditions.seed)
        self.now = 0.0
        self.count = itertools.count()
        self.events: list[tuple[float, int, str, object]] = []
        self.waiting = [0.0] * len(self.loads)
        self.waiting[0] = self.loads[0].rows
        self.owed = [load.rows for load in self.loads]
        self.fans = [after.rows / before.rows for before, after in itertools.pairwise(self.loads)]
        pools = [replace(load.asks, max_workers=most) for load, most in zip(self.loads, self.most, strict=True)]
        self.ahead = list(map(rows_ahead, pools, [None, *pools]))
        self.free: list[list[_Worker]] = [[] for _ in self.loads]
        self.pools = [0] * len(self.loads)
        self.nodes: list[_Node] = []
        self.node_hours: dict[str, float] = {}
        self.lost_nodes = 0
        self.held = Timeline()
        self.results = [
            StageResult(most, most * load.asks.concurrency) for load, most in zip(self.loads, self.most, strict=True)
        ]

    def play(self) -> Outcome:
        for stage in range(len(self.loads)):
            self._hire(stage, self.loads[stage].asks.min_workers)
        while self.events and any(self.owed):
            self.now, _, what, about = heapq.heappop(self.events)
            getattr(self, f"_on_{what}")(about)
        for node in self.nodes:
            self._release(node)
        names = [load.name for load in self.loads]
        return Outcome(
            self.now, dict(zip(names, self.results, strict=True)), self.node_hours, self.lost_nodes, self.held
        )

    def _at(self, seconds: float, what: str, about: object) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.count), what, about))

    # -- pools and nodes -----------------------------------------------------------------------------------------

    def _hire(self, stage: int, number: int) -> None:
        """Find places for more workers of a stage, on nodes that are there, are coming, or are asked for now."""
        for _ in range(min(number, self.most[stage] - self.pools[stage])):
            kind, asks = self.kinds[stage], self.loads[stage].asks
            node = next(
                (n for n in self.nodes if n.kind is kind and not n.gone and _has(n, asks.cpus, asks.gpus)), None
            )
            if node is None:
                if sum(1 for n in self.nodes if n.kind is kind and not n.gone) >= kind.most:
                    return
                node = _Node(kind, self.now, cpus=kind.cpus, gpus=kind.gpus)
                self.nodes.append(node)
                self._at(self.conditions.node_s, "node", node)
            node.cpus, node.gpus = node.cpus - asks.cpus, node.gpus - asks.gpus
            self.pools[stage] += 1
            node.placed.append(stage)
            if node.ready:
                self._at(self.conditions.load_s, "worker", _Worker(stage, node))

    def _on_node(self, node: _Node) -> None:
        node.ready = True
        if node.kind.spot and self.conditions.spot_hours:
            self._at(self.luck.expovariate(1 / (3600 * self.conditions.spot_hours)), "loss", node)
        for stage in node.placed:
            self._at(self.conditions.load_s, "worker", _Worker(stage, node))

    def _on_worker(self, worker: _Worker) -> None:
        if worker.node.gone:
            return
        worker.node.workers.append(worker)
        self.free[worker.stage].extend([worker] * self.loads[worker.stage].asks.concurrency)
        self._deal(worker.stage)

    def _on_loss(self, node: _Node) -> None:
        """A spot node is taken away: its batches wait again, its workers are hired anew elsewhere."""
        if node.gone:
            return
        self._release(node)
        self.lost_nodes += 1
        for worker in node.workers:
            worker.gone = True
            for begun, rows in worker.batches.values():
                self.waiting[worker.stage] += rows
                self.results[worker.stage].redone += rows
                self._worked(worker.stage, begun)
        self.free = [[worker for worker in free if not worker.gone] for free in self.free]
        for stage in node.placed:
            self.pools[stage] -= 1
        for stage in node.placed:
            if self.owed[stage]:
                self._hire(stage, 1)
        for stage in range(len(self.loads)):
            self._deal(stage)

    def _release(self, node: _Node) -> None:
        if node.gone:
            return
        node.gone = True
        name = node.kind.types[0]
        self.node_hours[name] = self.node_hours.get(name, 0.0) + (self.now - node.asked) / 3600
        self.held.add(node.asked, self.now, node.kind.gpus)

    # -- rows ----------------------------------------------------------------------------------------------------

    def _deal(self, stage: int) -> None:
        """Give waiting rows to free workers, and where that makes room let the stage before go on."""
        load, free, fed = self.loads[stage], self.free[stage], False
        batch = load.asks.batch_size
        while free and self._may_begin(stage):
            rows = int(min(batch, self.waiting[stage]))
            whole = rows == batch or self._last_of(stage)
            if not rows or not whole:
                break
            worker, seconds = free.pop(), self._seconds(load) * rows
            self.waiting[stage] -= rows
            token = next(self.count)
            worker.batches[token] = (self.now, rows)
            self.results[stage].first = min(self.results[stage].first, self.now)
            self._at(seconds, "batch", (worker, token))
            fed = True
        if not free and self.pools[stage] < self.most[stage] and self.waiting[stage] >= 1:
            self._hire(stage, 1)
        if fed and stage:
            self._deal(stage - 1)

    def _may_begin(self, stage: int) -> bool:
        return stage + 1 == len(self.loads) or self.waiting[stage + 1] < self.ahead[stage + 1]

    def _last_of(self, stage: int) -> bool:
        """Whether what waits is all that will come."""
        return stage == 0 or not self.owed[stage - 1]

    def _seconds(self, load: Load) -> float:
        spread = load.rate.spread
        if spread is None:
            return load.rate.seconds
        return float(spread[self.luck.randrange(len(spread))])

    def _on_batch(self, about: tuple[_Worker, int]) -> None:
        worker, token = about
        if worker.gone:
            return
        begun, rows = worker.batches.pop(token)
        stage = worker.stage
        self._worked(stage, begun)
        self.results[stage].last = self.now
        self.owed[stage] -= rows
        self.free[stage].append(worker)
        if stage + 1 < len(self.loads):
            self.waiting[stage + 1] += rows * self.fans[stage]
            if not self.owed[stage]:  # shares of rows have added up to whole ones
                self.waiting[stage + 1] = round(self.waiting[stage + 1])
            self._deal(stage + 1)
        else:
            self._deal(stage)
            return
        self._deal(stage)
        if not self.owed[stage]:
            self._leave()

    def _worked(self, stage: int, begun: float) -> None:
        result, asks = self.results[stage], self.loads[stage].asks
        result.busy += self.now - begun
        if asks.gpus:
            result.gpus.add(begun, self.now, asks.gpus / asks.concurrency)

    def _leave(self) -> None:
        """Let nodes go whose stages are all done; one whose workers still load their models is needed."""
        for node in self.nodes:
            if not node.gone and node.ready and all(not self.owed[stage] for stage in node.placed):
                self._release(node)


def _has(node: _Node, cpus: float, gpus: float) -> bool:
    return node.cpus >= cpus - 1e-9 and node.gpus >= gpus - 1e-9
