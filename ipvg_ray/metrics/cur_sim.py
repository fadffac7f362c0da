"""Cur-Sim: how much the face of a video is the reference's by CurricularFace, as ConsisID's evaluation computes it."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ipvg_ray.metrics.metric import Score, in_batches
from ipvg_ray.metrics.nets.curricular_face import SIDE, CurricularFace


class CurSim:
    """Compares aligned faces.

    Args:
        net: CurricularFace's backbone, on the device to use.
        batch: faces embedded at a time.
    """

    def __init__(self, net: CurricularFace, batch: int = 16) -> None:
        self.net, self.batch = net, batch

    def score(self, videos: Sequence[Sequence[np.ndarray]], references: Sequence[np.ndarray]) -> list[Score]:
        """Mean of max(0, cosine) between each video's faces and its reference's, 0 to 1; 0 where there is no face.

        Args:
            videos: of each the faces of its sampled frames that show one, aligned, uint8 RGB (224, 224, 3).
            references: of each the reference's face, aligned in the same way.
        """
        crops = [[reference, *faces] for faces, reference in zip(videos, references, strict=True)]
        embedded = [torch.stack(found) for found in in_batches(crops, self.batch, self.embed)]
        cosines = [(found[1:] @ found[0]).clamp(min=0) for found in embedded]
        return [float(found.mean()) if len(found) else 0.0 for found in cosines]

    @torch.no_grad()
    def embed(self, faces: np.ndarray) -> Tensor:
        """Embeddings of length 1, (N, D), of aligned faces, uint8 RGB (N, 224, 224, 3)."""
        device = next(self.net.parameters()).device
        small = np.stack([cv2.resize(face, (SIDE, SIDE)) for face in faces])
        pixels = torch.from_numpy(small).to(device).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)
        return F.normalize(self.net(pixels), dim=1).cpu()
