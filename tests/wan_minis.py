"""What the tests of Wan models share: the miniatures, pictures, and the stock pipelines with the official shift."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ipvg_ray.models.mini import wan_vace
from ipvg_ray.models.wan.autoencoder import Autoencoder
from ipvg_ray.models.wan.load import load
from ipvg_ray.models.wan.loop import Denoiser
from ipvg_ray.models.wan.tasks import TASKS, Pictures, Size
from ipvg_ray.models.wan.text import TextEncoder
from ipvg_ray.models.wan.video import Sample, VideoModel

FOLDERS = {
    "vace-i2v": wan_vace.NAME,
    "vace-r2v": wan_vace.NAME,
    "vace-i2v+ref": wan_vace.NAME,
    "ti2v-5B": wan_vace.TI2V_NAME,
    "i2v-A14B": wan_vace.A14B_NAME,
}
SIZE = Size(9, 32, 64)
SHIFT = 5.0


def picture(height: int = SIZE.height, width: int = SIZE.width, flip: bool = False) -> np.ndarray:
    """A gradient; another one where flipped."""
    y, x = np.mgrid[0:height, 0:width]
    array = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (height + width)], -1).astype(np.uint8)
    return np.ascontiguousarray(array[::-1, ::-1]) if flip else array


def model(root: Path, task: str, dtype: torch.dtype = torch.float32, **denoiser: Any) -> VideoModel:
    """The task's miniature below `root`, ready to make videos."""
    parts = load(root / FOLDERS[task], TASKS[task], dtype=dtype, device="cpu", shift=SHIFT)
    boundary = 0.9 if TASKS[task].experts == 2 else None
    loop = Denoiser(parts.transformers, parts.scheduler, boundary=boundary, **denoiser)
    return VideoModel(TASKS[task], loop, Autoencoder(parts.vae))


def stock(root: Path, task: str) -> Any:
    """diffusers' own pipeline on the same miniature."""
    import diffusers

    pipeline = getattr(diffusers, TASKS[task].pipeline).from_pretrained(root / FOLDERS[task], local_files_only=True)
    pipeline.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipeline.scheduler.config, flow_shift=SHIFT)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(task: str, text: torch.Tensor, seed: int = 7, flip: bool = False) -> Sample:
    """A row of the task: a first frame that fits, a reference of another shape."""
    kind = TASKS[task]
    first = picture(flip=flip) if kind.first_frame else None
    return Sample(Pictures(first, picture(48, 40, flip) if kind.reference else None), text, seed)


def encoder(pipeline: Any) -> TextEncoder:
    """Ours, around the pipeline's tokenizer and UMT5."""
    return TextEncoder(pipeline.tokenizer, pipeline.text_encoder)
