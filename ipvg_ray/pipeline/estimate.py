"""What a run will take: hours, nodes and money, from measured rates, and pools that keep every stage equally busy.

All stages run at the same time, so a run takes as long as its slowest stage. If a stage's work is its rows times its
seconds a row, pools are balanced when work divided by workers is the same for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np
import yaml

from ipvg_ray import schema, tables
from ipvg_ray.errors import UserError
from ipvg_ray.pipeline.nodes import Kind
from ipvg_ray.pipeline.stage import Resources, Stage
from ipvg_ray.storage import RunPath

_QUANTILES = 101
PUBLISHED = "published"
"""What a rate's source begins with where nobody has measured it."""


class EstimateError(UserError, ValueError):
    """A run that cannot be estimated; the message names what is missing."""


@dataclass(frozen=True)
class Rate:
    """Seconds a row takes in its batch, where that is known from, and (101,) percentiles, None if all take the same."""

    seconds: float
    source: str
    spread: np.ndarray | None = None


@dataclass(frozen=True)
class Load:
    """What a stage has to do.

    Attributes:
        name: of the stage.
        rows: still to be done.
        rate: seconds from a row's begin to its end, divided by the rows of its batch.
        asks: what each worker wants.
    """

    name: str
    rows: int
    rate: Rate
    asks: Resources

    @property
    def work(self) -> float:
        """Seconds for a single worker, with as many batches in work as its pool allows."""
        return self.rows * self.rate.seconds / self.asks.concurrency

    @property
    def batches(self) -> int:
        return math.ceil(self.rows / self.asks.batch_size)

    @property
    def batch_seconds(self) -> float:
        return self.rate.seconds * min(self.asks.batch_size, max(1, self.rows))

    def seconds(self, workers: int) -> float:
        """How long so many workers take: whole batches, the last round of them perhaps not full."""
        return math.ceil(self.batches / (workers * self.asks.concurrency)) * self.batch_seconds

    def workers(self, seconds: float) -> int | None:
        """The fewest workers that take no longer than so many seconds; None where a single batch takes longer."""
        rounds = int(seconds / self.batch_seconds + 1e-9) if self.batch_seconds else self.batches
        return max(1, math.ceil(self.batches / (rounds * self.asks.concurrency))) if rounds else None

    @property
    def gpu_hours(self) -> float:
        """GPU hours that the work keeps busy."""
        return self.work * self.asks.gpus / 3600


@dataclass(frozen=True)
class Prices:
    """Prices of a node of each type an hour, and seconds a row where the user knows better than we."""

    nodes: Mapping[str, float]
    currency: str = "$"
    seconds: Mapping[str, float] = field(default_factory=dict)

    def of(self, name: str) -> float:
        """The price of a node type. Raises EstimateError where the file does not have it."""
        if name not in self.nodes:
            raise EstimateError(f"the price file has no price for node type {name}; add it under nodes")
        return self.nodes[name]


@dataclass(frozen=True)
class Layout:
    """Pool sizes and what comes of them.

    Attributes:
        workers: per stage.
        nodes: per kind of node, by its first type's name.
        seconds: of the slowest stage's work.
        bottleneck: that stage.
    """

    workers: dict[str, int]
    nodes: dict[str, int]
    seconds: float
    bottleneck: str


def read_prices(file: Path) -> Prices:
    """A price file: `nodes: {type: price an hour}`, and if wanted `currency` and `seconds: {stage: a row}`.

    Raises:
        EstimateError: for a file that is not so.
    """
    try:
        tree = yaml.safe_load(file.read_text())
        nodes = {str(name): float(price) for name, price in tree["nodes"].items()}
        seconds = {str(name): float(value) for name, value in (tree.get("seconds") or {}).items()}
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise EstimateError(
            f"{file} is no price file, which holds `nodes: {{type: price an hour}}` ({error})"
        ) from error
    return Prices(nodes, str(tree.get("currency", "$")), seconds)


