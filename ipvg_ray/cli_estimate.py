"""What a run will take: the estimate under `ipvg-ray plan`, and `ipvg-ray simulate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from ipvg_ray import config
from ipvg_ray.cli_options import EXIT_OK, File, Profile, Set, out
from ipvg_ray.pipeline import estimate
from ipvg_ray.pipeline.nodes import Kind, one_machine, places, read_cluster
from ipvg_ray.pipeline.progress import duration
from ipvg_ray.storage import RunPath, run_path

Cluster = Annotated[Path | None, typer.Option(help="Cluster file: cluster.yaml, or a RayCluster manifest.")]
PriceFile = Annotated[Path | None, typer.Option("--prices", help="YAML: nodes: {type: price an hour}.")]
Gpus = Annotated[int | None, typer.Option(help="Without a cluster file: GPUs of one kind that there are.")]
Rates = Annotated[
    list[Any],
    typer.Option("--rates", parser=run_path, help="Earlier run to take measured rates from; may be repeated."),
]
NodeStart = Annotated[float, typer.Option(help="Seconds until a node that is asked for can be used.")]
Loading = Annotated[float, typer.Option("--load", help="Seconds in which a worker loads its models.")]


@dataclass(frozen=True)
class Around:
    """Where a run is to take place: rates from where, nodes, prices, seconds until a node and its worker are ready."""

    runs: Sequence[RunPath]
    cluster: Path | None = None
    prices: Path | None = None
    gpus: int | None = None
    start_s: float = 420.0


def loads_of(stages: Sequence[Any], rows: Mapping[str, int], around: Around) -> list[estimate.Load]:
    """What each stage has to do. Raises EstimateError."""
    given = estimate.read_prices(around.prices).seconds if around.prices else None
    rates = estimate.rates(stages, around.runs, given)
    return [estimate.Load(s.name, rows[s.name], rates[s.name], s.resources()) for s in stages]


def nodes_of(loads: Sequence[estimate.Load], around: Around) -> tuple[dict[str, Kind], str]:
    """The kind of node of each stage, and the head's type. Raises ClusterFileError."""
    kinds, head = read_cluster(around.cluster) if around.cluster else (one_machine(around.gpus or 1), "head")
    return places({load.name: load.asks for load in loads}, kinds), head


def show(stages: Sequence[Any], rows: Mapping[str, int], samples: int, around: Around) -> None:
    """Print hours, bottleneck and cost of what is to be done, with the pools as they are and as they should be."""
    loads = loads_of(stages, rows, around)
    if not any(load.rows for load in loads):
        out.print("\nnothing is left to do")
        return
    where, head = nodes_of(loads, around)
    table = Table(box=None, pad_edge=False)
    for name in ("stage", "rows", "s a row", "GPU hours", "max_workers", "balanced", "seconds known from"):
        table.add_column(name, justify="left" if name in ("stage", "seconds known from") else "right")
    best, now = estimate.balance(loads, where), None
    if around.cluster:
        now = estimate.balance(loads, where, bounded=True)
    for load in loads:
        numbers = (f"{load.rows}", f"{load.rate.seconds:.3g}", f"{load.gpu_hours:.2f}", str(load.asks.max_workers))
        source = f"[yellow]{escape(load.rate.source)}[/yellow]" if _guessed(load) else escape(load.rate.source)
        table.add_row(load.name, *numbers, str(best.workers.get(load.name, "")), source)
    out.print("\nestimate")
    out.print(table)
    if now is not None:
        _print_layout("pools as configured", loads, now, where, head, around, samples)
    _print_layout("balanced pools", loads, best, where, head, around, samples)
    sizes = " ".join(f"--set {name}.pool.max_workers={n}" for name, n in best.workers.items())
    out.print(f"balance with: {sizes}", markup=False)


def _print_layout(
    title: str,
    loads: Sequence[estimate.Load],
    layout: estimate.Layout,
    where: Mapping[str, Kind],
    head: str,
    around: Around,
    samples: int,
) -> None:
    seconds = around.start_s + estimate.fill_seconds(loads, layout.bottleneck) + layout.seconds
    nodes = ", ".join(f"{number} x {name}" for name, number in sorted(layout.nodes.items()))
    line = f"{title}: {duration(seconds)} on {nodes}; bottleneck {layout.bottleneck}"
    if around.prices:
        prices = estimate.read_prices(around.prices)
        low, high = estimate.costs(layout, where, prices, head, seconds)
        most = f" to {high:,.2f} on demand" if high > low * 1.001 else ""
        line += f"; {prices.currency} {low:,.2f}{most}, {low / max(1, samples):.4f} a sample"
    out.print(line, markup=False)
    guessed = [load.name for load in loads if load.rows and _guessed(load)]
    if guessed:
        out.print(f"  from published seconds, not measured ones: {', '.join(guessed)}", markup=False)


