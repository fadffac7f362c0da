"""The tasks: which pictures each takes, and the conditions made of them.

VACE's condition is [frames; mask]: the known frames and grey ones, and a mask that is 0 where a frame is kept and 1
where it is generated. `inactive` is VAE(frames·(1 − mask)), `reactive` VAE(frames·mask); empty frames are grey, exactly
0 in [-1, 1]. A reference picture is one latent frame in front, with mask 0.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ipvg_ray.models.wan.autoencoder import Autoencoder
from ipvg_ray.models.wan.conditions import ChannelCondition, Condition, FirstLatentCondition, VaceCondition
from ipvg_ray.models.wan.errors import WanError

_KEPT_SIZES = 4


@dataclass(frozen=True)
class Task:
    """What a task needs of its model and its rows.

    Attributes:
        name: as the configuration has it.
        form: how pictures reach the network; see `conditions`.
        pipeline: class that a diffusers folder of its model names.
        first_frame, reference: which pictures a row brings.
        experts: how many transformers the model has.
    """

    name: str
    form: Literal["vace", "channels", "first_latent"]
    pipeline: str
    first_frame: bool = True
    reference: bool = False
    experts: int = 1


TASKS = {
    task.name: task
    for task in (
        Task("vace-i2v", "vace", "WanVACEPipeline"),
        Task("vace-r2v", "vace", "WanVACEPipeline", first_frame=False, reference=True),
        Task("vace-i2v+ref", "vace", "WanVACEPipeline", reference=True),
        Task("ti2v-5B", "first_latent", "WanImageToVideoPipeline"),
        Task("i2v-A14B", "channels", "WanImageToVideoPipeline", experts=2),
    )
}


@dataclass(frozen=True)
class Size:
    """Of a video: frames (4·n + 1) and pixels."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Pictures:
    """What a row brings: RGB, uint8, (h, w, 3) each, of any size."""

    first: np.ndarray | None = None
    reference: np.ndarray | None = None


class ConditionMaker:
    """Makes a task's conditions, and keeps the latents that are the same for every video of a size.

    Args:
        task: which one.
        autoencoder: of the model.
        patch: pixels of a token in latents, (height, width).
        scale: weight of VACE's hints.
    """

    def __init__(
        self, task: Task, autoencoder: Autoencoder, patch: tuple[int, int] = (2, 2), scale: float = 1.0
    ) -> None:
        self.task = task
        self.autoencoder = autoencoder
        self.patch = patch
        self.scale = scale
        self._grey: OrderedDict[Size, Tensor] = OrderedDict()

    @property
    def references(self) -> int:
        """Latent frames in front that are no part of the video."""
        return int(self.task.form == "vace" and self.task.reference)

    def check(self, size: Size) -> None:
        """Raises WanError for a size that the network has no tokens for."""
        steps = [self.autoencoder.spatial * patch for patch in self.patch]
        if size.frames % self.autoencoder.temporal != 1 or size.height % steps[0] or size.width % steps[1]:
            raise WanError(
                f"{size.frames} frames of {size.width}x{size.height}: frames must be {self.autoencoder.temporal}·n + 1 "
                f"and sides multiples of {steps[0]}"
            )

    def make(self, rows: Sequence[Pictures], size: Size, *, without: bool = False) -> Condition:
        """The condition of a batch of rows.

        Args:
            without: make the latents for a branch without the identity too.

        Raises:
            WanError: for a size off the grid, or a picture that is missing or none.
        """
        self.check(size)
        firsts = [_needed(row.first, "a first frame") for row in rows] if self.task.first_frame else []
        if self.task.form == "channels":
            return ChannelCondition(self._channels(firsts, size))
        if self.task.form == "first_latent":
            frames = torch.stack([to_signed(fit_frame(first, size)) for first in firsts])
            return FirstLatentCondition(self.autoencoder.encode(frames.unsqueeze(2)), self.patch)
        references = [_needed(row.reference, "a reference picture") for row in rows] if self.task.reference else []
        grey = self.grey(size).expand(len(rows), -1, -1, -1, -1)
        inactive = self.autoencoder.encode(_padded(firsts, size)) if firsts else grey
        control = torch.cat([inactive, grey, self._mask(size, len(rows), kept=bool(firsts))], dim=1)
        if references:
            control = torch.cat([self._references(references, size), control], dim=2)
        bare = torch.cat([grey, grey, self._mask(size, len(rows), kept=False)], dim=1) if without else None
        return VaceCondition(control, bare, self.scale, self.references)

    def grey(self, size: Size) -> Tensor:
        """Latents of a video that is grey throughout, (1, channels, T, h, w): VACE's reactive part here."""
        if size not in self._grey:
            self._grey[size] = self.autoencoder.encode(torch.zeros(1, 3, size.frames, size.height, size.width))
            if len(self._grey) > _KEPT_SIZES:
                self._grey.popitem(last=False)
        self._grey.move_to_end(size)
        return self._grey[size]

    def _mask(self, size: Size, rows: int, *, kept: bool) -> Tensor:
        """VACE's 64 mask channels, (rows, 64, T, h, w): each is one pixel of the 8×8 below a latent.

        Over time the nearest frame is taken, and that is never the first: a kept first frame is not marked as kept.
        The weights were trained so.
        """
        frames, height, width = self.autoencoder.latent_shape(size.frames, size.height, size.width)
        over_time = torch.ones(1, 1, size.frames, device=self.autoencoder.device)
        if kept:
            over_time[..., 0] = 0
        sampled = F.interpolate(over_time, size=frames, mode="nearest-exact")
        return sampled.view(1, 1, frames, 1, 1).expand(rows, self.autoencoder.spatial**2, frames, height, width)

    def _references(self, pictures: Sequence[np.ndarray], size: Size) -> Tensor:
        """One latent frame a reference, (rows, 96, 1, h, w); reactive and mask parts are 0."""
        canvases = torch.stack([letterbox(picture, size, self.autoencoder.spatial) for picture in pictures])
        latents = self.autoencoder.encode(canvases.unsqueeze(2))
        rest = latents.new_zeros(
            len(latents), self.autoencoder.channels + self.autoencoder.spatial**2, *latents.shape[2:]
        )
        return torch.cat([latents, rest], dim=1)

    def _channels(self, firsts: Sequence[np.ndarray], size: Size) -> Tensor:
        """Wan I2V: 4 mask channels, 1 in the first latent frame, and the latents of first frame and grey."""
        latents = self.autoencoder.encode(_padded(firsts, size))
        mask = latents.new_zeros(len(latents), self.autoencoder.temporal, *latents.shape[2:])
        mask[:, :, 0] = 1
        return torch.cat([mask, latents], dim=1)


