"""Scores of a finished video: Arc-Sim against the reference face, and two figures that need no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ipvg_ray.pipeline.stage import Row, RowError, Stage, StageContext


class EvaluateStage(Stage):
    """Reads each video back from the run and scores it.

    Failures: `broken_video` where the file does not decode whole.
    """

    name = "evaluate"
    grain = "sample"
    needs = ("embedding", "video_uri")

    def models(self) -> Mapping[str, Path]:
        return {"pack": self.config.models.path(self.config.evaluate.pack)}

    def setup(self, context: StageContext) -> None:
        from ipvg_ray.models.faces import FaceAnalyser

        section = self.config.evaluate
        self._run_dir = context.run_dir.rstrip("/")
        self._analyser = FaceAnalyser(
            self.models()["pack"],
            det_sizes=(section.det_size,),
            det_threshold=section.det_threshold,
            modules=("detection", "recognition"),
            device=context.device,
            threads=context.threads,
        )

    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        return [self._attempt(row) for row in rows]

    def _attempt(self, row: Row) -> Row | RowError:
        from ipvg_ray.media import videos

        try:
            frames = videos.read_frames(f"{self._run_dir}/{row['video_uri']}")
        except videos.VideoError as error:
            return RowError("broken_video", f"{row['video_uri']}: {error}")
        return self._score(frames, np.asarray(row["embedding"], np.float32))

    def _score(self, frames: np.ndarray, reference: np.ndarray) -> Row:
        from ipvg_ray.metrics.arc_sim import arc_sim
        from ipvg_ray.metrics.motion import motion

        video = self.config.video
        similarity = arc_sim(frames, reference, self._analyser, self.config.evaluate.frames)
        return {
            "arc_sim": similarity.score,
            "arc_frames": similarity.frames,
            "frames_ok": frames.shape[:3] == (video.frames, video.height, video.width),
            "motion": motion(frames),
        }
