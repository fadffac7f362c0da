"""Scores of a finished video: the metrics of the papers and of the challenge, from one decode."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from ipvg_ray.metrics import catalogue
from ipvg_ray.pipeline.stage import Row, RowError, Stage, StageContext
from ipvg_ray.storage import run_path

if TYPE_CHECKING:
    from ipvg_ray.config import Config
    from ipvg_ray.metrics.frames import Clip
    from ipvg_ray.metrics.scorer import MetricError, Scores, Video

Result = TypeVar("Result")
FoundReference = tuple[np.ndarray, np.ndarray | None]


class EvaluateStage(Stage):
    """Reads videos back from the run and scores them, the videos of a batch together.

    With a concurrency of 2 the next batch is decoded while one is scored. The frames of `batch_size` times
    `concurrency` videos are then in memory, and no more.

    Metrics without their models, or whose terms are not accepted, are left out; every row says which and why.

    Failures: `broken_video` where the file does not decode whole; the kinds of `images.ImageError` for the reference;
    `metric_failed` where a metric raises on the video.
    """

    name = "evaluate"
    grain = "sample"
    needs: ClassVar[tuple[str, ...]] = ("embedding", "face_box", "video_uri", "image", "image_sha256", "prompt")
    version = 3

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._usable: tuple[list[str], dict[str, str]] | None = None

    def models(self) -> Mapping[str, Path]:
        """Those that are used: a metric joins or leaves the fingerprint with its models."""
        paths = self.paths()
        return {field: paths[field] for field in ("pack", *catalogue.fields_of(self.usable()[0]))}

    def optional_models(self) -> Mapping[str, Path]:
        paths = self.paths()
        return {field: paths[field] for field in catalogue.fields_of(self.config.evaluate.metrics)}

    def wanted_models(self) -> Mapping[str, Path]:
        """Those whose terms are accepted; none once it is decided which metrics are computed."""
        if self._usable is not None:
            return {}
        accept = self.config.evaluate.accept_licence
        return {field: path for field, path in self.optional_models().items() if catalogue.accepted(path, accept)}

    def fingerprint_settings(self) -> dict[str, Any]:
        """Without what `models` says already: the models that are not used, and whether their terms are accepted.

        Nor with how many frames go through a network at once, which changes the last bits at most: whatever it is, the
        default stands for it, because older versions counted it and their runs shall go on.
        """
        unused = {*catalogue.fields_of(catalogue.NAMES), "accept_licence"}
        settings = {key: value for key, value in super().fingerprint_settings().items() if key not in unused}
        return settings | {"batch": 2}

    def usable(self) -> tuple[list[str], dict[str, str]]:
        """Metrics that can be computed, and the reason for each other one that is wanted.

        Decided once, where the run starts: workers are sent the decision, so that none leaves out a metric for a model
        that its own machine lacks.
        """
        if self._usable is None:
            section = self.config.evaluate
            self._usable = catalogue.usable(section.metrics, self.paths(), accept_licence=section.accept_licence)
        return self._usable

    def paths(self) -> dict[str, Path]:
        """Field to where its model should be, of all metrics."""
        section = self.config.evaluate
        fields = ("pack", *catalogue.fields_of(catalogue.NAMES))
        return {field: self.config.models.path(getattr(section, field)) for field in fields}

    def setup(self, context: StageContext) -> None:
        import torch

        from ipvg_ray.metrics.scorer import Scorer, Settings
        from ipvg_ray.models.faces import FaceAnalyser

        names, self._skipped = self.usable()
        paths = self.paths()
        missing = [f"{field}: {paths[field]}" for field in catalogue.fields_of(names) if not paths[field].exists()]
        if missing:
            raise FileNotFoundError(
                f"models are there where the run was started and not on {platform.node()}: {', '.join(missing)}; "
                "put models.root on storage that all nodes share, or set models.mirror"
            )
        section = self.config.evaluate
        torch.set_num_threads(context.threads)
        self._run_dir = run_path(context.run_dir)
        analyser = FaceAnalyser(
            self.models()["pack"],
            det_sizes=(section.det_size,),
            det_threshold=section.det_threshold,
            modules=("detection", "recognition"),
            device=context.device,
            threads=context.threads,
            batch=section.batch if context.device.startswith("cuda") else 1,
        )
        settings = Settings(
            face_frames=section.frames,
            clip_swapped=section.clip_swapped,
            detector_side=section.detector_side,
            flow_iterations=section.flow_iterations,
            gme_tokens=section.gme_tokens,
            batch=section.batch,
        )
        self._scorer = Scorer(names, paths, analyser, device=context.device, settings=settings)
        self._find = lru_cache(maxsize=64)(self._find_face)  # an identity's samples mostly follow each other
        self._scoring = threading.Lock()

    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        clips = [_attempt(self._clip, row) for row in rows]
        with self._scoring:  # the rows of another thread are decoded meanwhile
            videos = [_attempt(self._video, row, clip) for row, clip in zip(rows, clips, strict=True)]
            scored = iter(self._scorer.score([video for video in videos if not isinstance(video, RowError)]))
        return [v if isinstance(v, RowError) else self._result(v.clip, next(scored)) for v in videos]

    def _clip(self, row: Row) -> Clip:
        from ipvg_ray.media import videos
        from ipvg_ray.metrics.frames import Clip

        try:
            frames, fps = videos.read_video(self._read(row["video_uri"]))
        except videos.VideoError as error:
            raise RowError("broken_video", f"{row['video_uri']}: {error}") from None
        return Clip(frames, fps or self.config.video.fps)

    def _video(self, row: Row, clip: Clip | RowError) -> Video:
        from ipvg_ray.media import images
        from ipvg_ray.metrics.scorer import Video

        if isinstance(clip, RowError):
            raise clip
        try:
            return Video(clip, row["prompt"], *self._reference(row))
        except images.ImageError as error:
            raise RowError(error.kind, f"the reference picture: {error}") from None

    def _result(self, clip: Clip, scores: Scores | MetricError) -> Row | RowError:
        if isinstance(scores, Exception):
            return _failed(scores)
        result: dict[str, Any] = dict.fromkeys(self.table().columns)
        result |= scores.values
        result["frames_ok"] = self._as_wanted(clip.frames)
        result["skipped"] = catalogue.told({**self._skipped, **scores.reasons}) or None
        return result

    def _read(self, uri: str) -> bytes:
        """A file of the run, by its path in it as it is written: names that are made safe hold %-signs."""
        from ipvg_ray.media.videos import VideoError

        try:
            return (self._run_dir / uri).read_bytes()
        except FileNotFoundError as error:
            raise VideoError("the file is not there") from error

    def _reference(self, row: Mapping[str, Any]) -> FoundReference:
        """What faces are compared with: ArcFace's embedding, and the aligned face where a metric wants it."""
        found = self._found_on(row) if self._scorer.wants_crop else None
        return np.asarray(row["embedding"], np.float32), None if found is None else found[1]

    def _as_wanted(self, frames: np.ndarray) -> bool:
        video = self.config.video
        return bool(frames.shape[:3] == (video.frames, video.height, video.width))

    def _found_on(self, row: Mapping[str, Any]) -> FoundReference | None:
        image, box = row["image"], row.get("face_box")
        return self._find(
            image.get("bytes"), image.get("path"), row["image_sha256"], None if box is None else tuple(box)
        )

    def _find_face(
        self, data: bytes | None, path: str | None, sha256: str, box: tuple[float, ...] | None
    ) -> FoundReference | None:
        """Embedding and aligned picture of the reference picture's face at `box`, or of its largest."""
        from ipvg_ray.media import images

        encoded = images.image_bytes({"bytes": data, "path": path}, sha256)
        picture = images.decode(encoded, self.config.dataset.max_image_pixels)
        found = self._scorer.face_on(picture, box)
        if found is None:
            return None
        embedding = np.asarray(found.face.embedding, np.float32)
        return embedding, found.aligned() if self._scorer.wants_crop else None


