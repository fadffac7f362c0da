"""All metrics of several videos at once, each from one decode: loads the networks asked for, hands out the frames."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ipvg_ray.metrics import arc_sim, frames
from ipvg_ray.metrics.frames import Clip
from ipvg_ray.metrics.metric import FaceMetric, Sampled, Score, VideoMetric
from ipvg_ray.metrics.motion import motion
from ipvg_ray.metrics.overall import overall
from ipvg_ray.metrics.video_faces import FaceAnalyser, FoundFace, find_face, largest_faces

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How the metrics are computed; the defaults are the published ones.

    Attributes:
        face_frames: frames whose faces are compared with the reference's.
        clip_swapped: whether ConsisID's CLIP score sees red and blue exchanged, as in its code.
        detector_side: side of the square that human_identity's detector sees, pixels.
        flow_iterations: RAFT's.
        gme_tokens: least and most tokens of a picture for GME.
        batch: frames or pairs at a time in the networks that work on whole frames.
    """

    face_frames: int = 16
    clip_swapped: bool = True
    detector_side: int = 2048
    flow_iterations: int = 20
    gme_tokens: tuple[int, int] = (256, 1280)
    batch: int = 2


@dataclass(frozen=True, eq=False)
class Video:
    """What is scored.

    Attributes:
        clip: decoded.
        prompt: the text it was made from.
        embedding: ArcFace embedding of the reference, from the analyser's recogniser.
        crop: the reference's face, aligned, or None where there is none.
    """

    clip: Clip
    prompt: str
    embedding: np.ndarray
    crop: np.ndarray | None


class MetricError(Exception):
    """A metric that fails on one video; `__cause__` is what it raised."""


@dataclass(frozen=True)
class Scores:
    """A video's scores.

    Attributes:
        values: metric to its value, arc_sim, arc_frames and motion among them; None where the video or the reference
            has none.
        reasons: metric whose value is None to why, in words.
    """

    values: dict[str, Score]
    reasons: dict[str, str]


@dataclass(eq=False)
class _Work:
    """A video being scored; `aligned` are its faces where metrics want them, `error` is what ended the work on it."""

    video: Video
    values: dict[str, Score] = field(default_factory=dict)
    aligned: list[np.ndarray] = field(default_factory=list)
    error: MetricError | None = None