def _needed(picture: np.ndarray | None, what: str) -> np.ndarray:
    if picture is None:
        raise WanError(f"the task needs {what}")
    return picture


def _checked(picture: np.ndarray) -> np.ndarray:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3 or 0 in picture.shape:
        raise WanError(f"a picture is {picture.dtype} {picture.shape}; uint8 (height, width, 3) is needed")
    return picture


def fit_frame(picture: np.ndarray, size: Size) -> np.ndarray:
    """Bring a picture to the video's size: Lanczos with antialiasing, centred, cut where the shapes differ.

    Cutting rather than stretching keeps the face's proportions, as Wan's own image-to-video code does.

    Args:
        picture: RGB, uint8, (h, w, 3).

    Returns:
        RGB, uint8, (height, width, 3); `picture` itself where it already fits.
    """
    if _checked(picture).shape[:2] == (size.height, size.width):
        return picture
    fitted = ImageOps.fit(Image.fromarray(picture), (size.width, size.height), Image.Resampling.LANCZOS)
    return np.asarray(fitted)


def letterbox(picture: np.ndarray, size: Size, grid: int) -> Tensor:
    """A reference picture, whole, in the middle of a white canvas of the video's size, as VACE's own code does.

    Args:
        picture: RGB, uint8, (h, w, 3).
        grid: sides are first cut down to its multiples, as diffusers' pipeline does.

    Returns:
        (3, height, width) in [-1, 1].
    """
    from diffusers.video_processor import VideoProcessor

    image = VideoProcessor(vae_scale_factor=grid).preprocess(Image.fromarray(_checked(picture)))
    scale = min(size.height / image.shape[-2], size.width / image.shape[-1])
    height, width = int(image.shape[-2] * scale), int(image.shape[-1] * scale)
    canvas = torch.ones(3, size.height, size.width)
    top, left = (size.height - height) // 2, (size.width - width) // 2
    canvas[:, top : top + height, left : left + width] = F.interpolate(image, (height, width), mode="bilinear")[0]
    return canvas


def to_signed(picture: np.ndarray) -> Tensor:
    """(h, w, 3) uint8 to (3, h, w) in [-1, 1]."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255 * 2 - 1


def _padded(firsts: Sequence[np.ndarray], size: Size) -> Tensor:
    """First frames with grey behind them, (rows, 3, F, H, W)."""
    video = torch.zeros(len(firsts), 3, size.frames, size.height, size.width)
    for row, first in enumerate(firsts):
        video[row, :, 0] = to_signed(fit_frame(first, size))
    return video