def rates(
    stages: Sequence[Stage], runs: Sequence[RunPath], given: Mapping[str, float] | None = None
) -> dict[str, Rate]:
    """Seconds a row of each stage: as given, else measured in the first of `runs` that has rows of it, else published.

    Published ones hold for one card; of a group of cards each is taken to do its share.

    Raises:
        EstimateError: for a stage of which nothing is known.
    """
    known = published()
    found: dict[str, Rate] = {}
    for stage in stages:
        name = stage.name
        if given and name in given:
            found[name] = Rate(given[name], "given")
        elif (rate := next((r for r in (measured(run, stage.table()) for run in runs) if r), None)) is not None:
            found[name] = rate
        elif name in known:
            asks = stage.resources()
            cards = max(1.0, asks.gpus)
            shared = f", divided by {cards:g} cards" if cards > 1 else ""
            # Of a worker as a whole; each of the batches that it has in work at a time takes so much longer.
            found[name] = Rate(known[name] / cards * asks.concurrency, PUBLISHED + shared)
        else:
            raise EstimateError(
                f"nothing is known of {name}'s seconds a row; give them in the price file under seconds"
            )
    return found


def measured(run_dir: RunPath, table: schema.Table) -> Rate | None:
    """The rate that a run's checkpoints tell, or None where the stage has none there."""
    if not tables.parts(run_dir, table.name):
        return None
    seconds = tables.read_table(run_dir, table, ["seconds"])["seconds"].to_numpy().astype(float)
    if not len(seconds):
        return None
    spread = np.quantile(seconds, np.linspace(0, 1, _QUANTILES))
    return Rate(float(seconds.mean()), f"{len(seconds)} rows of {run_dir}", spread)


def published() -> dict[str, float]:
    """Seconds a row as published for the real models; see the file for what they stand on."""
    text = (resources.files("ipvg_ray.stages") / "published.yaml").read_text()
    return {str(name): float(value) for name, value in yaml.safe_load(text).items()}


def balance(loads: Sequence[Load], places: Mapping[str, Kind], bounded: bool = False) -> Layout:
    """The pool sizes with which the slowest stage is done soonest on the nodes there may be.

    Args:
        places: the kind of node each stage runs on.
        bounded: keep within the pools' own max_workers.

    Raises:
        EstimateError: where one worker of each stage is more than the nodes hold.
    """
    busy = [load for load in loads if load.rows]
    if not busy:
        raise EstimateError("there is nothing to do")

    def holds(seconds: float) -> bool:
        workers = {load.name: load.workers(seconds) or 10**9 for load in busy}
        within = all(workers[load.name] <= (load.asks.max_workers if bounded else 10**8) for load in busy)
        kinds = {places[load.name] for load in busy}
        return within and all(_nodes(kind, busy, places, workers) <= kind.most for kind in kinds)

    low, high = 0.0, max(load.seconds(1) for load in busy)
    if not holds(high):
        raise EstimateError("one worker of each stage is more than the nodes hold; raise max_workers of their types")
    for _ in range(60):  # halves the span each time: far below what a row takes
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    workers = {load.name: load.workers(high) or 1 for load in busy}
    times = {load.name: load.seconds(workers[load.name]) for load in busy}
    nodes = {kind.types[0]: _nodes(kind, busy, places, workers) for kind in {places[load.name] for load in busy}}
    return Layout(workers, nodes, max(times.values()), max(times, key=lambda name: times[name]))


def _nodes(kind: Kind, loads: Sequence[Load], places: Mapping[str, Kind], workers: Mapping[str, int]) -> int:
    """Nodes of a kind that these pools fill: by cards, by cores, and by groups of cards, which do not span nodes."""
    here = [load for load in loads if places[load.name] == kind]
    cards = sum(load.asks.gpus * workers[load.name] for load in here)
    cores = sum(load.asks.cpus * workers[load.name] for load in here)
    groups = sum(math.ceil(workers[load.name] / kind.room(load.asks)) for load in here if load.asks.gpus > 1)
    by_cards = math.ceil(cards / kind.gpus - 1e-9) if kind.gpus else 0
    return max(by_cards, math.ceil(cores / kind.cpus - 1e-9), groups)


def fill_seconds(loads: Sequence[Load], bottleneck: str) -> float:
    """Seconds in which the bottleneck has nothing to do yet, or nothing left to do: a batch's way past the others."""
    return sum(load.batch_seconds for load in loads if load.rows and load.name != bottleneck)


def costs(layout: Layout, places: Mapping[str, Kind], prices: Prices, head: str, seconds: float) -> tuple[float, float]:
    """Price of the nodes and the head for so many seconds: bought as their first types, and as their dearest."""
    hours = seconds / 3600
    low = high = prices.nodes.get(head, 0.0) * hours
    kinds = {kind.types[0]: kind for kind in places.values()}
    for name, number in layout.nodes.items():
        low += number * hours * prices.of(name)
        high += number * hours * max(prices.of(other) for other in kinds[name].types)
    return low, high
