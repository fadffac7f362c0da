"""A table of scores as a page that needs no network: a plot a metric, the table, the comparisons, what is missing."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ipvg_ray import schema
from ipvg_ray.report.scores import label
from ipvg_ray.report.statistics import LOWER_IS_BETTER, Mean
from ipvg_ray.report.tabulate import DRAWN, Table, figure, interval


@dataclass(frozen=True)
class Mark:
    """One run in a plot.

    Attributes:
        name: the run's.
        mean, low, high, paper: places from left, 0 to 100; None where there is no such value.
        text, paper_text: the values as text, empty where there is none.
    """

    name: str
    mean: float | None
    low: float | None
    high: float | None
    paper: float | None
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
        rows = [(name, means[column], paper[column]) for name, means, paper in table.cells()]
        if all(mean.mean is None for _, mean, _ in rows):
            continue
        numbers = [v for _, mean, paper in rows for v in (mean.mean, mean.low, mean.high, paper) if v is not None]
        low, high = min(numbers), max(numbers)
        if low == high:  # one dot in the middle
            low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
        marks = [_mark(*row, low, high) for row in rows]
        field = schema.table("evaluate").columns[metric]
        doc = (field.metadata or {}).get(b"doc", b"").decode()
        found.append(Plot(label(metric), doc, metric in LOWER_IS_BETTER, figure(low), figure(high), marks))
    return found


def _mark(name: str, mean: Mean, paper: float | None, low: float, high: float) -> Mark:
    def place(value: float | None) -> float | None:
        return None if value is None else round(100 * (value - low) / (high - low), 2)

    texts = ["" if value is None else figure(value) for value in (mean.mean, paper)]
    return Mark(name, place(mean.mean), place(mean.low), place(mean.high), place(paper), *texts)


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
