"""SDXL (Podell et al., arXiv 2307.01952): a batch of pictures in one go, each with its own prompt, seed and adapter.

The networks are diffusers'; the loop is written out because its pipeline cuts prompts at 77 tokens, knows no adapter
per sample and has not quite the noise levels that the method was released with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ipvg_ray.models.lora import Adapter, PerSampleLora
from ipvg_ray.models.sdxl_load import SdxlError
from ipvg_ray.models.sdxl_sampler import Noise, SamplerName, Schedule, sample
from ipvg_ray.models.sdxl_text import TextEncoder, TextStates

KEPT_TEXTS = 64
"""Text states kept, 0.3 MB a chunk: the negative prompt's are made once, a prompt's once for all its attempts."""


@dataclass(frozen=True)
class DrawSettings:
    """What all requests of a batch have in common.

    Attributes:
        height, width: pixels, multiples of 8.
        steps: calls of the UNet.
        guidance: scale w of classifier-free guidance, uncond + w·(cond − uncond); 1 and below switch it off.
        negative_prompt: what to stay away from, of any length.
        sampler, schedule: as `sdxl_sampler` knows them.
        denoise: in (0, 1]; below 1 each request brings a picture, of whose noised state the last steps are drawn.
        control_scale: strength of the ControlNet; 0 leaves it out.
        control_start, control_end: shares of the steps between which it is asked.
    """

    height: int
    width: int
    steps: int
    guidance: float
    negative_prompt: str = ""
    sampler: SamplerName = "dpmpp_2m"
    schedule: Schedule = "karras"
    denoise: float = 1.0
    control_scale: float = 0.0
    control_start: float = 0.0
    control_end: float = 1.0


@dataclass(frozen=True, eq=False)
class Request:
    """One picture.

    Attributes:
        prompt: of any length; see `sdxl_text` for weights.
        seed: of a CPU generator, so that all devices and all batches start from the same noise.
        adapter: LoRA pairs of this sample alone; needed where the model has `lora`.
        picture: RGB uint8 (height, width, 3) to begin with, where `denoise` is below 1.
        mask: bool (height, width), where that picture is drawn anew; None for everywhere.
        control: RGB uint8 (height, width, 3), the ControlNet's picture.
    """

    prompt: str
    seed: int
    adapter: Adapter | None = None
    picture: np.ndarray | None = None
    mask: np.ndarray | None = None
    control: np.ndarray | None = None


class _Conditions(NamedTuple):
    """The UNet's and the ControlNet's keyword arguments for one batch, guidance's copies included."""

    unet: dict[str, Any]
    control: dict[str, Any] | None


