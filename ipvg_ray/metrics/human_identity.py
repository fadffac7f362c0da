"""Human identity: whether a video's one face stays the same face, as VBench-2.0 computes it (arXiv 2503.21755).

The first frame is the measure, not a reference picture. The original draws a green frame of two pixels around the box
before it cuts the face out, so that the frame is part of what is compared; so it is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from ipvg_ray.metrics.frames import all_frames
from ipvg_ray.metrics.metric import Sampled, Score, in_batches
from ipvg_ray.metrics.nets.resnet_face import SIDE, ResNetFace

LEAST_COSINE = 0.4
LEAST_FRAMES = 20
_FACES = 16
"""Embedded at a time."""

Box = tuple[int, int, int, int]
Boxes = Callable[[np.ndarray], Sequence[Sequence[Box]]]
"""uint8 RGB pictures (N, H, W, 3) to the boxes of each one's faces: x0, y0, x1, y1."""


class HumanIdentity:
    """Follows a video's one face.

    Args:
        boxes: RetinaFace.
        net: embeds grey faces; on the device to use.
        batch: frames at a time.
    """

    rule = staticmethod(all_frames)

    def __init__(self, boxes: Boxes, net: ResNetFace, batch: int = 2) -> None:
        self.boxes, self.net, self.batch = boxes, net, batch

    def score(self, videos: Sequence[Sampled]) -> list[Score]:
        """Share of the later frames with exactly one face whose cosine with the first frame's is at least 0.4.

        Returns:
            Of each video 0 to 1; None where the first frame does not show exactly one face, or fewer than 20 later
            frames do: such videos are left out of a set's mean (the original marks them -1).
        """
        # The later frames, which are most of the work, only of videos that can have a score.
        firsts = self._only_faces([video.frames[:1] for video in videos])
        rests = self._only_faces(
            [video.frames[1:] if first else video.frames[:0] for video, first in zip(videos, firsts, strict=True)]
        )
        kept = [first + rest if len(rest) >= LEAST_FRAMES else [] for first, rest in zip(firsts, rests, strict=True)]
        features = in_batches(kept, _FACES, self.features)
        return [_share(torch.stack(found)) if found else None for found in features]

    def _only_faces(self, videos: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """Of each video's frames that show exactly one face, that face, as `_cut` gives it."""
        found = in_batches(videos, self.batch, self.boxes)
        cuts = [
            [_cut(frame, boxes[0]) for frame, boxes in zip(frames, of_frames, strict=True) if len(boxes) == 1]
            for frames, of_frames in zip(videos, found, strict=True)
        ]
        return [[cut for cut in of_video if cut is not None] for of_video in cuts]

    @torch.no_grad()
    def features(self, faces: np.ndarray) -> Tensor:
        """Embeddings, float64 (N, D), of grey faces, uint8 (N, 128, 128): picture and mirror image in one."""
        both = torch.from_numpy(np.stack([faces, faces[:, :, ::-1]], 1).reshape(-1, 1, SIDE, SIDE)).float()
        device = next(self.net.parameters()).device
        found: Tensor = self.net(((both - 127.5) / 127.5).to(device)).double()
        return found.reshape(len(faces), -1).cpu()


def _cut(frame: np.ndarray, box: Box) -> np.ndarray | None:
    """The face in a box with the green frame around it, grey, uint8 (128, 128); None where no pixel lies in the box."""
    x0, y0, x1, y1 = box
    x0, y0, x1, y1 = max(0, x0), max(0, y0), min(frame.shape[1], x1), min(frame.shape[0], y1)
    if x1 <= x0 or y1 <= y0:
        return None
    marked = cv2.rectangle(frame.copy(), (x0, y0), (x1, y1), (0, 255, 0), 2)
    grey: np.ndarray = cv2.cvtColor(cv2.resize(marked[y0:y1, x0:x1], (SIDE, SIDE)), cv2.COLOR_RGB2GRAY)
    return grey


def _share(features: Tensor) -> float:
    """Share of all vectors but the first, (N, D), that agree with it."""
    units = features / features.norm(dim=1, keepdim=True)
    return float((units[1:] @ units[0] >= LEAST_COSINE).double().mean())
