"""First frame and temporal prompt to an MP4 file: Wan VACE, one video at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ipvg_ray.media import images
from ipvg_ray.pipeline.stage import Row, RowError, Stage, StageContext


class VideoStage(Stage):
    """Generates, encodes, checks and publishes `videos/<identity>/<prompt>.mp4`; the row holds what the file measures.

    Failures: `empty_prompt`; the kinds of `images.ImageError` for the first frame; `bad_video` where the model gives no
    picture (NaN) or the encoded file does not read back as configured.
    """

    name = "video"
    grain = "sample"
    needs = ("first_frame", "video_prompt")
    media = ("videos",)

    def models(self) -> Mapping[str, Path]:
        return {"model": self.config.models.path(self.config.video.model)}

    def setup(self, context: StageContext) -> None:
        import torch

        from ipvg_ray.models import vace

        section = self.config.video
        torch.set_num_threads(context.threads)
        pipeline = vace.load(
            self.models()["model"], dtype=getattr(torch, section.dtype), device=context.device, shift=section.shift
        )
        self._video = vace.FirstFrameToVideo(pipeline)
        self._writer = context.media

    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        return [self._attempt(row) for row in rows]

    def _attempt(self, row: Row) -> Row | RowError:
        from ipvg_ray.media.videos import VideoError
        from ipvg_ray.models.vace import VaceError

        try:
            return self._one(row)
        except RowError as error:
            return error
        except images.ImageError as error:
            return RowError(error.kind, f"the first frame: {error}")
        except (VaceError, VideoError) as error:
            return RowError("bad_video", str(error))

    def _one(self, row: Row) -> Row:
        from ipvg_ray.media import videos

        section = self.config.video
        data = videos.encode_mp4(self._generate(row), section.fps, section.crf, _marks(row))
        info = videos.probe(data)
        found = (info.frames, info.height, info.width, info.fps)
        if found != (section.frames, section.height, section.width, section.fps):
            raise RowError("bad_video", f"the encoded file reads back as {info}, not as configured; try the row again")
        uri = self._writer.publish("videos", row["identity_id"], row["prompt_id"], ".mp4", data)
        return {
            "video_uri": uri,
            "video_bytes": len(data),
            "video_sha256": hashlib.sha256(data).hexdigest(),
            "video_width": info.width,
            "video_height": info.height,
            "video_frames": info.frames,
            "video_fps": info.fps,
            "video_seconds": info.seconds,
        }

    def _generate(self, row: Row) -> np.ndarray:
        section = self.config.video
        if not row["video_prompt"].strip():
            raise RowError("empty_prompt", "the video's prompt is empty; give the sample a prompt")
        result: np.ndarray = self._video.generate(
            images.decode(images.image_bytes(row["first_frame"])),
            row["video_prompt"],
            section.negative_prompt,
            frames=section.frames,
            height=section.height,
            width=section.width,
            steps=section.steps,
            guidance=section.guidance,
            seed=row["seed"],
            conditioning_scale=section.conditioning_scale,
        )
        return result


def _marks(row: Mapping[str, Any]) -> dict[str, str]:
    """What the file says of itself to whoever meets it outside the run."""
    return {
        "title": f"Synthetic video {row['sample_id']}",
        "comment": f"AI-generated, synthetic; made by ipvg_ray from row {row['sample_id']} with seed {row['seed']}",
    }
