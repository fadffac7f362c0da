"""Wan's causal video VAE: pictures to latents as the transformers know them, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ipvg_ray.models.wan.errors import WanError


class Autoencoder:
    """A diffusers `AutoencoderKLWan` whose latents are normalised channel by channel.

    Args:
        vae: the model; float32, as the stock pipelines want it.
        decode: raw latents, (1, channels, T, h, w), to a video, (1, 3, F, H, W) in [-1, 1]; the model's own `decode`
            unless given. Groups of GPUs put their shared one here.

    Attributes:
        temporal, spatial: how many frames and pixels a latent stands for.
        channels: of the latents.
    """

    def __init__(self, vae: Any, decode: Callable[[Tensor], Tensor] | None = None) -> None:
        self.vae = vae
        self.temporal = int(vae.config.scale_factor_temporal)
        self.spatial = int(vae.config.scale_factor_spatial)
        self.channels = int(vae.config.z_dim)
        self._decode = decode or (lambda latents: vae.decode(latents, return_dict=False)[0])

    @property
    def device(self) -> torch.device:
        device: torch.device = self.vae.device
        return device

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """T, h, w of a video's latents."""
        return (frames - 1) // self.temporal + 1, height // self.spatial, width // self.spatial

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """The mode of the posterior, normalised.

        Args:
            video: (B, 3, F, H, W) in [-1, 1]; F = 4·n + 1.

        Returns:
            (B, channels, T, h, w), float32.
        """
        video = video.to(self.device, self.vae.dtype)
        # One at a time: the activations of one 81-frame video take gigabytes.
        latents = torch.cat([self.vae.encode(one).latent_dist.mode() for one in video.split(1)]).float()
        mean, inverse = self._statistics(latents)
        return (latents - mean) * inverse

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Frames of one video.

        Args:
            latents: (1, channels, T, h, w), normalised.

        Returns:
            RGB, uint8, (F, H, W, 3), on the CPU.

        Raises:
            WanError: where the result holds NaN or infinity.
        """
        latents = latents.to(self.device, self.vae.dtype)
        mean, inverse = self._statistics(latents)
        video = self._decode(latents / inverse + mean)[0].float()
        if not torch.isfinite(video).all():
            raise WanError("the model produced NaN or infinity; use bfloat16 or float32 in place of float16")
        levels = (video / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        return levels.permute(1, 2, 3, 0).contiguous().cpu()

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and inverse deviation of the latents' channels, (1, channels, 1, 1, 1)."""
        config = self.vae.config
        mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1).to(like)
        return mean, 1.0 / torch.tensor(config.latents_std).view(1, -1, 1, 1, 1).to(like)
