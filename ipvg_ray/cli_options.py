"""What the commands share: options, exit codes, the console."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ipvg_ray import config
from ipvg_ray.storage import run_path

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_ROWS_FAILED, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

Profile = Annotated[str | None, typer.Option(help="Built-in profile: " + ", ".join(config.profiles()) + ".")]
File = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file with any part of the configuration.")]
Set = Annotated[list[str], typer.Option("--set", "-s", help="section.field=value, such as video.steps=4.")]

RunDir = Annotated[Any, typer.Argument(help="Run directory, local or s3://bucket/prefix.", parser=run_path)]

out = Console(highlight=False, soft_wrap=True)
