"""Face distance: the squared distance of Inception-v3 features between a video's faces and the reference's.

ConsisID's evaluation and the challenge call it FID. They duplicate a single picture's features to estimate a
covariance, which is then 0, so that the Fréchet distance is the squared distance of two vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ipvg_ray.metrics.nets.inception import SIDE, InceptionV3
from ipvg_ray.metrics.pixels import in_chunks


class FaceDistance:
    """Compares aligned faces.

    Args:
        net: Inception-v3, on the device to use.
        batch: faces at a time.
    """

    def __init__(self, net: InceptionV3, batch: int = 16) -> None:
        self.net, self.batch = net, batch

    @torch.no_grad()
    def features(self, faces: Sequence[np.ndarray]) -> Tensor:
        """Features, (N, D), of uint8 RGB faces of any size, resized bilinearly and not normalised."""
        device = next(self.net.parameters()).device
        sized = [Image.fromarray(face).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for face in faces]
        pixels = torch.from_numpy(np.stack([np.asarray(face) for face in sized])).permute(0, 3, 1, 2)
        parts = in_chunks(len(faces), self.batch)
        return torch.cat([self.net(pixels[part].to(device).float() / 255) for part in parts])

    def score(self, faces: Sequence[np.ndarray], reference: np.ndarray) -> float | None:
        """Mean squared distance to the reference's features, 0 or above, lower is better; None without a face.

        The original gives 0, its best value, to a video that shows no face; here such a video has none.

        Args:
            faces: of the sampled frames that show one, aligned, uint8 RGB.
            reference: the reference's, aligned in the same way.
        """
        if not len(faces):
            return None
        found = self.features([reference, *faces]).double()
        return float((found[1:] - found[0]).square().sum(1).mean())
