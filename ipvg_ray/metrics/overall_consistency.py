"""Overall consistency: how much a video is what its prompt says, by ViCLIP, as VBench computes it."""

from __future__ import annotations

import html
from typing import Any

import ftfy
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ipvg_ray.metrics.nets.vi_clip import ViClip
from ipvg_ray.metrics.pixels import vbench_clip


class OverallConsistency:
    """Compares videos with prompts.

    Args:
        net: ViCLIP, on the device to use.
        tokenizer: CLIP's (transformers): ViCLIP has the same vocabulary.
    """

    def __init__(self, net: ViClip, tokenizer: Any) -> None:
        self.net, self.tokenizer = net, tokenizer

    def tokens(self, prompt: str) -> Tensor:
        """Token ids, (1, tokens): begin, text, end, then zeros. A text that is too long is cut before its end mark."""
        text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
        room = self.net.sizes.tokens
        ids = self.tokenizer(text, truncation=False, verbose=False)["input_ids"]
        if len(ids) > room:
            ids = [*ids[: room - 1], ids[-1]]
        return torch.tensor([ids + [0] * (room - len(ids))])

    @torch.no_grad()
    def score(self, frames: np.ndarray, prompt: str) -> float:
        """Cosine of video and text, -1 to 1.

        Args:
            frames: those of `frames.middles(8)`, uint8 RGB, (8, H, W, 3).
        """
        device = next(self.net.parameters()).device
        pixels = vbench_clip(frames, self.net.sizes.side, device, whole=True)
        video = F.normalize(self.net.vision_encoder(pixels[None]), dim=-1)
        text = F.normalize(self.net.text_encoder(self.tokens(prompt).to(device)), dim=-1)
        return float((video @ text.T).item())
