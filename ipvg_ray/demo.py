"""The demonstration: miniature models, pictures that installed packages carry, every stage, a check of the results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ipvg_ray import cli, config, tables
from ipvg_ray.errors import UserError

REFUSED = "cat"
"""The identity of the demonstration set that shows no human face, and must end in the failures."""


class DemoError(UserError):
    """The demonstration did not end as it must."""


def run_demo(folder: Path, say: Callable[[str], None]) -> int:
    """Make models, identity set and run below `folder`; 0 where everything is as it must be.

    Raises:
        DemoError: names the first thing that is not.
    """
    from ipvg_ray.dataset.demo import make_demo
    from ipvg_ray.models.mini import make_all

    models, run_dir = folder / "models", folder / "run"
    say("Making miniature models: the real architectures and file formats, tiny, with random weights.")
    make_all(models, report=say)
    begun = (run_dir / "run.json").is_file()
    identities = folder / "identities" if begun else make_demo(folder / "identities")
    say(f"Identity set: {identities} (faces from pictures that scikit-image and insightface carry, and a cat)")
    code = cli.main(
        [
            "run",
            str(identities),
            "--out",
            str(run_dir),
            "--profile",
            "cpu-mini",
            "--set",
            f"models.root={models.resolve()}",
        ]
    )
    if code not in (cli.EXIT_OK, cli.EXIT_ROWS_FAILED):
        return code
    videos = check(run_dir)
    say(f"Checked: {videos} videos decode as configured; the {REFUSED} was refused, as it must be.")
    say("The pictures and videos are noise: random miniature models cannot draw. With real models, on a GPU:")
    say("  ipvg-ray models pull --profile gpu")
    say("  ipvg-ray run YOUR_IDENTITIES --out RUN --profile gpu")
    return cli.EXIT_OK


def check(run_dir: Path) -> int:
    """Decode every video and compare it with the configuration; returns how many there are.

    Raises:
        DemoError: for a video that is missing or wrong, or failures other than the cat.
    """
    from ipvg_ray.media.videos import probe

    settings = config.from_tree(tables.read_run(run_dir)["config"])
    failed = {row["sample_id"] or row["identity_id"] for row in tables.read_table(run_dir, "failures").to_pylist()}
    if failed != {REFUSED}:
        raise DemoError(f"failures/ holds {sorted(failed)}, not the {REFUSED} alone")
    samples = tables.read_table(run_dir, "samples").to_pylist()
    videos = {row["sample_id"]: row["video_uri"] for row in tables.read_table(run_dir, "video").to_pylist()}
    wanted = {row["sample_id"] for row in samples if row["identity_id"] != REFUSED}
    if set(videos) != wanted:
        raise DemoError(f"videos are missing for {sorted(wanted - set(videos))}")
    for sample, uri in videos.items():
        info = probe((run_dir / uri).read_bytes())
        found = (info.frames, info.width, info.height, round(info.fps))
        asked = (settings.video.frames, settings.video.width, settings.video.height, settings.video.fps)
        if found != asked:
            raise DemoError(f"the video of {sample} has (frames, width, height, fps) {found}, not {asked}")
    return len(videos)
