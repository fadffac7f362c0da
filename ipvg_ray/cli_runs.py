"""What the commands that run stages have in common: models brought here, the identity set frozen, what came of it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from ipvg_ray import config
from ipvg_ray.cli_options import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_OK, EXIT_ROWS_FAILED, out
from ipvg_ray.storage import RunPath


def take(stages: Sequence[Any]) -> None:
    """Bring the stages' models to this machine where a mirror is set. Raises FetchError."""
    from ipvg_ray.pipeline.staging import take_models

    for name in take_models(stages):
        out.print(f"took {name} from the mirror", markup=False)


def freezer(settings: config.Config) -> Callable[[Path], dict[str, Any]]:
    """What freezes the identity set of these settings, and says what came of it."""
    from ipvg_ray.dataset.freeze import freeze

    def write(folder: Path) -> dict[str, Any]:
        found = freeze(settings.dataset, folder)
        out.print(f"identity set: {found.identities} identities, {found.samples} samples, {found.problems} problems")
        for problem in found.first:
            place = problem.where or problem.sample_id or problem.identity_id
            out.print(f"  [yellow]{problem.kind}[/yellow] {escape(place)}: {escape(problem.message)}")
        if found.problems > len(found.first):
            out.print(f"  … and {found.problems - len(found.first)} more; all are in failures/")
        return {
            "path": settings.dataset.path,
            "format": settings.dataset.format,
            "identities": found.identities,
            "samples": found.samples,
            "problems": found.problems,
        }

    return write


def conclude(run_dir: RunPath, result: Any, again: str | None = None) -> int:
    """Say what came of a start; `again` is the command that goes on with it, `run` unless given."""
    from ipvg_ray.pipeline.progress import duration
    from ipvg_ray.report.page import write_report

    page = write_report(run_dir)
    last = list(result.counts.values())[-1]
    place = escape(shlex.quote(str(run_dir)))
    again = escape(again or f"ipvg-ray run --out {shlex.quote(str(run_dir))}")
    if result.outcome == "interrupted":
        out.print(f"interrupted after {duration(result.seconds)}; finished rows are kept. ", end="")
        out.print(f"Go on with: {again}")
        return EXIT_INTERRUPTED
    if result.waiting:
        out.print(f"[red]{result.waiting} rows were not reached.[/red] Go on with: {again}")
        return EXIT_ERROR
    out.print(f"{last.done} of {last.total} rows finished in {duration(result.seconds)}; report: {escape(str(page))}")
    if not result.failed:
        return EXIT_OK
    out.print(f"[yellow]{result.failed} failed[/yellow]: ipvg-ray failures {place}")
    if result.failed > result.problems:
        out.print(f"try them again with: {again} --retry-failures")
    return EXIT_ROWS_FAILED
