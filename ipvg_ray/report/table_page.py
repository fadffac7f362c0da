"""A table of scores as a page that needs no network: a plot a metric, the table, the comparisons, what is missing."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ipvg_ray import schema
from ipvg_ray.report.scored import Scored
from ipvg_ray.report.scores import label
from ipvg_ray.report.statistics import LOWER_IS_BETTER, Mean
from ipvg_ray.report.tabulate import DRAWN, Table, figure, interval


@dataclass(frozen=True)
class Mark:
    """One run in a plot.

    Attributes:
        name: the run's.
        mean, low, high, paper: places from left, 0 to 100; None where there is no such value.
        band: places between which 90 % of the videos lie.
        text, paper_text: the values as text, empty where there is none.
    """

    name: str
    mean: float | None
    low: float | None
    high: float | None
    paper: float | None
    band: tuple[float, float] | None
    text: str
    paper_text: str


@dataclass(frozen=True)
class Plot:
    """One metric: its heading, what it is, the values at the plot's ends, and a mark a run."""

    title: str
    doc: str
    lower_is_better: bool
    left: str
    right: str
    marks: list[Mark]


def page(table: Table) -> str:
    """The page's HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(label=label, figure=figure, interval=interval)
    rendered = environment.from_string(_asset("table.html")).render(
        title=table.title,
        metrics=table.metrics,
        plots=plots(table),
        rows=list(zip(table.runs, table.cells(), strict=True)),
        first=table.runs[0].name,
        pairings=table.pairings(),
        printed=any(table.paper.values()),
        missing=missing(table),
        drawn=DRAWN,
        css=Markup(_asset("page.css")),
    )
    return rendered.lstrip()


def plots(table: Table) -> list[Plot]:
    """A plot of each metric that any run has."""
    found = []
    for column, metric in enumerate(table.metrics):
        rows = [_row(run, metric, paper[column]) for run, (_, _, paper) in zip(table.runs, table.cells(), strict=True)]
        if all(row.mean.mean is None for row in rows):
            continue
        numbers = [value for row in rows for value in row.numbers()]
        marks = [_mark(row, min(numbers), max(numbers)) for row in rows]
        low, high = ("", "") if min(numbers) == max(numbers) else (figure(min(numbers)), figure(max(numbers)))
        field = schema.table("evaluate").columns[metric]
        doc = (field.metadata or {}).get(b"doc", b"").decode()
        found.append(Plot(label(metric), doc, metric in LOWER_IS_BETTER, low, high, marks))
    return found


@dataclass(frozen=True)
class _Row:
    name: str
    mean: Mean
    paper: float | None
    band: tuple[float, float] | None

    def numbers(self) -> list[float]:
        values = (self.mean.mean, self.mean.low, self.mean.high, self.paper, *(self.band or ()))
        return [value for value in values if value is not None]


def _row(run: Scored, metric: str, paper: float | None) -> _Row:
    values = list(run.scores.get(metric, {}).values())
    band = tuple(np.quantile(values, (0.05, 0.95)).tolist()) if values else None
    return _Row(run.name, run.mean(metric), paper, band)


def _mark(row: _Row, least: float, most: float) -> Mark:
    def place(value: float) -> float:
        return 50.0 if least == most else round(100 * (value - least) / (most - least), 2)

    def place_of(value: float | None) -> float | None:
        return None if value is None else place(value)

    mean = row.mean
    return Mark(
        row.name,
        mean=place_of(mean.mean),
        low=place_of(mean.low),
        high=place_of(mean.high),
        paper=place_of(row.paper),
        band=None if row.band is None else (place(row.band[0]), place(row.band[1])),
        text="" if mean.mean is None else figure(mean.mean),
        paper_text="" if row.paper is None else figure(row.paper),
    )


def missing(table: Table) -> list[tuple[str, list[str]]]:
    """What is not scored or failed, in words, and the runs of which that is so, with the number of videos."""
    found: dict[str, list[str]] = {}
    for run in table.runs:
        causes = {f"Not scored: {reason}": count for reason, count in run.skipped.items()}
        causes |= {f"Failed: {kind}": len(places) for kind, places in run.failed.items()}
        for words, count in causes.items():
            found.setdefault(words, []).append(f"{run.name} ({count})")
    return list(found.items())


def _asset(name: str) -> str:
    return (resources.files("ipvg_ray.report") / name).read_text(encoding="utf-8")
