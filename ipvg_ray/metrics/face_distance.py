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

from ipvg_ray.metrics.metric import Score, in_batches
from ipvg_ray.metrics.nets.inception import SIDE, InceptionV3


class FaceDistance:
    """Compares aligned faces.

    Args:
        net: Inception-v3, on the device to use.
        batch: faces at a time.
    """

    def __init__(self, net: InceptionV3, batch: int = 16) -> None:
        self.net, self.batch = net, batch

    def score(self, videos: Sequence[Sequence[np.ndarray]], references: Sequence[np.ndarray]) -> list[Score]:
        """Mean squared distance of each video's faces to its reference's, 0 or above, lower is better.

        None without a face: the original gives 0, its best value, to a video that shows none.

        Args:
            videos: of each the faces of its sampled frames that show one, aligned, uint8 RGB (224, 224, 3).
            references: of each the reference's face, aligned in the same way.
        """
        crops = [[reference, *faces] for faces, reference in zip(videos, references, strict=True)]
        found = [torch.stack(features).double() for features in in_batches(crops, self.batch, self.features)]
        distances = [(features[1:] - features[0]).square().sum(1) for features in found]
        return [float(distance.mean()) if len(distance) else None for distance in distances]

    @torch.no_grad()
    def features(self, faces: np.ndarray) -> Tensor:
        """Features, (N, D), of uint8 RGB faces (N, H, W, 3), resized bilinearly and not normalised."""
        device = next(self.net.parameters()).device
        sized = [Image.fromarray(face).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for face in faces]
        pixels = torch.from_numpy(np.stack([np.asarray(face) for face in sized])).permute(0, 3, 1, 2)
        return self.net(pixels.to(device).float() / 255).cpu()
