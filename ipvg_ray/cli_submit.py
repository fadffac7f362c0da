"""`ipvg-ray submit`: a run as a job on a cluster, with this very code, followed to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import ipvg_ray
from ipvg_ray import config, secrets
from ipvg_ray.cli_options import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_OK, EXIT_ROWS_FAILED, out
from ipvg_ray.errors import UserError
from ipvg_ray.schema import schema_dir
from ipvg_ray.storage import S3Path

_PACKED = ("*.py", "*.yaml", "*.txt", "*.html", "*.css", "*.js")
_PARTING = 15.0
"""Seconds that a stopped job has beyond its grace before Ray kills it, to write down how it ended."""
_AGAIN = 2.0
"""Seconds before a connection to the cluster is made again."""
_SILENCE = 300.0
"""Seconds without an answer after which the cluster is taken to be gone."""


class SubmitError(UserError):
    """A job that cannot be submitted; the message says what mends it."""


@dataclass(frozen=True)
class Job:
    """What is submitted: the command that the cluster runs, the run directory, and the seconds of grace of a stop."""

    command: list[str]
    run_dir: str
    grace_s: float


def submit(
    context: typer.Context,
    address: Annotated[str, typer.Option(help="Of the cluster's job port.")] = "http://127.0.0.1:8265",
    wait: Annotated[bool, typer.Option(help="Follow the job to its end.")] = True,
) -> int:
    """Run on a cluster: `ipvg-ray submit -- IDENTITIES --out s3://bucket/run --profile gpu -c deploy/pools.yaml`.

    What stands behind `--` are the options of `ipvg-ray run`. Submit the same again to go on where it ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = pack(list(context.args), Path(folder))
        client = _client(address)
        name = f"ipvg-ray-{_slug(job.run_dir)}-{uuid.uuid4().hex[:6]}"
        # Ray removes a package with the last job that used it, and must not do so under one that is just beginning.
        (Path(folder) / "submission.txt").write_text(name)
        client.submit_job(
            entrypoint=shlex.join(job.command),
            submission_id=name,
            runtime_env={
                "working_dir": folder,
                # Ray kills a stopped job after three seconds unless it is told otherwise.
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": f"{job.grace_s + _PARTING:g}", **_telemetry(os.environ)},
            },
            metadata={"run": job.run_dir},
        )
    out.print(f"submitted {name}", markup=False)
    out.print(f"stop it, letting rows finish: ray job stop --address {address} {name}", markup=False)
    if not wait:
        return EXIT_OK
    try:
        asyncio.run(_follow(client, name, address))
    except KeyboardInterrupt:
        out.print(f"\nthe job goes on; follow it with: ray job logs --address {address} -f {name}", markup=False)
        return EXIT_INTERRUPTED
    return _conclude(client, name, address, list(context.args))


def _telemetry(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that say where traces go, but for those that may hold keys: a job's are shown on the dashboard."""
    given = {name: value for name, value in environment.items() if name.startswith("OTEL_") and "HEADERS" not in name}
    hidden = set(secrets.found_in(given))
    return {name: value for name, value in given.items() if name not in hidden}


def pack(arguments: list[str], folder: Path) -> Job:
    """Put what the job needs into `folder`: this package, and the configuration file if one is named. Nothing else.

    Args:
        arguments: of `ipvg-ray run`.

    Raises:
        SubmitError: where they name no run directory that the cluster can write to.
        ConfigError: where the configuration they name is wrong.
    """
    from typer.main import get_command

    from ipvg_ray.cli import app

    command = get_command(app).commands["run"]  # type: ignore[attr-defined]
    given = command.make_context("ipvg-ray run", list(arguments)).params  # raises for an option that is not there
    run_dir = given["out_dir"]
    if not isinstance(run_dir, S3Path) and not run_dir.is_absolute():
        raise SubmitError(f"--out {run_dir}: name a place that all nodes see, s3://bucket/run or an absolute path")
    source = given["source"]
    if source and "://" not in source and not Path(source).is_absolute():
        raise SubmitError(f"{source}: name the identity set as the cluster sees it, s3://… or an absolute path")
    if source and given["profile"] is None:
        arguments = [*arguments, "--profile", "gpu"]  # the head has no GPU, and would take the miniatures
    settings = config.load(given["profile"] or "gpu", file=given["file"], overrides=given["overrides"])
    package = Path(ipvg_ray.__file__).parent
    _copy(package, folder / "ipvg_ray")
    _copy(schema_dir(), folder / "ipvg_ray" / "schemas")
    if given["file"] is not None:
        shutil.copy(given["file"], folder / "config.yaml")
    command_line = ["python", "-m", "ipvg_ray", "run", *_renamed(arguments)]
    return Job(command_line, str(run_dir), settings.stop_grace_s)


def _copy(source: Path, target: Path) -> None:
    for pattern in _PACKED:
        for file in source.rglob(pattern):
            if "__pycache__" not in file.parts:
                place = target / file.relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, place)


