"""GME score: how much a video's frames are what its prompt says, by GME-Qwen2-VL (arXiv 2412.16855), as TPIGE uses it.

The published model brings its own code, which runs on older transformers only. Here its few steps are done on
transformers' Qwen2-VL: the state of the last token, scaled to length 1. Its code counts the positions of picture tokens
one after another, not by row and column as Qwen2-VL itself does; so does this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ipvg_ray.metrics.frames import at_most
from ipvg_ray.metrics.metric import Sampled, Score, in_batches, in_chunks
from ipvg_ray.metrics.nets.weights import WeightsError
from ipvg_ray.models.quiet import only_errors

_SYSTEM = "You are a helpful assistant."
_QUERY = "Find frames that match the given text description."  # the words are part of the metric
_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
_LIMIT = 1800


class GmeScore:
    """The embedding model, loaded.

    Args:
        folder: in the Hugging Face format, such as gme-Qwen2-VL-2B-Instruct.
        dtype: TPIGE uses float16 on a GPU.
        tokens: least and most tokens of a picture.
        batch: pictures, or texts, at a time.

    Raises:
        WeightsError: where the folder holds no Qwen2-VL, or not all its weights.
    """

    rule = staticmethod(at_most(16))

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        tokens: tuple[int, int] = (256, 1280),
        batch: int = 4,
    ) -> None:
        from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        try:
            with only_errors():
                loaded: Any = Qwen2VLForConditionalGeneration.from_pretrained(
                    folder, dtype=dtype, local_files_only=True, output_loading_info=True
                )
                self._prepare: Any = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
                self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise WeightsError(f"{folder} holds no GME-Qwen2-VL: {error}") from error
        model, report = loaded
        if lost := sorted(key for key in report["missing_keys"] if not key.startswith("lm_head")):
            raise WeightsError(f"{folder} lacks weights of GME-Qwen2-VL: {lost[:3]}")
        self.model = model.model.eval().requires_grad_(False).to(device)
        self.batch = batch
        self._factor = int(self._prepare.patch_size) * int(self._prepare.merge_size)
        self._size = {"shortest_edge": tokens[0] * self._factor**2, "longest_edge": tokens[1] * self._factor**2}

    @torch.no_grad()
    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """(N, D), length 1."""
        rows = [self._ids(_QUERY, prompt) for prompt in prompts]
        longest = max(map(len, rows))
        # Filled up behind: every token sees only those before it, so that what follows a text's end changes nothing.
        filled = [row + row[-1:] * (longest - len(row)) for row in rows]
        ids = torch.tensor(filled, device=self.model.device)
        return self._pooled(self.model.get_input_embeddings()(ids), [len(row) - 1 for row in rows])

    @torch.no_grad()
    def embed_pictures(self, frames: np.ndarray) -> Tensor:
        """(N, D), length 1, of uint8 RGB (N, H, W, 3)."""
        pictures = [_sized(frame, self._factor) for frame in frames]
        seen = self._prepare(images=pictures, size=self._size, return_tensors="pt")
        grid = seen["image_grid_thw"]
        count = int(grid[0].prod()) // int(self._prepare.merge_size) ** 2
        pad = self._tokenizer.convert_tokens_to_ids("<|image_pad|>")
        row: list[int] = []
        for token in self._ids(_SYSTEM, _PICTURE):
            row += [token] * (count if token == pad else 1)
        ids = torch.tensor([row] * len(pictures), device=self.model.device)
        embedded = self.model.get_input_embeddings()(ids)
        visual = self.model.visual
        patches = visual(seen["pixel_values"].to(ids.device, embedded.dtype), grid_thw=grid.to(ids.device))
        found = getattr(patches, "pooler_output", patches)
        embedded[ids == pad] = found.to(embedded.dtype)
        return self._pooled(embedded, [len(row) - 1] * len(pictures))

    def score(self, videos: Sequence[Sampled]) -> list[Score]:
        """Mean cosine of each video's frames with its prompt, -1 to 1."""
        prompts = [video.prompt for video in videos]
        texts = torch.cat([self.embed_texts(prompts[part]) for part in in_chunks(len(prompts), self.batch)])
        seen = in_batches([video.frames for video in videos], self.batch, self.embed_pictures)
        means = [(torch.stack(frames) @ text).double().mean() for frames, text in zip(seen, texts, strict=True)]
        return [float(mean) for mean in means]

    def _ids(self, instruction: str, content: str) -> list[int]:
        message = f"<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n"
        found: list[int] = self._tokenizer(f"{message}<|im_start|>assistant\n<|endoftext|>")["input_ids"]
        return found[:_LIMIT]

    def _pooled(self, embedded: Tensor, ends: Sequence[int]) -> Tensor:
        """The state of each row's token at `ends`, scaled to length 1."""
        count, length = embedded.shape[:2]
        places = torch.arange(length, device=embedded.device).expand(3, count, -1)
        mask = torch.ones(count, length, dtype=torch.long, device=embedded.device)
        states = self.model.language_model(inputs_embeds=embedded, attention_mask=mask, position_ids=places)
        return F.normalize(states.last_hidden_state[torch.arange(count), torch.tensor(ends)].float(), dim=1)


def _sized(frame: np.ndarray, factor: int) -> Image.Image:
    """The picture with sides that are multiples of `factor`, as GME's code resizes it before the processor does."""
    height, width = frame.shape[:2]
    least, most = 4 * factor**2, 16384 * factor**2
    size = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if math.prod(size) > most:
        shrink = math.sqrt(height * width / most)
        size = [math.floor(side / shrink / factor) * factor for side in (height, width)]
    elif math.prod(size) < least:
        grow = math.sqrt(least / (height * width))
        size = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return Image.fromarray(frame).resize((size[1], size[0]))
