"""Face and spatial prompt to the video's first frame: SDXL with the LoRA that HyperLoRA makes for the identity."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ipvg_ray.media import images
from ipvg_ray.pipeline.stage import Row, RowError, Stage, StageContext

if TYPE_CHECKING:
    import numpy as np

    from ipvg_ray.models.lora import Adapter

KEPT_IDENTITIES = 8
"""Adapters kept by a worker, 23 MB each in the released size; the samples of one identity stand together."""


class FirstFrameStage(Stage):
    """Draws one picture a row, alone, so that no picture depends on what else is in its batch.

    Failures: `empty_prompt`; the kinds of `images.ImageError` for the id picture; `bad_first_frame` where the model
    gives no picture (NaN).
    """

    name = "first_frame"
    grain = "sample"
    needs = ("id_picture", "id_embedding", "image_prompt")

    def models(self) -> Mapping[str, Path]:
        section = self.config.first_frame
        fields = ("checkpoint", "checkpoint_config", "hyperlora", "clip_vision")
        return {field: self.config.models.path(getattr(section, field)) for field in fields}

    def setup(self, context: StageContext) -> None:
        import torch

        from ipvg_ray.models import sdxl
        from ipvg_ray.models.clip_vision import ClipVision
        from ipvg_ray.models.hyperlora import HyperLora
        from ipvg_ray.models.lora import PerSampleLora

        torch.set_num_threads(context.threads)
        places, dtype, device = self.models(), getattr(torch, self.config.first_frame.dtype), context.device
        self._hyperlora = HyperLora.load(places["hyperlora"], dtype=dtype, device=device)
        self._clip = ClipVision.load(places["clip_vision"], dtype=dtype, device=device)
        wanted = self._hyperlora.clip_width
        if wanted not in (None, self._clip.width):
            raise ValueError(
                f"first_frame.clip_vision gives {self._clip.width} channels and first_frame.hyperlora reads {wanted}; "
                "use the CLIP model that the HyperLoRA was trained with"
            )
        pipeline = sdxl.load(places["checkpoint"], places["checkpoint_config"], dtype=dtype, device=device)
        self._sdxl = sdxl.Sdxl(pipeline)
        self._lora = PerSampleLora(self._sdxl.unet, self._hyperlora.paths)
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()

    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        return [self._attempt(row) for row in rows]

    def _attempt(self, row: Row) -> Row | RowError:
        from ipvg_ray.models.sdxl import SdxlError

        try:
            if not row["image_prompt"].strip():
                return RowError("empty_prompt", "the first frame's prompt is empty; give the sample a prompt")
            picture = self._draw(row)
        except images.ImageError as error:
            return RowError(error.kind, f"the id picture: {error}")
        except SdxlError as error:
            return RowError("bad_first_frame", str(error))
        section = self.config.first_frame
        return {
            "first_frame": images.encode(picture, section.format, section.quality),
            "first_frame_width": picture.shape[1],
            "first_frame_height": picture.shape[0],
        }

    def _draw(self, row: Row) -> np.ndarray:
        from ipvg_ray.models.hyperlora import ALPHA_PER_RANK

        section = self.config.first_frame
        with self._lora.applied([self._adapter(row)], section.weight * ALPHA_PER_RANK):
            picture: np.ndarray = self._sdxl.generate(
                row["image_prompt"],
                section.negative_prompt,
                height=section.height,
                width=section.width,
                steps=section.steps,
                guidance=section.guidance,
                seed=row["seed"],
            )
        return picture

    def _adapter(self, row: Row) -> Adapter:
        """The identity's LoRA, made once for its prompts."""
        kept, identity = self._adapters, row["identity_id"]
        if identity not in kept:
            kept[identity] = self._make_adapter(row)
            if len(kept) > KEPT_IDENTITIES:
                kept.popitem(last=False)
        kept.move_to_end(identity)
        return kept[identity]

    def _make_adapter(self, row: Row) -> Adapter:
        import torch

        features = self._clip.penultimate(images.decode(images.image_bytes(row["id_picture"])))
        embedding = torch.tensor([list(row["id_embedding"])], dtype=torch.float32)
        return self._hyperlora.lora(self._hyperlora.tokens(embedding, features))
