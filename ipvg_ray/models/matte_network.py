"""Networks that say how much of each pixel is a person, with the preparation each was trained for, behind one class.

Segmentation networks (`hrnet`) give the probability of the classes that are a person; matting networks (`pp_matting`)
give alpha itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipvg_ray.models import hrnet_load, paddle_files, pp_matting
from ipvg_ray.models.hrnet import HRNet

PERSON_CLASSES: dict[int, tuple[int, ...]] = {
    2: (1,),  # background and person
    19: (11, 12),  # Cityscapes: person and rider
    20: tuple(range(1, 20)),  # LIP: hat, hair, face, clothes, limbs: all but background are parts of a person
    21: (15,),  # PASCAL VOC
    59: (36,),  # PASCAL-Context without background
    60: (37,),  # PASCAL-Context
    150: (12,),  # ADE20K
    171: (0,),  # COCO-Stuff
}
"""Number of a head's classes to those that are a person."""

_SIDES = {19: 1024, 20: 473, 59: 520, 60: 520, 150: 520, 171: 520}  # as their test configurations say; else 512
_LIP = 20
_STEP = 32  # what the coarsest branch's pixels span: sizes that it divides lose nothing on the way down and up
_LONGEST = 4  # times the shorter side; MMSegmentation's bound, which strips of pictures are squeezed into


@dataclass(frozen=True)
class Preparation:
    """How a network wants its pictures.

    Attributes:
        side: the square's edge, or the shorter side, pixels.
        square: squeeze the picture into a square, as LIP's evaluation does, instead of keeping its shape.
        enlarge: bring smaller pictures up to `side` too.
        mean, std: per RGB channel of values from 0 to 1.
    """

    side: int
    square: bool = False
    enlarge: bool = True
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which the network sees a picture; equal ones go through it together."""
        if self.square:
            return self.side, self.side
        scale = min(self.side / min(height, width), _LONGEST * self.side / max(height, width))
        scale = scale if self.enlarge else min(scale, 1.0)
        tall, wide = (max(_STEP, round(edge * scale) // _STEP * _STEP) for edge in (height, width))
        return tall, wide

    def __call__(self, rgb: np.ndarray) -> Tensor:
        """uint8 (H, W, 3) to normalised float32 (3, h, w) of `size`."""
        height, width = self.size(*rgb.shape[:2])
        # The originals interpolate without averaging, which aliases when a large photograph is shrunk.
        shrunk = height * width < rgb.shape[0] * rgb.shape[1]
        small = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA if shrunk else cv2.INTER_LINEAR)
        x = torch.from_numpy(small).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std


@dataclass(frozen=True)
class MatteNetwork:
    """A network ready to run.

    Attributes:
        prepare: a picture to its input.
        network: on its device, in evaluation mode.
        alphas: its inputs (B, 3, h, w) to alpha (B, 1, h, w), 0 to 1.
        coarse: whether alpha is a segmentation's, at a quarter of the input's resolution, and wants refinement.
        align_corners: of the last interpolation, as of the network's own.
    """

    prepare: Preparation
    network: nn.Module
    alphas: Callable[[Tensor], Tensor]
    coarse: bool
    align_corners: bool = False

    @torch.inference_mode()
    def run(self, batch: Tensor) -> np.ndarray:
        """Prepared pictures of one size, (B, 3, h, w), to alpha, float32 (B, h, w), 0 to 1.

        On a CPU each goes through alone: together they are no faster there, and alone a picture's alpha is the same to
        the bit whatever is beside it. On a GPU it is the same to 1e-5.
        """
        device = next(self.network.parameters()).device
        parts = batch.split(1) if device.type == "cpu" else (batch,)
        alpha = torch.cat([self.alphas(part.to(device)) for part in parts])
        result: np.ndarray = alpha.squeeze(1).float().clamp(0, 1).cpu().numpy()
        return result

    def full_size(self, alpha: np.ndarray, height: int, width: int) -> np.ndarray:
        """One alpha (h, w) of `run` brought to its picture's size by bilinear interpolation: float32 (H, W)."""
        x = torch.from_numpy(alpha)[None, None]
        full = F.interpolate(x, (height, width), mode="bilinear", align_corners=self.align_corners)
        result: np.ndarray = full[0, 0].numpy()
        return result

    def alpha(self, rgb: np.ndarray) -> np.ndarray:
        """Of one picture, uint8 (H, W, 3): float32 (H, W), 0 to 1."""
        return self.full_size(self.run(self.prepare(rgb)[None])[0], *rgb.shape[:2])


def load(path: Path, device: str = "cpu", input_size: int | None = None) -> MatteNetwork:
    """Read a checkpoint of any network known here; its tensors' names say which it is.

    Args:
        path: what `hrnet_load.load` reads, or a matting network: PaddleSeg's `.pdparams`, or what
            `paddle_files.convert` has made of it.
        input_size: `Preparation.side`; None for what the checkpoint's authors test with.

    Raises:
        HRNetError: where the file cannot be read or is no such network.
        PaddleFileError, PPMattingError: for a matting network's file that cannot be read, or lacks tensors.
        ValueError: for a head whose number of classes is not in `PERSON_CLASSES`.
    """
    state = paddle_files.state_dict(path) if path.suffix == ".pdparams" else hrnet_load.read_state(path)
    if pp_matting.is_matting(state):
        network = pp_matting.from_state(state, path, device)
        prepare = Preparation(
            input_size or 512,
            enlarge=isinstance(network, pp_matting.MODNet),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        )
        return MatteNetwork(prepare, network, network, coarse=False)
    return of_segmentation(hrnet_load.from_state(state, path, device), input_size)


def of_segmentation(network: HRNet, input_size: int | None = None) -> MatteNetwork:
    """A segmentation network's probability of a person as a matte.

    Raises:
        ValueError: for a head whose number of classes is not in `PERSON_CLASSES`.
    """
    config = network.config
    people = PERSON_CLASSES.get(config.classes)
    if people is None:
        raise ValueError(f"which of {config.classes} classes are a person is known for {sorted(PERSON_CLASSES)} only")

    def alphas(batch: Tensor) -> Tensor:
        person = network(batch).softmax(dim=1)[:, list(people)].sum(dim=1, keepdim=True)
        return F.interpolate(person, batch.shape[-2:], mode="bilinear", align_corners=config.align_corners)

    prepare = Preparation(input_size or _SIDES.get(config.classes, 512), square=config.classes == _LIP)
    return MatteNetwork(prepare, network, alphas, coarse=True, align_corners=config.align_corners)