class Scorer:
    """Scores videos by the metrics it was made for.

    Args:
        names: from `catalogue.NAMES`, with their models in place.
        paths: field of `catalogue.MODELS` to the model's file or folder.
        analyser: the face pack, for Arc-Sim and the metrics on aligned faces.
        device: `cpu` or `cuda`.

    Attributes:
        on_video: those of its metrics that need no face, by name.

    Raises:
        WeightsError: where a file holds other weights than its metric's.
    """

    def __init__(
        self,
        names: Iterable[str],
        paths: Mapping[str, Path],
        analyser: FaceAnalyser,
        *,
        device: str = "cpu",
        settings: Settings | None = None,
    ) -> None:
        self.names = tuple(names)
        self.settings = settings or Settings()
        self._analyser, self._paths, self._device = analyser, paths, device
        self._clips: dict[str, Any] = {}
        self._on_faces = {name: _ON_FACES[name](self) for name in self.names if name in _ON_FACES}
        self.on_video = {name: _ON_VIDEO[name](self) for name in self.names if name in _ON_VIDEO}

    @property
    def wants_crop(self) -> bool:
        """Whether any of its metrics compares aligned faces."""
        return bool(self._on_faces)

    def face_on(self, picture: np.ndarray, box: Sequence[float] | None = None) -> FoundFace | None:
        """The face of a reference picture, None where none is found.

        Args:
            picture: uint8 RGB, (H, W, 3).
            box: x0, y0, x1, y1 in pixels, near which the face lies; without it the largest is taken.
        """
        return find_face(picture, self._analyser, None if box is None else np.asarray(box, np.float32))

    def score(self, videos: Sequence[Video]) -> list[Scores | MetricError]:
        """All scores of each video, in order, or what failed on it. Batches hold frames of several videos.

        A metric that raises on several videos is tried on each of them alone, so that only the guilty one fails.
        """
        works = [_Work(video) for video in videos]
        _add("arc_sim", works, self._compare_faces)
        _add("motion", works, lambda some: [motion(work.video.clip.frames) for work in some])
        referenced = [work for work in works if work.video.crop is not None]
        for name, faces in self._on_faces.items():
            _add(name, referenced, partial(_of_faces, faces))
        for name, metric in self.on_video.items():
            _add(name, works, partial(_of_videos, metric))
        return [work.error or self._finished(work) for work in works]

    def _compare_faces(self, works: Sequence[_Work]) -> list[Score]:
        """Arc-Sim of each video; and its aligned faces, where metrics want them."""
        rule = frames.ends(self.settings.face_frames)
        numbers = [rule(len(work.video.clip.frames), work.video.clip.fps) for work in works]
        # Of a short video some frames are taken twice; their faces are found once.
        places = [(i, number) for i, of_video in enumerate(numbers) for number in dict.fromkeys(of_video)]
        faces = largest_faces([works[i].video.clip.frames[number] for i, number in places], self._analyser)
        by_place = dict(zip(places, faces, strict=True))
        similarities: list[Score] = []
        for i, (work, of_video) in enumerate(zip(works, numbers, strict=True)):
            found = [by_place[i, number] for number in of_video]
            similarity = arc_sim.of_faces(found, work.video.embedding, of_video)
            similarities.append(similarity.score)
            work.values["arc_frames"] = similarity.frames
            if self._on_faces and work.video.crop is not None:
                work.aligned = [face.aligned() for face in found if face is not None]
        return similarities

    def _finished(self, work: _Work) -> Scores:
        values = dict.fromkeys(self._on_faces) | work.values
        if "overall" in self.names:
            values["overall"] = overall(values)
        shown = "the reference picture" if work.video.crop is None else "any frame that was looked at"
        why = dict.fromkeys(self._on_faces, f"no face on {shown}") | _NO_SCORE
        return Scores(values, {name: why[name] for name in self.names if name in values and values[name] is None})

    def clip(self, name: str) -> Any:
        """CLIP's model, picture processor and tokenizer, loaded once for all metrics that use it."""
        from ipvg_ray.metrics.clip_score import load_clip

        if name not in self._clips:
            self._clips[name] = load_clip(self._paths[name], self._device)
        return self._clips[name]

    # -- makers: each loads what its metric needs ----------------------------------------------------------------

    def _cur_sim(self) -> FaceMetric:
        from ipvg_ray.metrics.cur_sim import CurSim
        from ipvg_ray.metrics.nets import curricular_face

        return CurSim(curricular_face.load(self._paths["curricular_face"]).to(self._device))

    def _face_distance(self) -> FaceMetric:
        from ipvg_ray.metrics.face_distance import FaceDistance
        from ipvg_ray.metrics.nets import inception

        return FaceDistance(inception.load(self._paths["inception"]).to(self._device))

    def _human_identity(self) -> VideoMetric:
        from ipvg_ray.metrics.human_identity import HumanIdentity
        from ipvg_ray.metrics.nets import resnet_face, retina_face

        detector = retina_face.load(self._paths["retina_face"]).to(self._device)
        boxes = retina_face.FaceBoxes(detector, self.settings.detector_side)
        net = resnet_face.load(self._paths["resnet_face"]).to(self._device)
        return HumanIdentity(boxes, net, self.settings.batch)

    def _overall_consistency(self) -> VideoMetric:
        from ipvg_ray.metrics.clip_score import load_tokenizer
        from ipvg_ray.metrics.nets import vi_clip
        from ipvg_ray.metrics.overall_consistency import OverallConsistency

        net = vi_clip.load(self._paths["vi_clip"]).to(self._device)
        return OverallConsistency(net, load_tokenizer(self._paths["clip_b32"]))

    def _aesthetic_quality(self) -> VideoMetric:
        from ipvg_ray.metrics.aesthetic_quality import AestheticQuality, load_head, load_vision

        vision = load_vision(self._paths["clip_l14"], self._device)
        return AestheticQuality(vision, load_head(self._paths["aesthetic_head"]).to(self._device))

    def _imaging_quality(self) -> VideoMetric:
        from ipvg_ray.metrics.imaging_quality import ImagingQuality
        from ipvg_ray.metrics.nets import musiq

        return ImagingQuality(musiq.load(self._paths["musiq"]).to(self._device), **self._options())

    def _motion_smoothness(self) -> VideoMetric:
        from ipvg_ray.metrics.motion_smoothness import MotionSmoothness
        from ipvg_ray.metrics.nets import amt

        return MotionSmoothness(amt.load(self._paths["amt"]).to(self._device), **self._options())

    def _dynamic_degree(self) -> VideoMetric:
        from ipvg_ray.metrics.dynamic_degree import DynamicDegree
        from ipvg_ray.metrics.nets import raft

        net = raft.load(self._paths["raft"]).to(self._device)
        return DynamicDegree(partial(net, iterations=self.settings.flow_iterations), **self._options())

    def _clip_score(self) -> VideoMetric:
        from ipvg_ray.metrics.clip_score import consisid

        return consisid(self.clip("clip_b32"), swapped=self.settings.clip_swapped)

    def _clip_score_tpige(self) -> VideoMetric:
        from ipvg_ray.metrics.clip_score import tpige

        return tpige(self.clip("clip_b16"))

    def _gme_score(self) -> VideoMetric:
        import torch

        from ipvg_ray.metrics.gme_score import GmeScore

        dtype = torch.float16 if self._device.startswith("cuda") else torch.float32
        tokens = self.settings.gme_tokens
        return GmeScore(self._paths["gme"], device=self._device, dtype=dtype, tokens=tokens)

    def _options(self) -> dict[str, Any]:
        return {"device": self._device, "batch": self.settings.batch}


