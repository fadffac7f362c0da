"""The command `ipvg-ray`. Thin: reads options, builds the configuration, calls the rooms, prints what came of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ipvg_ray import __version__, cli_estimate, cli_evaluate, cli_hyperlora, cli_models, cli_submit, config, tables
from ipvg_ray.cli_options import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_ROWS_FAILED,
    EXIT_USAGE,
    File,
    Profile,
    RunDir,
    Set,
    out,
)
from ipvg_ray.cli_runs import conclude, freezer, take
from ipvg_ray.errors import UserError
from ipvg_ray.secrets import redact
from ipvg_ray.storage import RunPath, run_path

HELP = "Turn a set of faces and prompts into identity-preserving videos; resumable, on a laptop or a cluster."
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP)
dataset_app = typer.Typer(no_args_is_help=True, help="Read identity sets, make the demonstration set.")
app.add_typer(cli_models.app, name="models")
app.add_typer(cli_hyperlora.app, name="hyperlora")
app.add_typer(dataset_app, name="dataset")
cli_evaluate.register(app)
app.command()(cli_estimate.simulate)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(cli_submit.submit)

Input = Annotated[str | None, typer.Argument(help="Identity set: folder, file or s3:// URI. Leave out to resume.")]
Run = Annotated[
    Any,
    typer.Option("--out", "-o", parser=run_path, help="Run directory, local or s3://; made if new, resumed if not."),
]
Until = Annotated[str | None, typer.Option(help="Last stage to run.")]


@app.command()
def run(
    source: Input = None,
    out_dir: Run = "run",
    profile: Profile = None,
    file: File = None,
    overrides: Set = [],  # noqa: B006 - typer wants a list
    until: Until = None,
    strict: Annotated[bool, typer.Option(help="Stop at the first problem in the identity set.")] = False,
    retry_failures: Annotated[bool, typer.Option(help="Try rows that failed again.")] = False,
    redo_from: Annotated[str | None, typer.Option(help="Remove this stage's and later results first.")] = None,
    fork: Annotated[Any, typer.Option(parser=run_path, help="Start this new run from what is still valid.")] = None,
    in_turn: Annotated[
        bool, typer.Option(help="On a cluster that will not grow: stages in groups that fit it.")
    ] = False,
) -> int:
    """Turn an identity set into videos; on an existing run directory, do only what is missing."""
    from ipvg_ray.pipeline import run as engine
    from ipvg_ray.stages import stages_of

    settings = _settings(out_dir, source, profile, file, overrides, strict)
    stages = stages_of(settings, _kept(out_dir), until)
    take(stages)
    target = fork or out_dir
    values = settings.model_dump(mode="json")
    grace, traces = settings.stop_grace_s, settings.traces
    request = engine.Request(
        target, values, settings.seed, stages, redo_from, retry_failures, in_turn, grace_s=grace, traces=traces
    )
    if fork is not None:
        engine.require_models(stages)
        kept = engine.fork(out_dir, request)
        out.print(escape(f"{fork} takes over from {out_dir}: {', '.join(kept) or 'the identity set alone'}"))
    result = engine.run(request, freezer(settings))
    return conclude(target, result)


@app.command()
def plan(
    source: Input = None,
    out_dir: Run = "run",
    profile: Profile = None,
    file: File = None,
    overrides: Set = [],  # noqa: B006
    until: Until = None,
    strict: bool = False,
    cluster: cli_estimate.Cluster = None,
    prices: cli_estimate.PriceFile = None,
    gpus: cli_estimate.Gpus = None,
    rates: cli_estimate.Rates = [],  # noqa: B006
) -> int:
    """Show what a run would do: stages, pools, rows to do; with a cluster or GPUs named also hours, nodes and cost.
    Reads the identity set, runs nothing."""
    from ipvg_ray.pipeline import run as engine
    from ipvg_ray.stages import stages_of

    settings = _settings(out_dir, source, profile, file, overrides, strict)
    stages = stages_of(settings, _kept(out_dir), until)
    request = engine.Request(out_dir, settings.model_dump(mode="json"), settings.seed, stages)
    with engine.opened(request, freezer(settings)) as this:
        _print_plan(settings, this)
        counts = this.found.counts
    if cluster or prices or gpus or rates:
        around = cli_estimate.Around([out_dir, *rates], cluster, prices, gpus)
        waiting = {name: count.waiting for name, count in counts.items()}
        cli_estimate.show(stages, waiting, list(counts.values())[-1].waiting, around)
    return EXIT_OK


@app.command()
def report(
    run_dir: RunDir,
    links: Annotated[
        float, typer.Option(help="Hours for which links to videos of a run in S3 open without credentials.")
    ] = 0.0,
) -> int:
    """Write <run>/report.html from the run's files, also while it is running."""
    from ipvg_ray.report.page import write_report

    tables.read_run(run_dir)
    out.print(escape(f"report: {write_report(run_dir, round(links * 3600))}"))
    return EXIT_OK


