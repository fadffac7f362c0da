"""Tables of scores as Markdown, CSV and LaTeX, and a page with plots. Each row is a run, each column a metric."""

from __future__ import annotations

import csv
import html
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
        most = max((len(values) for values in run.scores.values()), default=0)
        lines += _md_row([_md(name), f"{most} of {len(run.asked)}", *map(interval, means)])
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


_ROW, _LEFT, _WIDTH = 26, 220, 420


def page(table: Table) -> str:
    """An HTML page that needs no network: a plot a metric, each run's mean with its interval, the paper's as a ring."""
    plots = "\n".join(_plot(table, column, metric) for column, metric in enumerate(table.metrics))
    style = "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:46rem}svg{width:100%}"
    style += "pre{overflow:auto;background:#8881;padding:1rem}circle.paper{fill:none;stroke:#c60;stroke-width:2}"
    title = html.escape(table.title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"<h1>{title}</h1><p>Dots are means, lines their bootstrap intervals at 95 %, rings the paper's values.</p>"
        f"{plots}<pre>{html.escape(markdown(table))}</pre></html>\n"
    )


def _plot(table: Table, column: int, metric: str) -> str:
    rows = [(name, means[column], paper[column]) for name, means, paper in table.cells()]
    numbers = [v for _, m, p in rows for v in (m.mean, m.low, m.high, p) if v is not None]
    if not numbers:
        return ""
    low, high = min(numbers), max(numbers)
    span = (high - low) or abs(high) or 1.0

    def x(value: float) -> float:
        return round(_LEFT + _WIDTH * (value - low) / span, 1)

    height = _ROW * len(rows) + 12
    parts = [f'<h2>{html.escape(label(metric))}</h2><svg viewBox="0 0 {_LEFT + _WIDTH + 80} {height}" role="img">']
    for number, (name, mean, paper) in enumerate(rows):
        y = _ROW * number + 18
        parts.append(f'<text x="0" y="{y + 5}" font-size="13" fill="currentColor">{html.escape(name[:34])}</text>')
        if mean.low is not None and mean.high is not None:
            parts.append(f'<path d="M{x(mean.low)} {y}H{x(mean.high)}" stroke="currentColor" stroke-width="2"/>')
        if mean.mean is not None:
            parts.append(f'<circle cx="{x(mean.mean)}" cy="{y}" r="5" fill="currentColor"/>')
            tip = f'<text x="{x(mean.mean) + 9}" y="{y - 4}" font-size="11" fill="currentColor">'
            parts.append(f"{tip}{figure(mean.mean)}</text>")
        if paper is not None:
            parts.append(f'<circle class="paper" cx="{x(paper)}" cy="{y}" r="7"/>')
    return "".join([*parts, "</svg>"])
