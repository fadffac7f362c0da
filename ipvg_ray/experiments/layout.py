"""Where an experiment's runs lie, which of them a new one can begin from, and the files its table is written to."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ipvg_ray import tables
from ipvg_ray.pipeline import fingerprint
from ipvg_ray.pipeline.rundir import Request
from ipvg_ray.report import table_page, tabulate
from ipvg_ray.storage import RunPath


def folder_of(name: str) -> str:
    """A variant's name as the name of its run's folder: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower().replace("→", "-to-")).strip("-")


def best_source(runs: Sequence[RunPath], request: Request) -> RunPath | None:
    """Of these runs the one with the most stages whose results hold for the request; None where none has any."""
    best, most = None, 0
    for run_dir in runs:
        run = tables.read_run(run_dir)
        prints = fingerprint.fingerprints(request.stages, request.seed, run["dataset"]["digest"])
        same = sum(run["stages"].get(name, {}).get("fingerprint") == made.digest for name, made in prints.items())
        if same > most:
            best, most = run_dir, same
    return best


def write(table: tabulate.Table, folder: RunPath, name: str = "table") -> list[str]:
    """Write the table as Markdown, CSV, LaTeX and a page with plots, every sample's scores, and how the runs compare.

    Returns:
        The files' names.
    """
    texts = {
        f"{name}.md": tabulate.markdown(table),
        f"{name}.csv": tabulate.as_csv(table),
        f"{name}.tex": tabulate.latex(table),
        f"{name}.html": table_page.page(table),
        f"{name}_samples.csv": tabulate.samples_csv(table),
    }
    if len(table.runs) > 1:
        texts[f"{name}_comparisons.csv"] = tabulate.comparisons_csv(table)
    for file, text in texts.items():
        (folder / file).write_bytes(text.encode())
    return list(texts)
