"""Tables of scores as Markdown, CSV and LaTeX. Each row is a run, each column a metric."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ipvg_ray.report.facts import NOTHING
from ipvg_ray.report.scored import Scored
from ipvg_ray.report.scores import label
from ipvg_ray.report.statistics import LOWER_IS_BETTER, Mean, Pairing, paired

DRAWN = "Intervals are of a bootstrap that draws identities with all their samples."
Paper = Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """What is written.

    Attributes:
        title: above it.
        runs: one a row; the first is what the others are compared with.
        metrics: columns, in order.
        paper: run's name to the values that a paper prints for it.
    """

    title: str
    runs: Sequence[Scored]
    metrics: Sequence[str]
    paper: Mapping[str, Paper] = field(default_factory=dict)

    def cells(self) -> list[tuple[str, list[Mean], list[float | None]]]:
        """Of every run its name, its means and the paper's values."""
        return [
            (run.name, [run.mean(m) for m in self.metrics], [self.paper.get(run.name, {}).get(m) for m in self.metrics])
            for run in self.runs
        ]

    def pairings(self) -> list[tuple[str, dict[str, Pairing]]]:
        """Of every run but the first its name and, by metric, how it compares with the first."""
        first = self.runs[0]
        return [(run.name, compared(first, run, self.metrics)) for run in self.runs[1:]]


def compared(first: Scored, second: Scored, metrics: Sequence[str]) -> dict[str, Pairing]:
    """Metric to how the second run compares with the first; metrics that both have."""
    return {
        metric: paired(
            first.scores[metric],
            second.scores[metric],
            lower_is_better=metric in LOWER_IS_BETTER,
            owners=first.owners | second.owners,
        )
        for metric in metrics
        if metric in first.scores and metric in second.scores
    }


def figure(value: float | None) -> str:
    """Three decimals, or one from 10 on, where scores are not shares; a dash for none."""
    if value is None:
        return NOTHING
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def interval(mean: Mean) -> str:
    """`0.262 [0.251, 0.272]`, without the brackets for a single value."""
    if mean.low is None or mean.high is None:
        return figure(mean.mean)
    return f"{figure(mean.mean)} [{figure(mean.low)}, {figure(mean.high)}]"


def markdown(table: Table) -> str:
    """Means with their intervals, the paper's values under them, and the comparisons with the first run."""
    lines = [f"# {table.title}", ""]
    lines += _md_row(["", "videos", *map(label, table.metrics)]) + _md_row(["---"] * (2 + len(table.metrics)))
    for run, (name, means, paper) in zip(table.runs, table.cells(), strict=True):
        lines += _md_row([_md(name), f"{run.scored} of {len(run.asked)}", *map(interval, means)])
        if any(value is not None for value in paper):
            lines += _md_row([f"*paper: {_md(name)}*", "", *map(figure, paper)])
    lines += ["", f"Mean [interval at 95 %] over the videos that have the score. {DRAWN}", ""]
    if len(table.runs) > 1:
        lines += [f"## Against {_md(table.runs[0].name)}, sample by sample", ""]
        lines += _md_row(["", "score", "samples", "difference", "p", "wins"]) + _md_row(["---"] * 6)
        for name, pairings in table.pairings():
            for metric, found in pairings.items():
                p = NOTHING if found.p is None else f"{found.p:.4f}"
                wins = NOTHING if found.wins is None else f"{found.wins:.0%}"
                lines += _md_row([_md(name), label(metric), str(found.count), interval(found.difference), p, wins])
        lines += [
            "",
            "p: sign-flip permutation test, two-sided, one sign an identity. Wins: share of samples that are better, "
            "ties half.",
            "",
        ]
    for run in table.runs:
        lines += [
            f"- {_md(run.name)}, not scored: {_md(reason)} ({count} videos)" for reason, count in run.skipped.items()
        ]
        lines += [f"- {_md(run.name)}, failed: {kind} ({len(places)})" for kind, places in run.failed.items()]
    return "\n".join(lines).rstrip() + "\n"


def _md_row(cells: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(cells)} |"]


def _md(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def as_csv(table: Table) -> str:
    """One line a run and metric: run, metric, videos, mean, low, high, counted, paper."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(["run", "metric", "videos", "mean", "low", "high", "mean_missing_as_0", "paper"])
    for run, (name, means, paper) in zip(table.runs, table.cells(), strict=True):
        for metric, mean, value in zip(table.metrics, means, paper, strict=True):
            cells = (mean.mean, mean.low, mean.high, run.counted(metric), value)
            lines.writerow([name, metric, mean.count, *("" if cell is None else repr(cell) for cell in cells)])
    return out.getvalue()


def samples_csv(table: Table) -> str:
    """One line a run and sample: run, sample, and every metric's value."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(["run", "sample_id", *table.metrics])
    for run in table.runs:
        for sample in run.asked:
            values = [run.scores.get(metric, {}).get(sample) for metric in table.metrics]
            lines.writerow([run.name, sample, *("" if value is None else repr(value) for value in values)])
    return out.getvalue()


def comparisons_csv(table: Table) -> str:
    """One line a metric and run but the first: how it compares with the first, sample by sample."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    head = ["run", "against", "metric", "samples", "mean_against", "mean", "difference", "low", "high", "p", "wins"]
    lines.writerow(head)
    for name, pairings in table.pairings():
        for metric, found in pairings.items():
            change = found.difference
            cells = (found.first, found.second, change.mean, change.low, change.high, found.p, found.wins)
            texts = ["" if cell is None else repr(cell) for cell in cells]
            lines.writerow([name, table.runs[0].name, metric, found.count, *texts])
    return out.getvalue()


def latex(table: Table) -> str:
    """A booktabs table of the means, the best of each column bold, the paper's values in brackets."""
    cells = table.cells()
    best = []
    for column, metric in enumerate(table.metrics):
        values = [value for _, means, _ in cells if (value := means[column].mean) is not None]
        best.append((min if metric in LOWER_IS_BETTER else max)(values, default=None))
    lines = [f"% {table.title}", rf"\begin{{tabular}}{{l{'c' * len(table.metrics)}}}", r"\toprule"]
    lines += [" & ".join(["", *(_tex(label(metric)) for metric in table.metrics)]) + r" \\", r"\midrule"]
    for name, means, paper in cells:
        texts = []
        for mean, value, top in zip(means, paper, best, strict=True):
            text = figure(mean.mean).replace(NOTHING, "--")
            text = rf"\textbf{{{text}}}" if mean.mean is not None and mean.mean == top else text
            texts.append(text if value is None else f"{text} ({figure(value)})")
        lines.append(" & ".join([_tex(name), *texts]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _tex(text: str) -> str:
    for character in "&%$#_{}":
        text = text.replace(character, "\\" + character)
    return text.replace("→", r"$\rightarrow$")