class Sdxl:
    """Draws with a loaded pipeline.

    Args:
        pipeline: of `sdxl_load.load`.
        device: where it computes; with offloading its parts are elsewhere between calls.
        clip_skip: layer of the text encoders that is read, counted from the last, 1.
        controlnet: of `sdxl_load.load_controlnet`, on that device.
    """

    def __init__(self, pipeline: Any, device: str = "cpu", *, clip_skip: int = 2, controlnet: Any = None) -> None:
        self.pipeline = pipeline
        self.device = device
        self.controlnet = controlnet
        self.noise = Noise(pipeline.scheduler.config)
        self.lora: PerSampleLora | None = None
        self.lora_scale = 1.0
        self.encode = lru_cache(maxsize=KEPT_TEXTS)(TextEncoder(pipeline, device, clip_skip))

    @property
    def unet(self) -> Any:
        """The denoiser, whose layers take adapters."""
        return self.pipeline.unet

    def adapt(self, lora: PerSampleLora, scale: float) -> None:
        """From now on draw each request with its own adapter, applied with `scale`."""
        self.lora, self.lora_scale = lora, scale

    @torch.no_grad()
    def draw(self, requests: Sequence[Request], settings: DrawSettings) -> list[np.ndarray | SdxlError]:
        """Draw a batch.

        Returns:
            Per request RGB uint8 (height, width, 3), or the error where it came out as NaN or infinity.

        Raises:
            SdxlError: for a size off the VAE's grid, or requests that lack what the settings ask for.
        """
        self._check(requests, settings)
        sigmas = self.noise.levels(settings.schedule, settings.steps, settings.denoise)
        noise = torch.cat([self._noise(request.seed, settings) for request in requests]).to(self.device)
        start = self._encode_pictures(requests) if settings.denoise < 1 else None
        mask = self._masks(requests, noise.shape[-2:]) if start is not None else None
        conditions = self._conditions(requests, settings)
        guided = settings.guidance > 1

        def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
            seen = x
            if start is not None and mask is not None:  # outside the mask it is the picture that was noised
                seen = x * mask + (start + sigma * noise) * (1 - mask)
            share = sigmas.index(sigma) / max(len(sigmas) - 1, 1)
            data = self._predict(seen, sigma, conditions, settings, share)
            if guided:
                uncond, cond = data.chunk(2)
                data = uncond + settings.guidance * (cond - uncond)
            if start is not None and mask is not None:
                data = data * mask + start * (1 - mask)
            return data

        x = self.noise.started(noise, sigmas[0], start)
        if self.lora is None:
            return self._decode(sample(settings.sampler, denoise, x, sigmas))
        adapters = [request.adapter for request in requests if request.adapter is not None]
        with self.lora.applied(adapters, self.lora_scale, copies=2 if guided else 1):
            latents = sample(settings.sampler, denoise, x, sigmas)
        return self._decode(latents)

    def _check(self, requests: Sequence[Request], settings: DrawSettings) -> None:
        factor = self.pipeline.vae_scale_factor
        if settings.height % factor or settings.width % factor:
            raise SdxlError(f"{settings.width}x{settings.height}: both sides must be multiples of {factor}")
        size = (settings.height, settings.width, 3)
        for request in requests:
            if self.lora is not None and request.adapter is None:
                raise SdxlError("a request without an adapter cannot be drawn beside others that have one")
            for what, picture, wanted in (
                ("picture to begin with", request.picture, settings.denoise < 1),
                ("ControlNet picture", request.control, self._controls(settings)),
            ):
                if wanted and (picture is None or picture.shape != size):
                    raise SdxlError(f"a request needs a {what} of {size}, not {getattr(picture, 'shape', None)}")

    def _controls(self, settings: DrawSettings) -> bool:
        return self.controlnet is not None and settings.control_scale > 0

    def _noise(self, seed: int, settings: DrawSettings) -> torch.Tensor:
        factor = self.pipeline.vae_scale_factor
        shape = (1, self.unet.config.in_channels, settings.height // factor, settings.width // factor)
        return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))

    # -- texts -------------------------------------------------------------------------------------------------------

    def _conditions(self, requests: Sequence[Request], settings: DrawSettings) -> _Conditions:
        """Of a batch, the rows of the negative prompt first where there is guidance."""
        texts = [self.encode(request.prompt) for request in requests]
        if settings.guidance > 1:
            texts = [self.encode(settings.negative_prompt)] * len(requests) + texts
        states, mask = _padded(texts)
        # original size, top left corner of the crop, target size: the picture is to look uncropped and of its own size
        time_ids = torch.tensor([[settings.height, settings.width, 0, 0, settings.height, settings.width]])
        added = {
            "text_embeds": torch.cat([text.pooled for text in texts]),
            "time_ids": time_ids.to(self.device).expand(len(texts), -1),
        }
        control = None
        if self._controls(settings):
            pictures = torch.cat([_tensor(request.control) for request in requests]) / 255
            copies = len(texts) // len(requests)
            control = {
                "controlnet_cond": pictures.to(self.device, self.controlnet.dtype).repeat(copies, 1, 1, 1),
                "encoder_hidden_states": _repeated(texts),
                "added_cond_kwargs": added,
                "conditioning_scale": settings.control_scale,
            }
        conditions = {"encoder_hidden_states": states, "encoder_attention_mask": mask, "added_cond_kwargs": added}
        return _Conditions(conditions, control)

    # -- the loop ----------------------------------------------------------------------------------------------------

    def _predict(
        self, x: torch.Tensor, sigma: float, conditions: _Conditions, settings: DrawSettings, share: float
    ) -> torch.Tensor:
        """The data seen in x, float32: only the networks see their own precision. One call for all copies."""
        copies = len(conditions.unet["encoder_hidden_states"]) // len(x)
        x = x.repeat(copies, 1, 1, 1)
        step = torch.tensor(self.noise.timestep(sigma), device=self.device)
        batch = self.noise.scaled(x, sigma).to(self.unet.dtype)
        residuals: dict[str, Any] = {}
        if conditions.control is not None and settings.control_start <= share < settings.control_end:
            residuals = self._controlled(batch, step, conditions.control)
        predicted = self.unet(batch, step, **conditions.unet, **residuals).sample.float()
        return self.noise.data(x, predicted, sigma)

    def _controlled(self, batch: torch.Tensor, step: torch.Tensor, conditions: dict[str, Any]) -> dict[str, Any]:
        down, middle = self.controlnet(batch.to(self.controlnet.dtype), step, **conditions, return_dict=False)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    # -- the VAE -----------------------------------------------------------------------------------------------------

    def _encode_pictures(self, requests: Sequence[Request]) -> torch.Tensor:
        """Latents of the requests' pictures: the middle of what the VAE finds possible, so that no seed is in it."""
        vae = self.pipeline.vae
        pixels = torch.cat([_tensor(request.picture) for request in requests]) / 127.5 - 1
        encoded = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode()
        result: torch.Tensor = (encoded * vae.config.scaling_factor).float()
        return result

    def _masks(self, requests: Sequence[Request], size: Sequence[int]) -> torch.Tensor:
        whole = [torch.ones(1, 1, *size) if r.mask is None else _shrunk(r.mask, size) for r in requests]
        return torch.cat(whole).to(self.device)

    def _decode(self, latents: torch.Tensor) -> list[np.ndarray | SdxlError]:
        vae = self.pipeline.vae
        pictures = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample
        finite = pictures.isfinite().flatten(1).all(1).tolist()
        scaled = ((pictures.nan_to_num().float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        arrays = scaled.permute(0, 2, 3, 1).cpu().numpy()
        return [
            np.ascontiguousarray(array)
            if good
            else SdxlError("the model produced NaN or infinity; use bfloat16 or float32 in place of float16")
            for array, good in zip(arrays, finite, strict=True)
        ]


def _padded(texts: Sequence[TextStates]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """States of one length, and which of them are to be read; no mask where all are as long already.

    A mask, not chunks of empty text: a picture must not depend on how long its neighbours' prompts are.
    """
    lengths = [text.states.shape[1] for text in texts]
    longest = max(lengths)
    states = torch.cat(
        [F.pad(text.states, (0, 0, 0, longest - length)) for text, length in zip(texts, lengths, strict=True)]
    )
    if min(lengths) == longest:
        return states, None
    places = torch.arange(longest, device=states.device)
    return states, places[None] < torch.tensor(lengths, device=states.device)[:, None]


def _repeated(texts: Sequence[TextStates]) -> torch.Tensor:
    """States of one length without a mask, which diffusers' ControlNet has no argument for.

    Each text is repeated whole to a common multiple of the lengths. Attention to a text said n times is attention to
    the text: the cross-attention knows no places, and n cancels out in the softmax.
    """
    length = math.lcm(*(text.states.shape[1] for text in texts))
    return torch.cat([text.states.repeat(1, length // text.states.shape[1], 1) for text in texts])


def _tensor(picture: np.ndarray | None) -> torch.Tensor:
    """float32 (1, 3, height, width), 0 to 255."""
    if picture is None:
        raise SdxlError("a request lacks a picture that its settings ask for")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()


def _shrunk(mask: np.ndarray, size: Sequence[int]) -> torch.Tensor:
    return F.interpolate(torch.from_numpy(mask.astype(np.float32))[None, None], size=tuple(size), mode="bilinear")