def _of_faces(metric: FaceMetric, works: Sequence[_Work]) -> list[Score]:
    crops = [work.video.crop for work in works if work.video.crop is not None]
    return metric.score([work.aligned for work in works], crops)


def _of_videos(metric: VideoMetric, works: Sequence[_Work]) -> list[Score]:
    return metric.score([Sampled(work.video.clip.take(metric.rule), work.video.prompt) for work in works])


def _add(name: str, works: Sequence[_Work], score: Callable[[Sequence[_Work]], list[Score]]) -> None:
    """Add one metric's values to those that no metric has failed on yet; or, alone, what it raised."""
    works = [work for work in works if work.error is None]
    if not works:
        return
    try:
        for work, value in zip(works, score(works), strict=True):
            work.values[name] = value
        return
    except Exception as error:  # a network may raise anything
        # Its locals go at once: else they would keep, in the GPU's memory, all that the failed call held.
        traceback.clear_frames(error.__traceback__)
        if len(works) == 1:
            works[0].error = MetricError(f"{name}: {type(error).__name__}: {error}")
            works[0].error.__cause__ = error
            return
        log.warning("%s fails on %d videos together (%s); it is tried on each alone", name, len(works), error)
    for work in works:
        _add(name, [work], score)


_ON_FACES: dict[str, Callable[[Scorer], FaceMetric]] = {
    "cur_sim": Scorer._cur_sim,
    "face_distance": Scorer._face_distance,
}
_ON_VIDEO: dict[str, Callable[[Scorer], VideoMetric]] = {
    "human_identity": Scorer._human_identity,
    "overall_consistency": Scorer._overall_consistency,
    "aesthetic_quality": Scorer._aesthetic_quality,
    "imaging_quality": Scorer._imaging_quality,
    "motion_smoothness": Scorer._motion_smoothness,
    "dynamic_degree": Scorer._dynamic_degree,
    "clip_score": Scorer._clip_score,
    "clip_score_tpige": Scorer._clip_score_tpige,
    "gme_score": Scorer._gme_score,
}
_NO_SCORE = {
    "human_identity": "not exactly one face on the first frame, or on fewer than 20 later ones",
    "motion_smoothness": "fewer than three frames",
    "overall": "one of the scores it sums is missing",
}
