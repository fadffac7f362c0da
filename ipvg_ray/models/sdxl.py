"""SDXL (Podell et al., arXiv 2307.01952) as IPVG-STD's first frames use it: one picture at a time from long prompts.

The networks and the scheduler are diffusers'; the loop is written out because its pipeline cuts prompts at 77 tokens.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ipvg_ray.models.quiet import only_errors


class SdxlError(ValueError):
    """A checkpoint that is no SDXL, a size it cannot draw, or a result that is no picture."""


class TextStates(NamedTuple):
    """What the UNet reads of a text: states (1, 77·chunks, channels) of both encoders, and pooled (1, projection)."""

    states: torch.Tensor
    pooled: torch.Tensor


def load(checkpoint: Path, config: Path, *, dtype: torch.dtype, device: str) -> Any:
    """Load a `StableDiffusionXLPipeline` without any network, its scheduler replaced by DPM++ 2M with Karras' sigmas.

    The VAE is always float32: SDXL's own overflows in float16.

    Args:
        checkpoint: a single .safetensors file in SDXL's original layout with baked VAE, or a diffusers folder.
        config: diffusers folder with the configurations and tokenizers that a single file lacks; not read for folders.
        dtype: of UNet and text encoders.
        device: where all parts go, such as `cuda`.

    Raises:
        SdxlError: where something is missing from either.
    """
    with only_errors():
        # Importing them prints advice too.
        from diffusers.loaders.single_file_utils import SingleFileComponentError

        try:
            pipeline = _read_folder(checkpoint, dtype) if checkpoint.is_dir() else _read_file(checkpoint, config, dtype)
            pipeline = pipeline.to(device)
        except SdxlError:
            raise
        except NotImplementedError as error:  # what torch says of weights without values: the file holds none
            raise SdxlError(f"{checkpoint} lacks weights of the SDXL that {config} describes") from error
        except (OSError, ValueError, KeyError, RuntimeError, SingleFileComponentError) as error:
            raise SdxlError(f"cannot load an SDXL checkpoint from {checkpoint}: {error}") from error
    pipeline.scheduler = _dpm_solver(pipeline.scheduler.config)
    return pipeline


def _read_folder(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import StableDiffusionXLPipeline

    types = {"default": dtype, "vae": torch.float32}
    return StableDiffusionXLPipeline.from_pretrained(folder, dtype=types, add_watermarker=False, local_files_only=True)


def _read_file(checkpoint: Path, config: Path, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline

    # Looked for here, because diffusers would take a missing path for the name of a repository and go to the network.
    if not checkpoint.is_file():
        raise SdxlError(f"{checkpoint} is missing; give an SDXL .safetensors file or a diffusers folder")
    if not (config / "model_index.json").is_file():
        raise SdxlError(f"{config} is no diffusers folder with SDXL's configurations and tokenizers")
    options: dict[str, Any] = {"config": str(config), "local_files_only": True}
    vae = AutoencoderKL.from_single_file(str(checkpoint), subfolder="vae", dtype=torch.float32, **options)
    return StableDiffusionXLPipeline.from_single_file(
        str(checkpoint), vae=vae, dtype=dtype, add_watermarker=False, **options
    )


def _dpm_solver(config: Any) -> Any:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095) on Karras' sigmas (arXiv 2206.00364, eq. 5), down to zero.

    Betas, their number and what the UNet predicts stay the checkpoint's.
    """
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler.from_config(
        config,
        algorithm_type="dpmsolver++",
        solver_order=2,
        use_karras_sigmas=True,
        final_sigmas_type="zero",
        timestep_spacing="linspace",
        thresholding=False,
    )


