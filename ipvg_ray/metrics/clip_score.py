"""CLIP scores: how much a video's frames are what its prompt says. Two variants, which are not comparable.

- ConsisID's: CLIP ViT-B/32, 16 frames, 100 · cosine. Its code hands the frames to CLIP with red and blue exchanged,
  which the challenge's numbers contain; `swapped=False` gives what was meant.
- TPIGE's: CLIP ViT-B/16, at most 32 frames, cosine.

Radford et al., arXiv 2103.00020; Hessel et al., arXiv 2104.08718.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ipvg_ray.metrics.nets.weights import WeightsError
from ipvg_ray.models.quiet import only_errors


def load_clip(folder: Path, device: str = "cpu") -> tuple[Any, Any, Any]:
    """CLIP's model, picture processor and tokenizer from a transformers folder. Raises WeightsError."""
    from transformers import CLIPImageProcessorPil, CLIPModel

    model = load_pretrained(CLIPModel, folder, device)
    try:
        # The Pillow backend: the default one needs torchvision.
        processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder} holds no CLIP: {error}") from error
    return model, processor, load_tokenizer(folder)


def load_pretrained(kind: Any, folder: Path, device: str) -> Any:
    """A transformers model in float32, whole: with `from_pretrained` alone missing weights would be drawn at random.

    Raises:
        WeightsError: where the folder does not hold it, or not all of it.
    """
    try:
        with only_errors():
            model, report = kind.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{folder} holds no {kind.__name__}: {error}") from error
    if report["missing_keys"]:
        raise WeightsError(f"{folder} lacks weights of {kind.__name__}: {sorted(report['missing_keys'])[:3]}")
    return model.eval().requires_grad_(False).to(device)


def load_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer from a transformers folder. Raises WeightsError."""
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder} holds no CLIP tokenizer: {error}") from error


class ClipScore:
    """One variant.

    Args:
        clip: what `load_clip` gives.
        swapped: whether red and blue are exchanged before the frames are handed to CLIP.
        scaled: whether the cosine is multiplied by CLIP's learnt scale, 100.
    """

    def __init__(self, clip: tuple[Any, Any, Any], *, swapped: bool, scaled: bool) -> None:
        self.model, self.processor, self.tokenizer = clip
        self.swapped, self.scaled = swapped, scaled

    @torch.no_grad()
    def cosines(self, frames: np.ndarray, prompt: str) -> Tensor:
        """Cosine of each frame, uint8 RGB (N, H, W, 3), with the prompt, cut at 77 tokens: (N,)."""
        pictures = [np.ascontiguousarray(frame[..., ::-1] if self.swapped else frame) for frame in frames]
        pixels = self.processor(pictures, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        length = int(self.model.config.text_config.max_position_embeddings)
        text = self.tokenizer([prompt], truncation=True, max_length=length, return_tensors="pt")
        given = {key: text[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
        output = self.model(pixel_values=pixels.to(self.model.device), **given)
        cosines: Tensor = output.image_embeds @ output.text_embeds[0]
        return cosines

    def score(self, frames: np.ndarray, prompt: str) -> float:
        """Mean over the frames; -1 to 1, times 100 where scaled."""
        mean = self.cosines(frames, prompt).double().mean()
        return float(mean * self.model.logit_scale.exp() if self.scaled else mean)