def _guessed(load: estimate.Load) -> bool:
    return load.rate.source.startswith(estimate.PUBLISHED)


def simulate(
    samples: Annotated[int, typer.Option(min=1, help="Samples of the run.")] = 1_000_000,
    prompts: Annotated[int, typer.Option(min=1, help="Samples of one identity.")] = 5,
    profile: Profile = None,
    file: File = None,
    overrides: Set = [],  # noqa: B006
    cluster: Cluster = None,
    gpus: Gpus = None,
    rates: Rates = [],  # noqa: B006
    prices: PriceFile = None,
    node_start: NodeStart = 300.0,
    load: Loading = 120.0,
    spot_hours: Annotated[float, typer.Option(help="Mean hours until a spot node is taken away; 0 for never.")] = 0.0,
    configured: Annotated[bool, typer.Option(help="Pools as configured instead of balanced ones.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Draw GPU use over time into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> int:
    """Play a run on a virtual clock: how long it takes, what the GPUs do, what lost spot nodes cost."""
    from ipvg_ray.pipeline import simulate as simulator
    from ipvg_ray.report import usage
    from ipvg_ray.stages import make_stages

    stages = make_stages(config.load(profile or "gpu", file=file, overrides=overrides))
    rows = {s.name: samples if s.grain == "sample" else -(-samples // prompts) for s in stages}
    around = Around(rates, cluster, prices, gpus if gpus or cluster else 8)
    loads = loads_of(stages, rows, around)
    where, _ = nodes_of(loads, around)
    layout = estimate.balance(loads, where, bounded=configured)
    conditions = simulator.Conditions(node_start, load, spot_hours)
    played = simulator.simulate(loads, where, layout.workers, conditions)
    told = _told(played, layout)
    if around.prices:
        known = estimate.read_prices(around.prices)
        told["cost"] = round(sum(hours * known.of(name) for name, hours in played.node_hours.items()), 2)
    if as_json:
        print(json.dumps(told))
    else:
        _print_played(told, played, layout)
    if svg is not None:
        width = played.held.width
        end = int(played.seconds / width) + 1
        busy = {name: stage.gpus.levels()[:end] for name, stage in played.stages.items() if stage.gpus.sums.any()}
        busy = {name: _stretched(levels, played.stages[name].gpus.width / width, end) for name, levels in busy.items()}
        svg.write_text(usage.draw(busy, played.held.levels()[:end], played.seconds, f"{samples} samples"))
        print(f"drawn: {svg}", file=sys.stderr)
    return EXIT_OK


def _stretched(levels: np.ndarray, ratio: float, length: int) -> np.ndarray:
    """Levels of bins that are `ratio` times as wide as the ones wanted, cut or filled up to `length`."""
    wanted = levels[np.minimum((np.arange(length) / ratio).astype(int), len(levels) - 1)]
    return wanted * (np.arange(length) / ratio < len(levels))


def _told(played: Any, layout: estimate.Layout) -> dict[str, Any]:
    return {
        "seconds": round(played.seconds, 1),
        "bottleneck": layout.bottleneck,
        "idle_share": round(played.idle_share(layout.bottleneck), 4),
        "node_hours": {name: round(hours, 2) for name, hours in played.node_hours.items()},
        "lost_nodes": played.lost_nodes,
        "stages": {
            name: {
                "workers": stage.workers,
                "busy_hours": round(stage.busy / 3600, 2),
                "idle_share": round(played.idle_share(name), 4),
                "rows_done_again": stage.redone,
            }
            for name, stage in played.stages.items()
        },
    }


def _print_played(told: Mapping[str, Any], played: Any, layout: estimate.Layout) -> None:
    from ipvg_ray.report import usage

    table = Table(box=None, pad_edge=False)
    for name in ("stage", "workers", "busy h", "idle", "done again", "GPUs over time"):
        table.add_column(name, justify="left" if name in ("stage", "GPUs over time") else "right", no_wrap=True)
    for name, stage in told["stages"].items():
        line = played.stages[name].gpus
        end = int(played.seconds / line.width) + 1
        picture = usage.spark(line.levels()[:end], float(line.levels().max()), 24) if line.sums.any() else ""
        idle = f"{100 * stage['idle_share']:.1f} %"
        numbers = (str(stage["workers"]), f"{stage['busy_hours']:,.1f}", idle, str(stage["rows_done_again"]))
        table.add_row(name, *numbers, picture)
    out.print(table)
    nodes = ", ".join(f"{name} {hours:,.0f} h" for name, hours in told["node_hours"].items())
    cost = f"; nodes cost {told['cost']:,.2f}" if "cost" in told else ""
    out.print(f"{duration(told['seconds'])}; nodes {nodes}; {told['lost_nodes']} lost{cost}", markup=False)
    idle = 100 * told["idle_share"]
    out.print(f"bottleneck {layout.bottleneck}: idle {idle:.1f} % between first and last row", markup=False)
