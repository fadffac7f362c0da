"""Prompts to UMT5's states, in a pool of its own: 11 GB that no video worker has to hold."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ipvg_ray.pipeline.stage import Row, RowError, Stage, StageContext

MEDIA = "text_states_shared"
"""Folder of the run with the states of negative prompts."""


class TextStatesStage(Stage):
    """Encodes each row's video prompt, and the negative prompt once a worker into a file of the run.

    Texts that several rows share are encoded once. Failures: `empty_prompt`.
    """

    name = "text_states"
    grain = "sample"
    needs = ("video_prompt",)
    media = (MEDIA,)

    def models(self) -> Mapping[str, Path]:
        return {"model": self.config.models.path(self.config.text_states.model or self.config.video.model)}

    def fingerprint_settings(self) -> dict[str, Any]:
        return super().fingerprint_settings() | {"negative_prompt": self.config.video.negative_prompt}

    def setup(self, context: StageContext) -> None:
        import torch

        from ipvg_ray.models.wan import load, text

        torch.set_num_threads(context.threads)
        dtype = getattr(torch, self.config.text_states.dtype)
        self._encoder = load.load_text_encoder(self.models()["model"], dtype=dtype, device=context.device)
        negative = text.pack(self._encoder.states(self.config.video.negative_prompt))
        # Named by its content: workers that write it at the same time write the same file.
        name = hashlib.sha256(negative).hexdigest()[:32]
        self._negative_uri = context.media.publish(MEDIA, "negative", name, ".safetensors", negative)

    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        return [self._one(row) for row in rows]

    def _one(self, row: Row) -> Row | RowError:
        from ipvg_ray.models.wan.text import pack

        if not row["video_prompt"].strip():
            return RowError("empty_prompt", "the video's prompt is empty; give the sample a prompt")
        states = self._encoder.states(row["video_prompt"])
        return {"text_states": pack(states), "text_tokens": len(states), "negative_uri": self._negative_uri}
