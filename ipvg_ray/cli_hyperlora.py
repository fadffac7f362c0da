"""`ipvg-ray hyperlora`: what HyperLoRA makes, for use in other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ipvg_ray import config
from ipvg_ray.cli_options import EXIT_OK, File, Profile, Set, out

app = typer.Typer(no_args_is_help=True, help="Use HyperLoRA's results in other programs.")


@app.callback()
def group() -> None:
    """Keep `export` a command of its own: typer would take a single one for the whole group."""


@app.command("export")
def export(
    pictures: Annotated[list[Path], typer.Argument(help="One or more pictures of one person.")],
    target: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors file; replaced where it exists.")],
    name: Annotated[str | None, typer.Option(help="Title in the file; its own name if not given.")] = None,
    profile: Profile = None,
    file: File = None,
    overrides: Set = [],  # noqa: B006 - typer wants a list
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> int:
    """Save an identity's LoRA as a file that ComfyUI and diffusers load onto an SDXL checkpoint."""
    from ipvg_ray.hyperlora_export import export_lora
    from ipvg_ray.models.hyperlora import TRIGGER_WORDS

    settings = config.load(profile or config.default_profile(), file=file, overrides=overrides)
    made = export_lora(settings, pictures, target, name or target.stem, device)
    for sentence in made.left_out:
        out.print(escape(f"left out: {sentence}"))
    out.print(escape(f"{target}: LoRA of rank {made.rank} from {made.used} of {len(pictures)} pictures"))
    out.print(f"load it with weight {settings.first_frame.weight:g} and begin prompts with: {TRIGGER_WORDS}")
    return EXIT_OK
