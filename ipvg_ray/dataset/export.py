"""Export a run in the original layout of IPVG-STD, for tools that expect it.

    <out>/idNNN/promptK.mp4           the videos
    <out>/i2v/idNNN/promptK.jpg       the first frames
    <out>/i2v/idNNN/promptK.txt       the prompts for the video
    <out>/t2i/idNNN/promptK.txt       the prompts for the first frames, trigger words included
    <out>/data_raw.csv                image_path,prompt: the users' prompts
    <out>/data_refined.csv            image_path,prompt: the polished prompts

Source: the output layout of github.com/rain152/IPVG. Ids that are no file names are encoded by `media.names.safe_name`;
image_path is relative to `<out>`.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ipvg_ray import tables
from ipvg_ray.errors import UserError
from ipvg_ray.media.images import decode, encode, image_bytes
from ipvg_ray.media.names import safe_name
from ipvg_ray.storage import RunPath, parquet

_JPEG = b"\xff\xd8\xff"
_FRAMES = 16  # first frames in memory at a time
_LINES = 8192


class ExportError(UserError):
    """A run that cannot be exported whole; the message names what is missing."""


def export(run_dir: RunPath, out: Path) -> int:
    """Write what a run has finished, in the original layout; files of an earlier export are replaced.

    Args:
        run_dir: a run directory; it may still be running.
        out: made where it is missing.

    Returns:
        How many videos were written.

    Raises:
        UserError: where `run_dir` is no run directory, or a video that its table lists is not there.
    """
    tables.read_run(run_dir)
    out.mkdir(parents=True, exist_ok=True)
    _write_prompts(run_dir, out)
    _write_frames(run_dir, out)
    _write_lists(run_dir, out)
    return _copy_videos(run_dir, out)


def stem(identity_id: str, sample_id: str) -> str:
    """`idNNN/promptK` of a sample, safe whatever its ids hold."""
    return f"{safe_name(identity_id)}/{safe_name(sample_id.removeprefix(f'{identity_id}/'))}"


def _write_prompts(run_dir: RunPath, out: Path) -> None:
    """A text file for each prompt that is finished, first frame or not, as VIP-200K keeps its own."""
    for row in _rows(tables.read_table(run_dir, "prompts", ["video_prompt", "image_prompt"])):
        for folder, column in (("i2v", "video_prompt"), ("t2i", "image_prompt")):
            with _placed(out / folder / f"{stem(row['identity_id'], row['sample_id'])}.txt") as path:
                path.write_text(row[column], encoding="utf-8")


def _write_frames(run_dir: RunPath, out: Path) -> None:
    for part in tables.parts(run_dir, "first_frame"):
        with parquet(part) as opened:
            for batch in opened.iter_batches(_FRAMES, columns=["identity_id", "sample_id", "first_frame"]):
                for row in batch.to_pylist():
                    data = image_bytes(row["first_frame"])
                    if not data.startswith(_JPEG):
                        data = encode(decode(data), "jpeg")["bytes"]
                    place = out / "i2v" / f"{stem(row['identity_id'], row['sample_id'])}.jpg"
                    with _placed(place) as path:
                        path.write_bytes(data)


def _copy_videos(run_dir: RunPath, out: Path) -> int:
    videos = tables.read_table(run_dir, "video", ["video_uri"])
    for row in _rows(videos):
        source = run_dir / row["video_uri"]
        if not source.is_file():
            raise ExportError(f"{source} is gone, though the run lists it; make it again with --redo-from video")
        place = out / f"{stem(row['identity_id'], row['sample_id'])}.mp4"
        with _placed(place) as path:
            path.write_bytes(source.read_bytes())
    return len(videos)


def _write_lists(run_dir: RunPath, out: Path) -> None:
    """Both lists hold the samples that have a first frame, in the order of the identity set."""
    samples = tables.read_table(run_dir, "samples", ["prompt"])
    have = tables.read_table(run_dir, "first_frame", ["sample_id"])["sample_id"]
    samples = samples.filter(pc.is_in(samples["sample_id"], value_set=have))
    polished = tables.read_table(run_dir, "prompts", ["video_prompt"])
    at = pc.index_in(samples["sample_id"], value_set=polished["sample_id"])
    refined = polished["video_prompt"].take(at)
    _write_list(out / "data_raw.csv", samples, samples["prompt"])
    _write_list(out / "data_refined.csv", samples, refined)


def _write_list(place: Path, samples: pa.Table, prompts: pa.ChunkedArray) -> None:
    table = samples.select(["identity_id", "sample_id"]).append_column("text", prompts)
    with _placed(place) as path, path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["image_path", "prompt"])
        for row in _rows(table):
            lines.writerow([f"i2v/{stem(row['identity_id'], row['sample_id'])}.jpg", row["text"]])


def _rows(table: pa.Table) -> Iterator[dict[str, str]]:
    for batch in table.to_batches(_LINES):
        yield from batch.to_pylist()


@contextmanager
def _placed(place: Path) -> Iterator[Path]:
    """A path to write to; the file gets its name `place` when it is whole, and is removed if that fails."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name[-100:]}.part")
    try:
        yield temporary
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)
