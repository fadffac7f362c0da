"""CLIP scores: how much a video's frames are what its prompt says. Two variants, which are not comparable.

- ConsisID's: CLIP ViT-B/32, 16 frames, 100 · cosine. Its code hands the frames to CLIP with red and blue exchanged,
  which the challenge's numbers contain; `swapped=False` gives what was meant.
- TPIGE's: CLIP ViT-B/16, at most 32 frames, cosine.

Radford et al., arXiv 2103.00020; Hessel et al., arXiv 2104.08718.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ipvg_ray.metrics.frames import Rule, at_most, starts
from ipvg_ray.metrics.metric import Sampled, Score, in_chunks
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
        rule: which frames are compared.
        swapped: whether red and blue are exchanged before the frames are handed to CLIP.
        scaled: whether the cosine is multiplied by CLIP's learnt scale, 100.
        batch: videos at a time, each with all its frames.
    """

    def __init__(self, clip: tuple[Any, Any, Any], *, rule: Rule, swapped: bool, scaled: bool, batch: int = 4) -> None:
        self.model, self.processor, self.tokenizer = clip
        self.rule, self.swapped, self.scaled, self.batch = rule, swapped, scaled, batch

    def score(self, videos: Sequence[Sampled]) -> list[Score]:
        """Mean cosine of each video's frames with its prompt; -1 to 1, times 100 where scaled."""
        scale = float(self.model.logit_scale.exp()) if self.scaled else 1.0
        parts = in_chunks(len(videos), self.batch)
        return [scale * float(np.mean(found)) for part in parts for found in self._cosines(videos[part])]

    @torch.no_grad()
    def _cosines(self, videos: Sequence[Sampled]) -> list[list[float]]:
        """Of each video its frames' cosines with its prompt, cut at 77 tokens."""
        order = slice(None, None, -1 if self.swapped else 1)
        pictures = [np.ascontiguousarray(frame[..., order]) for video in videos for frame in video.frames]
        pixels = self.processor(pictures, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        length = int(self.model.config.text_config.max_position_embeddings)
        texts = [video.prompt for video in videos]
        text = self.tokenizer(texts, truncation=True, padding=True, max_length=length, return_tensors="pt")
        given = {key: text[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
        output = self.model(pixel_values=pixels.to(self.model.device), **given)
        frames = output.image_embeds.split([len(video.frames) for video in videos])
        return [(seen @ read).tolist() for seen, read in zip(frames, output.text_embeds, strict=True)]


def consisid(clip: tuple[Any, Any, Any], *, swapped: bool = True) -> ClipScore:
    """ConsisID's variant, of CLIP ViT-B/32."""
    return ClipScore(clip, rule=starts(16), swapped=swapped, scaled=True)


def tpige(clip: tuple[Any, Any, Any]) -> ClipScore:
    """TPIGE's variant, of CLIP ViT-B/16."""
    return ClipScore(clip, rule=at_most(32), swapped=False, scaled=False)
