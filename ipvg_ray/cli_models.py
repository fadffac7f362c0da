"""`ipvg-ray models`: make, fetch and check models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ipvg_ray import config
from ipvg_ray.cli_options import EXIT_ERROR, EXIT_OK, File, Profile, Set, out
from ipvg_ray.storage import run_path

app = typer.Typer(no_args_is_help=True, help="Make, fetch and check models.")


@app.command("make-mini")
def make_mini(
    folder: Annotated[Path | None, typer.Argument(help="Where; the profile's models.root if not given.")] = None,
) -> int:
    """Make miniature random checkpoints of every model, in the real formats."""
    from ipvg_ray.models.mini import make_all

    make_all((folder or config.load("cpu-mini").models.root).expanduser(), report=out.print)
    return EXIT_OK


@app.command("pull")
def pull(
    names: Annotated[list[str] | None, typer.Argument(help="Names from docs/models.md; the profile's if none.")] = None,
    profile: str = "gpu",
    file: File = None,
    overrides: Set = [],  # noqa: B006
    accept_licence: Annotated[
        bool, typer.Option(help="You have read the non-commercial terms and may use them.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Show sizes, licences and checksums only.")] = False,
) -> int:
    """Fetch real models into models.root: shows sizes, licences and checksums first; goes on where it was cut."""
    from ipvg_ray.models import fetch
    from ipvg_ray.stages import make_stages

    settings = config.load(profile, file=file, overrides=overrides)
    root = settings.models.root.expanduser()
    wanted = names or [
        str(path.relative_to(root))
        for stage in make_stages(settings)
        for path in dict.fromkeys((*stage.models().values(), *stage.optional_models().values()))
        if path.is_relative_to(root)
    ]
    items = fetch.plan_pull(wanted, root)
    out.print(fetch.describe(items), markup=False)
    if not dry_run:
        fetch.pull(items, root, accept_licence, report=lambda line: out.print(line, markup=False))
    return EXIT_OK


@app.command("mirror")
def mirror(
    place: Annotated[Any, typer.Argument(help="Shared folder or s3://bucket/prefix.", parser=run_path)],
    profile: str = "gpu",
    file: File = None,
    overrides: Set = [],  # noqa: B006
) -> int:
    """Put the profile's models where nodes take them from: give runs `--set models.mirror=PLACE`."""
    from ipvg_ray.mirror import publish
    from ipvg_ray.stages import make_stages

    settings = config.load(profile, file=file, overrides=overrides)
    root = settings.models.root
    stages = make_stages(settings)
    optional = {path for stage in stages for path in stage.optional_models().values()}
    needed = {path for stage in stages for path in stage.models().values()}
    for path in sorted(path for path in optional - needed if not path.exists()):
        out.print(f"{path} is not there; what needs it is left out", markup=False)
    there = {path for path in optional if path.exists()}
    paths = {path for path in needed | there if path.is_relative_to(root)}
    for name in sorted(path.relative_to(root).as_posix() for path in paths):
        new = publish(name, root, place, report=lambda line: out.print(line, markup=False))
        out.print(f"{name}: {'mirrored' if new else 'is there'}", markup=False)
    return EXIT_OK


@app.command("check")
def check(
    profile: Profile = None,
    file: File = None,
    overrides: Set = [],  # noqa: B006
    verify: Annotated[bool, typer.Option(help="Compute the checksums of pulled models too.")] = False,
) -> int:
    """Say which of the models that the configuration names are missing or damaged."""
    from ipvg_ray.models import fetch
    from ipvg_ray.stages import make_stages

    settings = config.load(profile or config.default_profile(), file=file, overrides=overrides)
    named = {f"{s.name}.{field}": path for s in make_stages(settings) for field, path in s.models().items()}
    missing = fetch.check(named, verify=verify)
    for flaw in missing:
        out.print(str(flaw), markup=False)
    for stage in make_stages(settings):
        for field, path in stage.optional_models().items():
            if not path.exists():
                out.print(f"{stage.name}.{field}: {path} is not there; what needs it is left out", markup=False)
    if not missing:
        out.print(f"all {len(named)} models of profile {settings.profile} are there")
    return EXIT_ERROR if missing else EXIT_OK


@app.command("convert")
def convert(
    source: Annotated[str, typer.Argument(help="A model's name below models.root, or a path.")],
    target: Annotated[str, typer.Argument(help="Name or path of the new folder, for video.model and the like.")],
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16: what the stage is set to run it in.")] = "bfloat16",
    profile: str = "gpu",
    file: File = None,
    overrides: Set = [],  # noqa: B006
) -> int:
    """Copy a model in the precision in which it is run, so that it loads faster; computes the same."""
    import torch

    from ipvg_ray.models import convert as copies

    if dtype not in ("bfloat16", "float16"):
        raise copies.ConvertError(f"--dtype {dtype}: it may be bfloat16 or float16")
    path = config.load(profile, file=file, overrides=overrides).models.path
    copies.convert(path(source), path(target), getattr(torch, dtype), lambda line: out.print(line, markup=False))
    out.print(f"{path(target)} stands for {path(source)}: name it in the configuration, and mirror it", markup=False)
    return EXIT_OK


@app.command("convert-paddle")
def convert_paddle(
    source: Annotated[Path, typer.Argument(help="A .pdparams file of PP-Matting or MODNet on HRNet.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write, for matting.model.")],
) -> int:
    """Turn PaddleSeg's matting checkpoints into safetensors; needs no Paddle and runs nothing that is in the file."""
    from ipvg_ray.models import paddle_files

    count = paddle_files.convert(source.expanduser(), target.expanduser())
    out.print(f"{count} tensors written to {target}", markup=False)
    return EXIT_OK