def _attempt(work: Callable[..., Result], *given: Any) -> Result | RowError:
    try:
        return work(*given)
    except RowError as error:
        return error


def _failed(error: MetricError) -> RowError:
    """The failure of a row on which a metric failed.

    Raises:
        Exception: what the metric raised, where that says that the worker's GPU is lost; it is not the row's fault.
    """
    from ipvg_ray.pipeline.worker import context_lost

    cause = error.__cause__
    if cause is not None and context_lost(cause):
        raise cause
    failure = RowError("metric_failed", f"{error}; {_mend(error)}")
    failure.__cause__ = cause
    return failure


def _mend(error: MetricError) -> str:
    if any(words in str(error) for words in ("out of memory", "Failed to allocate memory")):  # torch's, onnxruntime's
        return "lower evaluate.batch, or give each worker more of the GPU with evaluate.pool.gpus"
    if str(error).partition(":")[0] in catalogue.NAMES:
        return "to have the other scores, leave the metric out of evaluate.metrics"
    return "it is computed of every video: look at the failure's traceback, and mend the video or its reference"


class EvaluateGivenStage(EvaluateStage):
    """Scores videos that others made. The reference's embedding comes from its picture, as the challenge takes it.

    Failures: those of `EvaluateStage`, and `no_face` where the reference picture shows none.
    """

    needs = ("video_uri", "image", "image_sha256", "prompt")

    def _reference(self, row: Mapping[str, Any]) -> FoundReference:
        found = self._found_on(row)
        if found is None:
            raise RowError("no_face", "no face is found on the reference picture; give one that shows a face")
        return found

    def _as_wanted(self, frames: np.ndarray) -> bool:
        return True  # no size or length is prescribed
