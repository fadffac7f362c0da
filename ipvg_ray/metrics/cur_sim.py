"""Cur-Sim: how much the face of a video is the reference's by CurricularFace, as ConsisID's evaluation computes it."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ipvg_ray.metrics.nets.curricular_face import SIDE, CurricularFace
from ipvg_ray.metrics.pixels import in_chunks


class CurSim:
    """Compares aligned faces.

    Args:
        net: CurricularFace's backbone, on the device to use.
        batch: faces embedded at a time.
    """

    def __init__(self, net: CurricularFace, batch: int = 16) -> None:
        self.net, self.batch = net, batch

    @torch.no_grad()
    def embed(self, faces: Sequence[np.ndarray]) -> Tensor:
        """Embeddings of length 1, (N, D), of aligned uint8 RGB faces (224, 224, 3)."""
        device = next(self.net.parameters()).device
        small = np.stack([cv2.resize(face, (SIDE, SIDE)) for face in faces])
        pixels = torch.from_numpy(small).to(device).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)
        found = [self.net(pixels[part]) for part in in_chunks(len(pixels), self.batch)]
        return F.normalize(torch.cat(found), dim=1)

    def score(self, faces: Sequence[np.ndarray], reference: np.ndarray) -> float:
        """Mean of max(0, cosine) between the faces and the reference's, 0 to 1; 0 where there is no face.

        Args:
            faces: of the sampled frames that show one, aligned, uint8 RGB (224, 224, 3).
            reference: the reference's, aligned in the same way.
        """
        if not len(faces):
            return 0.0
        found = self.embed([reference, *faces])
        return float((found[1:] @ found[0]).clamp(min=0).mean())
