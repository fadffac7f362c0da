"""Human identity: whether a video's one face stays the same face, as VBench-2.0 computes it (arXiv 2503.21755).

The first frame is the measure, not a reference picture. The original draws a green frame of two pixels around the box
before it cuts the face out, so that the frame is part of what is compared; so it is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch

from ipvg_ray.metrics.nets.resnet_face import SIDE, ResNetFace

LEAST_COSINE = 0.4
LEAST_FRAMES = 20

Box = tuple[int, int, int, int]
Boxes = Callable[[np.ndarray], Sequence[Box]]
"""A uint8 RGB picture (H, W, 3) to the boxes of its faces: x0, y0, x1, y1."""


class HumanIdentity:
    """Follows a video's one face.

    Args:
        boxes: RetinaFace.
        net: embeds grey faces; on the device to use.
    """

    def __init__(self, boxes: Boxes, net: ResNetFace) -> None:
        self.boxes, self.net = boxes, net

    def score(self, frames: np.ndarray) -> float | None:
        """Share of the later frames with exactly one face whose cosine with the first frame's is at least 0.4.

        Args:
            frames: all frames of the video, uint8 RGB, (N, H, W, 3).

        Returns:
            0 to 1; None where the first frame does not show exactly one face, or fewer than 20 later frames do: such
            videos are left out of a set's mean (the original marks them -1).
        """
        features: list[np.ndarray] = []
        for number, frame in enumerate(frames):
            feature = self.feature(frame)
            if feature is not None:
                features.append(feature)
            elif number == 0:
                return None
        if len(features) - 1 < LEAST_FRAMES:
            return None
        units = np.stack([feature / np.linalg.norm(feature) for feature in features])
        return float((units[1:] @ units[0] >= LEAST_COSINE).mean())

    @torch.no_grad()
    def feature(self, frame: np.ndarray) -> np.ndarray | None:
        """Embedding of the frame's only face, of its picture and its mirror image in one; None where there is not one.

        Returns:
            float64, of twice the network's length.
        """
        found = self.boxes(frame)
        if len(found) != 1:
            return None
        x0, y0, x1, y1 = found[0]
        x0, y0, x1, y1 = max(0, x0), max(0, y0), min(frame.shape[1], x1), min(frame.shape[0], y1)
        if x1 <= x0 or y1 <= y0:
            return None
        marked = cv2.rectangle(frame.copy(), (x0, y0), (x1, y1), (0, 255, 0), 2)
        grey = cv2.cvtColor(cv2.resize(marked[y0:y1, x0:x1], (SIDE, SIDE)), cv2.COLOR_RGB2GRAY)
        both = torch.from_numpy(np.stack([grey, np.fliplr(grey)])[:, None]).float()
        device = next(self.net.parameters()).device
        result: np.ndarray = self.net(((both - 127.5) / 127.5).to(device)).double().flatten().cpu().numpy()
        return result
