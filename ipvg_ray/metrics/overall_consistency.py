"""Overall consistency: how much a video is what its prompt says, by ViCLIP, as VBench computes it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import ftfy
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ipvg_ray.metrics.frames import Rule, middles
from ipvg_ray.metrics.metric import Sampled, Score, in_batches
from ipvg_ray.metrics.nets.vi_clip import ViClip
from ipvg_ray.metrics.pixels import vbench_clip


class OverallConsistency:
    """Compares videos with prompts.

    Args:
        net: ViCLIP, on the device to use.
        tokenizer: CLIP's (transformers): ViCLIP has the same vocabulary.
        batch: videos, and texts, at a time.
    """

    def __init__(self, net: ViClip, tokenizer: Any, batch: int = 8) -> None:
        self.net, self.tokenizer, self.batch = net, tokenizer, batch

    @property
    def rule(self) -> Rule:
        """The middles of as many intervals as ViCLIP takes frames, 8 in the published one."""
        return middles(self.net.sizes.frames)

    def tokens(self, prompt: str) -> Tensor:
        """Token ids, (tokens,): begin, text, end, then zeros. A text that is too long is cut before its end mark."""
        text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
        room = self.net.sizes.tokens
        ids = self.tokenizer(text, truncation=False, verbose=False)["input_ids"]
        if len(ids) > room:
            ids = [*ids[: room - 1], ids[-1]]
        return torch.tensor(ids + [0] * (room - len(ids)))

    @torch.no_grad()
    def score(self, videos: Sequence[Sampled]) -> list[Score]:
        """Cosine of each video with its prompt, -1 to 1."""
        seen = in_batches([[video.frames] for video in videos], self.batch, self._of_videos)
        read = in_batches([[self.tokens(video.prompt).numpy()] for video in videos], self.batch, self._of_texts)
        return [float(one @ other) for (one,), (other,) in zip(seen, read, strict=True)]

    def _of_videos(self, frames: np.ndarray) -> Tensor:
        """Unit vectors, (N, D), of uint8 RGB (N, T, H, W, 3)."""
        device = next(self.net.parameters()).device
        pixels = vbench_clip(frames.reshape(-1, *frames.shape[2:]), self.net.sizes.side, device, whole=True)
        found = self.net.vision_encoder(pixels.view(*frames.shape[:2], *pixels.shape[1:]))
        return F.normalize(found, dim=-1).cpu()

    def _of_texts(self, tokens: np.ndarray) -> Tensor:
        """Unit vectors, (N, D), of token ids (N, tokens)."""
        given = torch.from_numpy(tokens).to(next(self.net.parameters()).device)
        return F.normalize(self.net.text_encoder(given), dim=-1).cpu()
