"""The chat engine for vision-language models on transformers: questions may carry a picture. One question at a time."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ipvg_ray.models.chat import ChatModel, SeededSampler
from ipvg_ray.models.chat_engine import Answer, ChatFolderError, PromptTooLongError, Question, Sampling


class VisionChatModel(ChatModel):
    """A vision-language model of the Qwen3-VL family from a folder in the Hugging Face format.

    Pictures are prepared by transformers' own code for machines without torchvision. Questions run one after another:
    this engine is for looking at single rows and for machines without vLLM.

    Args:
        folder: as for `ChatModel`, with `preprocessor_config.json`.
        dtype, device: as for `ChatModel`.

    Raises:
        ChatFolderError: where the folder is not such a model.
    """

    loader = "AutoModelForImageTextToText"

    def __init__(self, folder: str | Path, *, dtype: str = "float32", device: str = "cpu") -> None:
        super().__init__(folder, dtype=dtype, device=device)
        if not (Path(folder) / "preprocessor_config.json").is_file():
            raise ChatFolderError(f"{folder} holds no preprocessor_config.json; give the folder of a Qwen3-VL model")
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self._prepare: Any = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
        self._image_id = int(self.model.config.image_token_id)

    def check(self, question: Question, sampling: Sampling) -> int:
        """See `BatchEngine.check`. A picture counts as the tokens that the model reads of it."""
        if question.picture is None:
            return super().check(question, sampling)
        width, height = _opened(question.picture).size
        patches = self._prepare.get_number_of_image_patches(height, width, {})
        length = len(self.tokens.encode(question.messages, picture=True)) - 1 + patches // self._prepare.merge_size**2
        if length > (limit := self.context - sampling.max_new_tokens):
            raise PromptTooLongError(length, limit, self.context)
        return length

    def generate(self, questions: Sequence[Question], sampling: Sampling) -> list[Answer]:
        """See `BatchEngine.generate`."""
        return [self._one(question, sampling) for question in questions]

    def _one(self, question: Question, sampling: Sampling) -> Answer:
        if question.picture is None:
            return super().generate([question], sampling)[0]
        self.check(question, sampling)
        seen = self._prepare(images=[_opened(question.picture).convert("RGB")], return_tensors="pt")
        tokens = int(seen["image_grid_thw"].prod()) // self._prepare.merge_size**2
        ids: list[int] = []
        for token in self.tokens.encode(question.messages, picture=True):
            ids += [token] * (tokens if token == self._image_id else 1)
        sampler = SeededSampler([question.seed], sampling.temperature, sampling.top_p, vocabulary=len(self.tokens))
        given = {
            "pixel_values": seen["pixel_values"].to(self.model.device, self.model.dtype),
            "image_grid_thw": seen["image_grid_thw"].to(self.model.device),
            "mm_token_type_ids": (torch.tensor([ids], device=self.model.device) == self._image_id).int(),
        }
        return next(self._run([ids], sampler, sampling.max_new_tokens, **given))


def _opened(picture: bytes) -> Image.Image:
    return Image.open(io.BytesIO(picture), formats=("PNG", "JPEG"))