class Sdxl:
    """Draws with a loaded pipeline. Text states of negative prompts are kept, since all rows of a run share one."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self._kept_states = lru_cache(maxsize=4)(self.encode)

    @property
    def unet(self) -> Any:
        """The denoiser, whose layers take adapters."""
        return self.pipeline.unet

    @torch.no_grad()
    def encode(self, text: str) -> TextStates:
        """A text of any length, in chunks of 75 tokens, each between a beginning and an end mark.

        States are the penultimate layer's (CLIP skip 2), the chunks' one after another. Pooled is the first chunk's.
        """
        ids = [_token_rows(t, text) for t in (self.pipeline.tokenizer, self.pipeline.tokenizer_2)]
        encoders = (self.pipeline.text_encoder, self.pipeline.text_encoder_2)
        outputs = [e(rows.to(e.device), output_hidden_states=True) for e, rows in zip(encoders, ids, strict=True)]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return TextStates(states.flatten(0, 1)[None], outputs[1].text_embeds[:1])

    @torch.no_grad()
    def generate(
        self, prompt: str, negative_prompt: str, *, height: int, width: int, steps: int, guidance: float, seed: int
    ) -> np.ndarray:
        """Draw one picture.

        Args:
            prompt: of any length.
            negative_prompt: what to stay away from, of any length; without effect where `guidance` ≤ 1.
            height, width: pixels, multiples of 8.
            steps: denoising steps.
            guidance: scale w of classifier-free guidance, uncond + w·(cond − uncond); 1 and below switch it off.
            seed: of a CPU generator, so that all devices start from the same noise.

        Returns:
            RGB, uint8, (height, width, 3).

        Raises:
            SdxlError: for a size off the VAE's grid, or where the result holds NaN or infinity.
        """
        factor = self.pipeline.vae_scale_factor
        if height % factor or width % factor:
            raise SdxlError(f"{width}x{height}: both sides must be multiples of {factor}")
        texts = [self.encode(prompt)]
        if guidance > 1:
            texts = [self._kept_states(negative_prompt), *texts]
        shape = (1, self.unet.config.in_channels, height // factor, width // factor)
        noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
        latents = self._denoise(noise, self._conditions(texts, height, width), steps, guidance)
        return self._decode(latents)

    def _conditions(self, texts: list[TextStates], height: int, width: int) -> dict[str, Any]:
        """The UNet's keyword arguments for a batch of one row per text, filled up with empty chunks to one length."""
        longest = max(text.states.shape[1] for text in texts)
        rows = [self._filled_up(text.states, longest) for text in texts]
        # original size, top left corner of the crop, target size: the picture is to look uncropped and of its own size
        time_ids = torch.tensor([[height, width, 0, 0, height, width]] * len(texts))
        return {
            "encoder_hidden_states": torch.cat(rows),
            "added_cond_kwargs": {
                "text_embeds": torch.cat([text.pooled for text in texts]),
                "time_ids": time_ids.to(self.unet.device),
            },
        }

    def _filled_up(self, states: torch.Tensor, length: int) -> torch.Tensor:
        missing = length - states.shape[1]
        if not missing:
            return states
        empty = self._kept_states("").states
        return torch.cat([states, *[empty] * (missing // empty.shape[1])], dim=1)

    def _denoise(self, noise: torch.Tensor, conditions: dict[str, Any], steps: int, guidance: float) -> torch.Tensor:
        """Latents from noise, (1, channels, h, w), float32 throughout: only the UNet sees its own precision."""
        scheduler, copies = self.pipeline.scheduler, len(conditions["encoder_hidden_states"])
        scheduler.set_timesteps(steps, device=self.unet.device)
        latents = noise.to(self.unet.device) * scheduler.init_noise_sigma
        for step in scheduler.timesteps:
            batch = scheduler.scale_model_input(latents.expand(copies, -1, -1, -1), step).to(self.unet.dtype)
            predicted = self.unet(batch, step, **conditions).sample.float()
            if copies == 2:
                uncond, cond = predicted.chunk(2)
                predicted = uncond + guidance * (cond - uncond)
            latents = scheduler.step(predicted, step, latents).prev_sample
        return latents

    def _decode(self, latents: torch.Tensor) -> np.ndarray:
        vae = self.pipeline.vae
        picture = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample[0]
        if not picture.isfinite().all():
            raise SdxlError("the model produced NaN or infinity; use bfloat16 or float32 in place of float16")
        scaled = ((picture / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return np.ascontiguousarray(scaled.permute(1, 2, 0).cpu().numpy())


def _token_rows(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids, (chunks, 77): at least one chunk, the last one padded as the tokenizer pads."""
    room = tokenizer.model_max_length - 2
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    chunks = [ids[start : start + room] for start in range(0, max(len(ids), 1), room)]
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return torch.tensor([[begin, *chunk, end, *[pad] * (room - len(chunk))] for chunk in chunks])