@app.command()
def status(
    run_dir: RunDir,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> int:
    """Say how a run stands, live or dead, from its files alone."""
    from ipvg_ray.pipeline.progress import duration
    from ipvg_ray.pipeline.status import status as read
    from ipvg_ray.report.facts import losses
    from ipvg_ray.stages import stages_of

    kept = tables.read_run(run_dir)
    found = read(run_dir, stages_of(config.from_tree(kept["config"]), kept))
    if as_json:
        print(json.dumps(found.as_json()))
        return EXIT_OK
    out.print(f"in use by {found.running}" if found.running else f"not running; last start: {found.outcome}")
    table = Table(box=None, pad_edge=False)
    for name in ("stage", "done", "failed", "failed before", "to do", "rows/s", "time left", "node to first row"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for name, stage in found.stages.items():
        counts = stage.counts
        left = duration(stage.seconds_left) if stage.seconds_left else ""
        numbers = (f"{counts.done} / {counts.total}", counts.failed, counts.lost, counts.waiting)
        first = duration(stage.first_row_seconds) if stage.first_row_seconds else ""
        table.add_row(name, *map(str, numbers), f"{stage.rate:.2f}" if stage.rate else "", left, first)
    out.print(table)
    for line in losses(found.lost):
        out.print(line)
    if found.problems:
        out.print(f"{found.problems} problems in the identity set")
    return EXIT_OK


@app.command()
def failures(
    run_dir: RunDir,
    stage: Annotated[str | None, typer.Option(help="Only this stage's (dataset: the identity set's).")] = None,
    kind: Annotated[str | None, typer.Option(help="Only of this kind.")] = None,
    row: Annotated[str | None, typer.Option(help="Only this identity's or sample's, with its traceback.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines: one JSON object a line.")] = False,
) -> int:
    """List the rows that could not be finished, and why."""
    tables.read_run(run_dir)
    found = [
        failure
        for failure in tables.read_table(run_dir, "failures").to_pylist()
        if stage in (None, failure["stage"])
        and kind in (None, failure["kind"])
        and row in (None, failure["identity_id"], failure["sample_id"])
    ]
    if as_json:
        for failure in found:
            print(json.dumps(failure, default=str, ensure_ascii=False))
        return EXIT_OK
    table = Table(box=None, pad_edge=False)
    for name in ("stage", "row", "kind", "attempt", "message"):
        table.add_column(name, overflow="fold")
    for failure in found:
        place = failure["sample_id"] or failure["identity_id"]
        cells = (failure["stage"], place, failure["kind"], str(failure["attempt"]), failure["message"])
        table.add_row(*map(escape, cells))
    out.print(table if found else "no failures")
    for failure in found if row else []:
        out.print(f"\n{failure['traceback'] or 'no traceback: the stage refused the row knowingly'}", markup=False)
    return EXIT_OK


@app.command()
def replay(
    run_dir: RunDir,
    stage: Annotated[str, typer.Argument(help="The stage to run.")],
    row: Annotated[str, typer.Argument(help="The identity's or sample's id.")],
    media: Annotated[Path, typer.Option(help="Folder for videos that the stage makes.")] = Path("replay"),
) -> int:
    """Run one row through one stage here and now, for debugging; the run is left as it is."""
    from ipvg_ray.pipeline import replay as player
    from ipvg_ray.pipeline.rundir import Request
    from ipvg_ray.pipeline.stage import RowError
    from ipvg_ray.stages import stages_of

    kept = tables.read_run(run_dir)
    settings = config.from_tree(kept["config"])
    stages = stages_of(settings, kept, stage)
    request = Request(run_dir.resolve(), settings.model_dump(mode="json"), settings.seed, stages)
    device = "cuda" if stages[-1].resources().gpus else "cpu"
    result = player.replay(request, row, media, device)
    if isinstance(result, RowError):
        out.print(f"[red]{escape(result.kind)}[/red]: {escape(result.message)}")
        return EXIT_ROWS_FAILED
    for name, value in result.items():
        out.print(f"{name}: {player.summary(value)}", markup=False)
    return EXIT_OK


@app.command()
def compact(
    run_dir: RunDir,
    part_mb: Annotated[int, typer.Option(help="Size that merged part files are to reach, MB.")] = 256,
) -> int:
    """Merge small part files of a run that nobody is working in: tables of many rows then open faster."""
    from ipvg_ray.pipeline.compact import compact as merge

    for name, (before, after) in merge(run_dir, part_mb << 20).items():
        out.print(f"{name}: {before} parts, now {after}")
    return EXIT_OK


@app.command()
def export(
    run_dir: RunDir,
    target: Annotated[Path, typer.Argument(help="New folder.")],
) -> int:
    """Write finished samples in the original layout: idNNN/promptK.mp4, first frames, prompt tables."""
    from ipvg_ray.dataset.export import export as write

    tables.read_run(run_dir)
    out.print(escape(f"{write(run_dir, target)} videos exported to {target}"))
    return EXIT_OK


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where to put models, identity set and run.")] = Path("demo"),
) -> int:
    """Make miniature models and a small identity set, run every stage on them, check what came out."""
    from ipvg_ray.demo import run_demo

    return run_demo(folder, out.print)


@dataset_app.command("demo")
def dataset_demo(folder: Annotated[Path, typer.Argument(help="New folder.")]) -> int:
    """Make the demonstration identity set from pictures that installed packages carry."""
    from ipvg_ray.dataset.demo import make_demo

    out.print(escape(f"identity set: {make_demo(folder)}"))
    return EXIT_OK


@app.command()
def version() -> int:
    """Print the version."""
    out.print(__version__)
    return EXIT_OK


def _settings(
    run_dir: RunPath, source: str | None, profile: str | None, file: Path | None, overrides: list[str], strict: bool
) -> config.Config:
    """The configuration asked for; on an existing run its own is the base, unless a profile or a file is named."""
    dataset: dict[str, Any] = {"strict": True} if strict else {}
    if source is not None:
        dataset["path"] = source if "://" in source else str(Path(source).resolve())
    kept = _kept(run_dir).get("config")
    if kept is not None and profile is None and file is None:
        return config.updated(kept, overrides, {"dataset": dataset})
    if kept is not None and source is None:
        dataset = kept["dataset"] | dataset
    settings = config.load(
        profile or config.default_profile(), file=file, overrides=overrides, values={"dataset": dataset}
    )
    if settings.dataset.path is None:
        raise config.ConfigError(f"{run_dir} is not a run to resume: name an identity set")
    return settings


def _kept(run_dir: RunPath) -> dict[str, Any]:
    """What run.json holds; empty where there is no run yet."""
    return tables.read_run(run_dir) if (run_dir / "run.json").is_file() else {}


def _print_plan(settings: config.Config, this: Any) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("stage", "per", "workers", "batch", "each asks for", "done", "failed", "to do"):
        table.add_column(name, no_wrap=True)
    for step in this.steps:
        asks, counts = step.stage.resources(), this.found.counts[step.name]
        wants = f"{asks.cpus:g} CPU" + (f", {asks.gpus:g} GPU" if asks.gpus else "")
        wants += f" {asks.accelerator_type}" if asks.accelerator_type else ""
        wants += f", {asks.memory_gb:g} GiB" if asks.memory_gb else ""
        wants += "".join(f", {key}={value}" for key, value in asks.label_selector.items())
        workers = str(asks.min_workers) + (f"-{asks.max_workers}" if asks.max_workers > asks.min_workers else "")
        numbers = (counts.done, counts.failed, counts.waiting)
        table.add_row(step.name, step.stage.grain, workers, str(asks.batch_size), wants, *map(str, numbers))
    out.print(escape(f"profile {settings.profile}, seed {settings.seed}, run directory {this.store.run_dir}\n"))
    out.print(table)
    out.print("\nmodels")
    for step in this.steps:
        for field, path in step.stage.models().items():
            out.print(f"  {step.name}.{field}: {path}", markup=False)
    for step in this.steps:
        for note in step.stage.notes():
            out.print(f"{step.name}: {note}", markup=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 error, 2 wrong usage, 3 some rows failed, 130 interrupted."""
    try:
        code = app(args=arguments, prog_name="ipvg-ray", standalone_mode=False)
    except typer.Exit as stop:
        code = stop.exit_code
    except typer.Abort:
        code = EXIT_INTERRUPTED
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except Exception as error:
        code = _explain(error)
    return int(code or 0)


def _explain(error: Exception) -> int:
    """Errors that name their mend are printed as they are; anything else is ours, with its traceback."""
    show = getattr(error, "show", None)
    if show is not None and hasattr(error, "exit_code"):  # a usage error; typer brings its own click from 0.20 on
        show()
        return EXIT_USAGE
    if not isinstance(error, UserError):
        raise error
    notes = "\n".join(getattr(error, "__notes__", []))
    print(redact(f"ipvg-ray: {error}" + (f"\n{notes}" if notes else "")), file=sys.stderr)
    return EXIT_USAGE if isinstance(error, config.ConfigError) else EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())
