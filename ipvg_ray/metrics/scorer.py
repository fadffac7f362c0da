"""All metrics of one video from one decode: loads the networks that are asked for, hands each metric its frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ipvg_ray.metrics import arc_sim, frames
from ipvg_ray.metrics.frames import Clip
from ipvg_ray.metrics.motion import motion
from ipvg_ray.metrics.overall import overall
from ipvg_ray.metrics.video_faces import FaceAnalyser, FoundFace, find_face, largest_faces

Score = float | bool | None


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


class Scorer:
    """Scores videos by the metrics it was made for.

    Args:
        names: from `catalogue.NAMES`, with their models in place.
        paths: field of `catalogue.MODELS` to the model's file or folder.
        analyser: the face pack, for Arc-Sim and the metrics on aligned faces.
        device: `cpu` or `cuda`.

    Attributes:
        on_video: those of its metrics that need no face, to what computes each of a clip and its prompt.

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

    def score(
        self, clip: Clip, prompt: str, embedding: np.ndarray, crop: np.ndarray | None
    ) -> tuple[dict[str, Score], dict[str, str]]:
        """All scores of a video.

        Args:
            prompt: the text it was made from.
            embedding: ArcFace embedding of the reference, from the analyser's recogniser.
            crop: the reference's face, aligned, or None where there is none.

        Returns:
            Metric to its value, arc_sim, arc_frames and motion among them, None where the video or the reference has
            none; and for each of those the reason.
        """
        numbers = frames.ends(self.settings.face_frames)(len(clip.frames), clip.fps)
        once = list(dict.fromkeys(numbers))  # of a short video some frames are taken twice; their faces are found once
        faces = dict(zip(once, largest_faces(clip.frames[once], self._analyser), strict=True))
        found = [faces[number] for number in numbers]
        similarity = arc_sim.of_faces(found, embedding, numbers)
        scores: dict[str, Score] = {
            "arc_sim": similarity.score,
            "arc_frames": similarity.frames,
            "motion": motion(clip.frames),
        }
        reasons: dict[str, str] = {}
        aligned = [face.aligned() for face in found if face is not None] if self._on_faces and crop is not None else []
        for name, of_faces in self._on_faces.items():
            scores[name] = None if crop is None else of_faces.score(aligned, crop)
            if scores[name] is None:
                where = "the reference picture" if crop is None else "any frame that was looked at"
                reasons[name] = f"no face on {where}"
        for name, of_video in self.on_video.items():
            scores[name] = of_video(clip, prompt)
            if scores[name] is None:
                reasons[name] = _NO_SCORE[name]
        if "overall" in self.names:
            scores["overall"] = overall(scores)
            if scores["overall"] is None:
                reasons["overall"] = "one of the scores it sums is missing"
        return scores, reasons

    def clip(self, field: str) -> Any:
        """CLIP's model, picture processor and tokenizer, loaded once for all metrics that use it."""
        from ipvg_ray.metrics.clip_score import load_clip

        if field not in self._clips:
            self._clips[field] = load_clip(self._paths[field], self._device)
        return self._clips[field]

    # -- makers: each loads what its metric needs and returns what is called for each video ------------------------

    def _cur_sim(self) -> Any:
        from ipvg_ray.metrics.cur_sim import CurSim
        from ipvg_ray.metrics.nets import curricular_face

        return CurSim(curricular_face.load(self._paths["curricular_face"]).to(self._device))

    def _face_distance(self) -> Any:
        from ipvg_ray.metrics.face_distance import FaceDistance
        from ipvg_ray.metrics.nets import inception

        return FaceDistance(inception.load(self._paths["inception"]).to(self._device))

    def _human_identity(self) -> OnVideo:
        from ipvg_ray.metrics.human_identity import HumanIdentity
        from ipvg_ray.metrics.nets import resnet_face, retina_face

        detector = retina_face.load(self._paths["retina_face"]).to(self._device)
        boxes = retina_face.FaceBoxes(detector, self.settings.detector_side)
        metric = HumanIdentity(boxes, resnet_face.load(self._paths["resnet_face"]).to(self._device))
        return lambda clip, prompt: metric.score(clip.frames)

    def _overall_consistency(self) -> OnVideo:
        from ipvg_ray.metrics.clip_score import load_tokenizer
        from ipvg_ray.metrics.nets import vi_clip
        from ipvg_ray.metrics.overall_consistency import OverallConsistency

        net = vi_clip.load(self._paths["vi_clip"]).to(self._device)
        metric = OverallConsistency(net, load_tokenizer(self._paths["clip_b32"]))
        return lambda clip, prompt: metric.score(clip.take(frames.middles(net.sizes.frames)), prompt)

    def _aesthetic_quality(self) -> OnVideo:
        from ipvg_ray.metrics.aesthetic_quality import AestheticQuality, load_head, load_vision

        vision = load_vision(self._paths["clip_l14"], self._device)
        metric = AestheticQuality(vision, load_head(self._paths["aesthetic_head"]).to(self._device))
        return lambda clip, prompt: metric.score(clip.frames)

    def _imaging_quality(self) -> OnVideo:
        from ipvg_ray.metrics.imaging_quality import imaging_quality
        from ipvg_ray.metrics.nets import musiq

        net, options = musiq.load(self._paths["musiq"]).to(self._device), self._options()
        return lambda clip, prompt: imaging_quality(clip.frames, net, **options)

    def _motion_smoothness(self) -> OnVideo:
        from ipvg_ray.metrics.motion_smoothness import motion_smoothness
        from ipvg_ray.metrics.nets import amt

        net, options = amt.load(self._paths["amt"]).to(self._device), self._options()
        return lambda clip, prompt: motion_smoothness(clip.frames, net, **options)

    def _dynamic_degree(self) -> OnVideo:
        from ipvg_ray.metrics.dynamic_degree import dynamic_degree
        from ipvg_ray.metrics.nets import raft

        net, options = raft.load(self._paths["raft"]).to(self._device), self._options()

        def flow(first: Any, second: Any) -> Any:
            return net(first, second, self.settings.flow_iterations)

        return lambda clip, prompt: dynamic_degree(clip.take(frames.eight_a_second), flow, **options)[0]

    def _clip_score(self) -> OnVideo:
        from ipvg_ray.metrics.clip_score import ClipScore

        metric = ClipScore(self.clip("clip_b32"), swapped=self.settings.clip_swapped, scaled=True)
        return lambda clip, prompt: metric.score(clip.take(frames.starts(16)), prompt)

    def _clip_score_tpige(self) -> OnVideo:
        from ipvg_ray.metrics.clip_score import ClipScore

        metric = ClipScore(self.clip("clip_b16"), swapped=False, scaled=False)
        return lambda clip, prompt: metric.score(clip.take(frames.at_most(32)), prompt)

    def _gme_score(self) -> OnVideo:
        import torch

        from ipvg_ray.metrics.gme_score import GmeScore

        dtype = torch.float16 if self._device.startswith("cuda") else torch.float32
        tokens = self.settings.gme_tokens
        metric = GmeScore(self._paths["gme"], device=self._device, dtype=dtype, tokens=tokens)
        return lambda clip, prompt: metric.score(clip.take(frames.at_most(16)), prompt)

    def _options(self) -> dict[str, Any]:
        return {"device": self._device, "batch": self.settings.batch}


OnVideo = Callable[[Clip, str], Score]
_ON_FACES: dict[str, Callable[[Scorer], Any]] = {"cur_sim": Scorer._cur_sim, "face_distance": Scorer._face_distance}
_ON_VIDEO: dict[str, Callable[[Scorer], OnVideo]] = {
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
}
