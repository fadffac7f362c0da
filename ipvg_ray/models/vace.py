"""Wan2.1-VACE through diffusers' own pipeline: a video from its first frame and a prompt.

Jiang et al., "VACE: All-in-One Video Creation and Editing", arXiv 2503.07598. The Video Condition Unit is
[prompt; frames; mask]: frames are the first frame and grey ones, the mask keeps the first and generates the others.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ipvg_ray.models.quiet import no_bars

logger = logging.getLogger(__name__)

MAX_TEXT_TOKENS = 512
"""What Wan was trained with; the pipeline cuts longer prompts."""


class VaceError(ValueError):
    """A folder that holds no VACE model, inputs that it cannot take, or a result that is no picture."""


def load(folder: Path, *, dtype: torch.dtype, device: str, shift: float) -> Any:
    """Load a `WanVACEPipeline` from a local diffusers folder, without any network.

    Args:
        folder: what `save_pretrained` wrote, such as Wan2.1-VACE-14B-diffusers.
        dtype: of transformer and text encoder. It is given to `from_pretrained`, which keeps rotary tables, time
            embedder and norms in float32; `.to(dtype)` would cast those too. The VAE stays float32.
        device: where all parts go, such as `cuda`.
        shift: the flow-matching schedule's shift, σ' = shift·σ / (1 + (shift − 1)·σ). VACE's own setting is 16; the
            published conversions carry 3, so the checkpoint's value is never used.

    Raises:
        VaceError: where the folder holds no VACE pipeline, or one whose schedule has no shift.
    """
    from diffusers import UniPCMultistepScheduler, WanVACEPipeline

    index = folder / "model_index.json"
    if not index.is_file() or '"WanVACEPipeline"' not in index.read_text():
        raise VaceError(f"{folder} holds no WanVACEPipeline; give the folder of a Wan2.1-VACE-…-diffusers checkpoint")
    with no_bars():
        pipeline = WanVACEPipeline.from_pretrained(
            folder, dtype={"default": dtype, "vae": torch.float32}, local_files_only=True
        )
    if not pipeline.scheduler.config.get("use_flow_sigmas"):
        raise VaceError(f"{folder}/scheduler is no flow-matching UniPC schedule; its shift could not be set to {shift}")
    pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, flow_shift=shift)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def fit_frame(first: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bring a picture to the video's size: Lanczos with antialiasing, centred, cut where the shapes differ.

    Cutting rather than stretching keeps the face's proportions, as Wan's own image-to-video code does.

    Args:
        first: RGB, uint8, (h, w, 3).

    Returns:
        RGB, uint8, (height, width, 3); `first` itself where it already fits.
    """
    if first.dtype != np.uint8 or first.ndim != 3 or first.shape[-1] != 3 or 0 in first.shape:
        raise VaceError(f"the first frame is {first.dtype} {first.shape}; uint8 (height, width, 3) is needed")
    if first.shape[:2] == (height, width):
        return first
    return np.asarray(ImageOps.fit(Image.fromarray(first), (width, height), Image.Resampling.LANCZOS))


def first_frame_condition(first: np.ndarray, frames: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """VACE's frames and mask for "go on from this picture", in the one form that diffusers reads exactly.

    Empty frames are 0.5, which the pipeline maps to 0.0 in [-1, 1]; an 8-bit grey would miss it by 1/255. The arrays
    must be 5-D: lists of arrays are misread.

    Args:
        first: RGB, uint8, (h, w, 3); fitted to the video's size.

    Returns:
        video, float32, (1, frames, height, width, 3) in [0, 1], and mask, float32, (1, frames, height, width, 1):
        0 keep, 1 generate.
    """
    video = np.full((1, frames, height, width, 3), 0.5, np.float32)
    video[0, 0] = fit_frame(first, height, width).astype(np.float32) / 255
    mask = np.ones((1, frames, height, width, 1), np.float32)
    mask[0, 0] = 0
    return video, mask


class FirstFrameToVideo:
    """One loaded VACE pipeline. Text states of negative prompts are kept, since all rows of a run share one.

    VACE's `reactive` latents are the same for every video of a size too, but the stock pipeline has no place to give
    them back.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self._negative_states = lru_cache(maxsize=4)(self._text_states)

    def generate(
        self,
        first: np.ndarray,
        prompt: str,
        negative_prompt: str,
        *,
        frames: int,
        height: int,
        width: int,
        steps: int,
        guidance: float,
        seed: int,
        conditioning_scale: float = 1.0,
    ) -> np.ndarray:
        """Make one video.

        Args:
            first: RGB, uint8, (h, w, 3).
            prompt: what happens; beyond 512 tokens the model does not see it, and a warning is logged.
            negative_prompt: what to stay away from; without effect where `guidance` ≤ 1.
            frames: 4·n + 1.
            height, width: pixels, multiples of 16.
            steps: denoising steps.
            guidance: scale w of classifier-free guidance, uncond + w·(cond − uncond); 1 and below switch it off.
            seed: of a CPU generator, so that all devices start from the same noise.
            conditioning_scale: weight of VACE's hints.

        Returns:
            RGB, uint8, (frames, height, width, 3).

        Raises:
            VaceError: for sizes off the model's grid, or where the result holds NaN or infinity.
        """
        if frames % 4 != 1 or height % 16 or width % 16:
            raise VaceError(f"{frames} frames of {width}x{height}: frames must be 4·n + 1 and sides multiples of 16")
        video, mask = first_frame_condition(first, frames, height, width)
        result = self.pipeline(
            video=video,
            mask=mask,
            prompt_embeds=self._text_states(prompt),
            negative_prompt_embeds=self._negative_states(negative_prompt) if guidance > 1 else None,
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            conditioning_scale=conditioning_scale,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="np",
        ).frames[0]
        if not np.isfinite(result).all():
            raise VaceError("the model produced NaN or infinity; use bfloat16 or float32 in place of float16")
        return (result * 255).round().astype(np.uint8)

    @torch.no_grad()
    def _text_states(self, text: str) -> torch.Tensor:
        """UMT5's states of a text, (1, 512, channels), zero behind its end."""
        count = len(self.pipeline.tokenizer(text).input_ids)
        if count > MAX_TEXT_TOKENS:
            logger.warning("a prompt of %d tokens is cut to %d: %.60s…", count, MAX_TEXT_TOKENS, text)
        states, _ = self.pipeline.encode_prompt(
            text, do_classifier_free_guidance=False, max_sequence_length=MAX_TEXT_TOKENS
        )
        return states
