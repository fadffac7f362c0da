"""Videos that others made, in the layouts of the challenge, of TPIGE and of the challenge's edition of 2026.

challenge   idNNN/promptK.mp4
tpige       idNNN_K.mp4 or idNNN_promptK.mp4
2026        K.mp4, K the place in eval.json
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow.fs as pafs

from ipvg_ray.config import Config
from ipvg_ray.errors import UserError
from ipvg_ray.pipeline.stage import Resources, Row, RowError, Stage, StageContext

Layout = Literal["challenge", "tpige", "2026"]
_STILL_QUALITY = 85
LAYOUTS: tuple[Layout, ...] = ("challenge", "tpige", "2026")


def names_of(layout: Layout, identity_id: str, prompt_id: str) -> list[str]:
    """Where a sample's video may lie below the folder, the likeliest place first."""
    number = prompt_id.removeprefix("prompt")
    return {
        "challenge": [f"{identity_id}/{prompt_id}.mp4"],
        "tpige": [f"{identity_id}_{number}.mp4", f"{identity_id}_prompt{number}.mp4"],
        "2026": [f"{number}.mp4"],
    }[layout]


def _file(uri: str) -> bytes:
    """A whole file. Raises FileNotFoundError, and OSError where it cannot be read for another reason."""
    filesystem, path = pafs.FileSystem.from_uri(uri) if "://" in uri else (pafs.LocalFileSystem(), uri)
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read())


class LayoutError(UserError, ValueError):
    """A layout that there is not, or a folder whose layout cannot be told."""


def checked_layout(name: str) -> Layout:
    """The layout of that name. Raises LayoutError."""
    for layout in LAYOUTS:
        if name == layout:
            return layout
    raise LayoutError(f"there is no layout {name!r}; there are {', '.join(LAYOUTS)}")


def layout_of(folder: str) -> Layout:
    """The layout of a folder of videos, told by its files' names: folders, numbers alone, or anything else.

    Raises:
        LayoutError: where the folder cannot be read, or holds neither.
    """
    try:
        filesystem, path = pafs.FileSystem.from_uri(folder) if "://" in folder else (pafs.LocalFileSystem(), folder)
        found = filesystem.get_file_info(pafs.FileSelector(path))
    except (OSError, ValueError) as error:
        raise LayoutError(f"cannot list the videos in {folder}: {error}") from error
    stems = [info.base_name[:-4] for info in found if info.is_file and info.base_name.endswith(".mp4")]
    if stems:
        return "2026" if all(stem.isdecimal() for stem in stems) else "tpige"
    if any(info.type == pafs.FileType.Directory for info in found):
        return "challenge"
    raise LayoutError(f"{folder} holds no .mp4 files and no folders; name the folder of the videos")


class GivenVideosStage(Stage):
    """Takes the place of the stage that makes videos: copies each one into the run and measures it.

    A folder that cannot be read at the moment is an error of the row, not a missing video: that would count as 0.

    Failures: `missing_video`, and `broken_video` where the file does not decode whole.

    Args:
        folder: local folder or URI of the videos.
    """

    name = "video"
    grain = "sample"
    needs = ("prompt",)
    media = ("videos",)

    def __init__(self, config: Config, folder: str, layout: Layout) -> None:
        super().__init__(config)
        self.folder, self.layout = folder.rstrip("/"), layout

    def fingerprint_settings(self) -> dict[str, Any]:
        return {"folder": self.folder, "layout": self.layout}

    def resources(self) -> Resources:
        """A share of a CPU for as many workers as evaluation has: what the making of videos asks for is not needed."""
        pool = self.config.evaluate.pool
        return Resources(cpus=min(1.0, pool.cpus), max_workers=pool.max_workers, time_limit_s=pool.time_limit_s)

    def setup(self, context: StageContext) -> None:
        self._writer = context.media

    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        return [self._attempt(row) for row in rows]

    def _attempt(self, row: Row) -> Row | RowError:
        from ipvg_ray.media import images, videos

        names = names_of(self.layout, row["identity_id"], row["prompt_id"])
        for name in names:
            try:
                data = _file(f"{self.folder}/{name}")
                break
            except FileNotFoundError:
                continue
        else:
            return RowError("missing_video", f"there is no {' or '.join(names)} in {self.folder}")
        try:
            frames, fps = videos.read_video(data)
            if not fps:
                raise videos.VideoError("the video does not say its frame rate; make it again")
        except videos.VideoError as error:
            return RowError("broken_video", f"{name}: {error}")
        return {
            "video_uri": self._writer.publish("videos", row["identity_id"], row["prompt_id"], ".mp4", data),
            "video_bytes": len(data),
            "video_sha256": hashlib.sha256(data).hexdigest(),
            "video_width": frames.shape[2],
            "video_height": frames.shape[1],
            "video_frames": len(frames),
            "video_fps": fps,
            "video_seconds": len(frames) / fps,
            "video_poster": images.encode(videos.poster(frames), "jpeg", _STILL_QUALITY),
            "video_strip": images.encode(videos.strip(frames), "jpeg", _STILL_QUALITY),
        }
