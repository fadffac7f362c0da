"""`ipvg-ray evaluate`, `compare` and `experiment`."""

from __future__ import annotations

import hashlib
import json
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ipvg_ray import config
from ipvg_ray.cli_options import EXIT_ERROR, EXIT_OK, EXIT_ROWS_FAILED, File, Profile, RunDir, Set, out
from ipvg_ray.cli_runs import conclude, freezer, take
from ipvg_ray.errors import UserError
from ipvg_ray.storage import RunPath, run_path

_LISTED = 20

Accept = Annotated[bool, typer.Option(help="You have read the models' non-commercial terms and may use them.")]
Retry = Annotated[bool, typer.Option(help="Try rows that failed again.")]
Out = Annotated[Any, typer.Option("--out", "-o", parser=run_path, help="Run directory; resumed if it is there.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (evaluate, compare, experiment):
        app.command()(command)


def evaluate(
    videos: Annotated[str, typer.Option(help="Folder of the videos, local or a URI.")],
    refs: Annotated[str, typer.Option(help="Folder of the reference pictures, or an identity set with its prompts.")],
    prompts: Annotated[str | None, typer.Option(help="Prompts, where they are not in --refs: folder or file.")] = None,
    out_dir: Out = "scores",
    layout: Annotated[str, typer.Option(help="challenge, tpige or 2026; told by the folder if not given.")] = "auto",
    profile: Profile = None,
    file: File = None,
    overrides: Set = [],  # noqa: B006
    accept_licence: Accept = False,
    retry_failures: Retry = False,
) -> int:
    """Score videos that others made: idNNN/promptK.mp4, idNNN_K.mp4, or K.mp4 with eval.json."""
    from ipvg_ray.dataset.asked import asked, require_own_numbers
    from ipvg_ray.experiments import layout as files
    from ipvg_ray.pipeline import run as engine
    from ipvg_ray.report import tabulate
    from ipvg_ray.report.scored import read_scored
    from ipvg_ray.stages import given
    from ipvg_ray.stages.evaluate import EvaluateGivenStage

    videos_at = videos if "://" in videos else str(Path(videos).resolve())
    kind = given.layout_of(videos_at) if layout == "auto" else given.checked_layout(layout)
    values = {
        "dataset": asked(refs, prompts, _work_folder(out_dir), numbered=kind == "2026"),
        **_accepted(accept_licence),
    }
    settings = config.load(profile or config.default_profile(), file=file, overrides=overrides, values=values)
    stages = [given.GivenVideosStage(settings, videos_at, kind), EvaluateGivenStage(settings)]
    take(stages)
    _say_skipped(stages[1])
    request = _request(out_dir, settings, stages, retry_failures)

    def freeze(folder: Path) -> dict[str, Any]:
        found = freezer(settings)(folder)
        if kind == "2026":
            require_own_numbers(folder)
        return {**found, "videos": videos_at, "layout": kind}  # by which later commands know the run's stages

    try:
        result = engine.run(request, freeze)
    except engine.ChangedError as error:
        if "--redo-from" in str(error):
            error.add_note(
                f"These are options of `ipvg-ray run --out {shlex.quote(str(out_dir))}`, which goes on with this run "
                "too; this same command then writes the tables of scores."
            )
        raise
    code = conclude(out_dir, result, "the same command")
    if code not in (EXIT_OK, EXIT_ROWS_FAILED):
        return code
    found = read_scored(out_dir, Path(videos_at).name)
    _print_scores(found)
    names = files.write(tabulate.Table(f"Scores of {found.name}", [found], list(found.scores)), out_dir, "scores")
    out.print(escape(f"written to {out_dir}: {', '.join(names)}"))
    return code


def compare(
    first: RunDir,
    second: RunDir,
    fail_if: Annotated[
        list[str], typer.Option("--fail-if", help="Gate on the mean difference, such as arc_sim<-0.01.")
    ] = [],  # noqa: B006
    allow_missing: Annotated[
        bool, typer.Option(help="Let gates pass where the second run lacks scores that the first has.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> int:
    """Compare the scores of two runs on the samples that both have; ends with 1 where a gate of --fail-if holds."""
    from ipvg_ray.report import tabulate
    from ipvg_ray.report.scored import read_scored
    from ipvg_ray.report.statistics import Gate

    gates = [Gate.read(text) for text in fail_if]
    before, after = read_scored(first, str(first)), read_scored(second, str(second))
    found = tabulate.compared(before, after, list(before.scores))
    if not as_json:
        _print_compared(before, after, found)
    tripped = [gate for gate in gates if gate.holds(found, allow_missing=allow_missing)]
    if as_json:
        held = {str(gate): gate in tripped for gate in gates}
        print(json.dumps({"scores": {name: _plain(pairing) for name, pairing in found.items()}, "gates": held}))
        return EXIT_ERROR if tripped else EXIT_OK
    for gate in tripped:
        change = found[gate.score].difference.mean
        out.print(f"[red]gate {gate} holds:[/red] {gate.score} changed by {change:+.4f}")
    return EXIT_ERROR if tripped else EXIT_OK


def experiment(
    name: Annotated[str, typer.Argument(help="table1, table2, tpige, or a YAML file.")],
    source: Annotated[str, typer.Argument(help="Identity set: folder, file or s3:// URI.")],
    out_dir: Annotated[Any, typer.Option("--out", "-o", parser=run_path, help="Folder of the runs and the table.")],
    profile: Profile = None,
    file: File = None,
    overrides: Set = [],  # noqa: B006
    accept_licence: Accept = False,
    retry_failures: Retry = False,
) -> int:
    """Run the rows of a paper's table, or your own, sharing what they have in common; write the table."""
    from ipvg_ray.experiments import Variant, find
    from ipvg_ray.experiments import layout as files
    from ipvg_ray.pipeline import run as engine
    from ipvg_ray.report import tabulate
    from ipvg_ray.report.scored import read_scored
    from ipvg_ray.stages import make_stages

    wanted = find(name)
    wanted.refuse_overrides(overrides)
    path = source if "://" in source else str(Path(source).resolve())

    def settings_of(variant: Variant) -> config.Config:
        values: dict[str, Any] = {"dataset": {"path": path}}
        for tree in (_accepted(accept_licence), wanted.shared, variant.values):
            values = merged(values, tree)
        try:
            return config.load(profile or config.default_profile(), file=file, overrides=overrides, values=values)
        except config.ConfigError as error:
            raise config.ConfigError(f"{name}, row {variant.name!r}: {error}") from error

    # All of them before the first runs: a row that cannot be configured, or lacks a model, should not wait for hours.
    settings = [settings_of(variant) for variant in wanted.variants]
    plans = [(variant, one, make_stages(one)) for variant, one in zip(wanted.variants, settings, strict=True)]
    for variant, _, stages in plans:
        take(stages)
        try:
            engine.require_models(stages)
        except UserError as error:
            error.add_note(f"in {name}, row {variant.name!r}")
            raise
    done: list[RunPath] = []
    codes = []
    for variant, one, stages in plans:
        target = out_dir / files.folder_of(variant.name)
        request = _request(target, one, stages, retry_failures)
        out.print(f"\n[bold]{escape(variant.name)}[/bold]")
        if not (target / "run.json").is_file() and (base := files.best_source(done, request)) is not None:
            out.print(escape(f"takes over from {base}: {', '.join(engine.fork(base, request))}"))
        codes.append(conclude(target, engine.run(request, freezer(one))))
        if codes[-1] not in (EXIT_OK, EXIT_ROWS_FAILED):
            return codes[-1]
        done.append(target)
    runs = [read_scored(run, variant.name) for run, (variant, *_) in zip(done, plans, strict=True)]
    paper = {variant.name: variant.paper for variant, *_ in plans}
    table = tabulate.Table(wanted.title, runs, wanted.metrics, paper)
    names = files.write(table, out_dir)
    out.print(f"\n{tabulate.markdown(table)}", markup=False)
    out.print(escape(f"written to {out_dir}: {', '.join(names)}"))
    return max(codes)


def merged(tree: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, `more` over `tree`; neither is changed."""
    result = dict(tree)
    for key, value in more.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def _request(target: RunPath, settings: config.Config, stages: Any, retry_failures: bool) -> Any:
    from ipvg_ray.pipeline.rundir import Request

    values = settings.model_dump(mode="json")
    grace, traces = settings.stop_grace_s, settings.traces
    return Request(target, values, settings.seed, stages, retry_failures=retry_failures, grace_s=grace, traces=traces)


def _work_folder(out_dir: RunPath) -> Path:
    """Where prompts are brought into one form: in the run, or for a run in S3 at a place that a resume finds again."""
    if isinstance(out_dir, Path):
        return out_dir / "asked"
    digest = hashlib.sha256(str(out_dir).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"ipvg-ray-asked-{digest}"


def _accepted(accept: bool) -> dict[str, Any]:
    return {"evaluate": {"accept_licence": True}} if accept else {}


def _say_skipped(stage: Any) -> None:
    for metric, reason in stage.usable()[1].items():
        out.print(escape(f"skipped {metric}: {reason}"))


def _print_compared(before: Any, after: Any, found: Mapping[str, Any]) -> None:
    from ipvg_ray.report import tabulate

    table = Table(box=None, pad_edge=False)
    for name in ("score", "samples", "first", "second", "difference", "p", "wins"):
        table.add_column(name, justify="left" if name == "score" else "right")
    for name, pairing in found.items():
        ends = [tabulate.figure(mean) for mean in (pairing.first, pairing.second)]
        p = "" if pairing.p is None else f"{pairing.p:.4f}"
        wins = "" if pairing.wins is None else f"{pairing.wins:.0%}"
        table.add_row(name, str(pairing.count), *ends, escape(tabulate.interval(pairing.difference)), p, wins)
    out.print(table if found else "the two runs share no score")
    if found:
        out.print(f"Means are over the samples that both runs have. {tabulate.DRAWN}")
    _say_alone(before.scores, after.scores, found)


def _say_alone(first: Mapping[str, Any], second: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for place, names in (("first", set(first) - set(second)), ("second", set(second) - set(first))):
        if names:
            out.print(f"only the {place} run has {', '.join(sorted(names))}")
    for name, pairing in found.items():
        for place, count in (("first", pairing.only_first), ("second", pairing.only_second)):
            if count:
                out.print(f"[yellow]{count} samples have {name} in the {place} run alone[/yellow]")


def _plain(pairing: Any) -> dict[str, Any]:
    change = pairing.difference
    interval = {"difference": change.mean, "low": change.low, "high": change.high}
    means = {"first": pairing.first, "second": pairing.second}
    alone = {"only_first": pairing.only_first, "only_second": pairing.only_second}
    return {"samples": pairing.count, **alone, **means, **interval, "p": pairing.p, "wins": pairing.wins}


def _print_scores(found: Any) -> None:
    from ipvg_ray.report.tabulate import figure, interval

    table = Table(box=None, pad_edge=False)
    for name in ("score", "videos", "mean [95 %]", "missing as 0"):
        table.add_column(name, justify="left" if name == "score" else "right")
    for metric in found.scores:
        mean = found.mean(metric)
        cells = (f"{mean.count} of {len(found.asked)}", escape(interval(mean)), figure(found.counted(metric)))
        table.add_row(metric, *cells)
    out.print(table)
    for kind, places in found.failed.items():
        more = f" and {len(places) - _LISTED} more" if len(places) > _LISTED else ""
        out.print(escape(f"{kind}: {len(places)} ({', '.join(places[:_LISTED])}{more})"))
    for reason, count in found.skipped.items():
        out.print(escape(f"not scored, {count} videos: {reason}"))