def _renamed(arguments: list[str]) -> list[str]:
    """The arguments with the configuration file's name inside the job."""
    renamed: list[str] = []
    for argument in arguments:
        if renamed and renamed[-1] in ("-c", "--config"):
            renamed.append("config.yaml")
        elif argument.startswith("--config="):
            renamed.append("--config=config.yaml")
        elif re.match("-c[^-]", argument):
            renamed.append("-cconfig.yaml")
        else:
            renamed.append(argument)
    return renamed


def _slug(run_dir: str) -> str:
    return re.sub("[^a-z0-9]+", "-", run_dir.rpartition("/")[2].lower()).strip("-")[:30] or "run"


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        mend = "is the cluster up, and `ray dashboard cluster.yaml` running?"
        raise SubmitError(f"no cluster answers at {address}: {mend} ({error})") from error


async def _follow(client: Any, name: str, address: str) -> None:
    """Print the job's log as it grows until the job has ended; a connection that ends before that is made again.

    Raises:
        SubmitError: where the cluster stays silent.
    """
    printed, answered = 0, time.monotonic()
    while True:
        printed = await _print_log(client, name, printed)
        try:
            ended = client.get_job_info(name).status.is_terminal()
            answered = time.monotonic()
        except (RuntimeError, OSError) as error:
            if time.monotonic() - answered > _SILENCE:
                mend = f"the job may go on; look with: ray job status --address {address} {name}"
                raise SubmitError(f"the cluster has not answered for {_SILENCE:g} s; {mend} ({error})") from error
            ended = False
        if ended:  # Ray ends a connection when the job has, without its last words if they came late
            with contextlib.suppress(RuntimeError, OSError):
                print(client.get_job_logs(name)[printed:], end="", flush=True)
            return
        await asyncio.sleep(_AGAIN)


async def _print_log(client: Any, name: str, printed: int) -> int:
    """Print the job's log without its first `printed` characters, until the connection ends; returns how many have
    been printed now."""
    from aiohttp import ClientError

    passed = 0
    with contextlib.suppress(RuntimeError, OSError, ClientError):
        async for lines in client.tail_job_logs(name):  # from its begin, each time
            passed += len(lines)
            if passed > printed:
                print(lines[printed - passed :], end="", flush=True)
                printed = passed
    return printed


def _conclude(client: Any, name: str, address: str, arguments: list[str]) -> int:
    """Say how the job ended and what to do now; returns the exit code of the run itself."""
    info = client.get_job_info(name)
    again = f"ipvg-ray submit --address {address} -- {shlex.join(arguments)}"
    code = EXIT_INTERRUPTED if info.status == "STOPPED" else info.driver_exit_code
    if info.status == "SUCCEEDED":
        out.print(f"{name}: done", markup=False)
        return EXIT_OK
    if code == EXIT_ROWS_FAILED:
        out.print(f"{name}: done, but some rows failed; try them again with: {again} --retry-failures", markup=False)
        return EXIT_ROWS_FAILED
    told = f", exit code {code}" if code is not None else f": {info.message}"
    out.print(f"{name}: {info.status.lower()}{told}", markup=False)
    out.print(f"go on with: {again}", markup=False)
    return EXIT_ERROR if code is None else int(code)
