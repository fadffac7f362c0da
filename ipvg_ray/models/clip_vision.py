"""CLIP's picture encoder (Radford et al., arXiv 2103.00020), for the features that HyperLoRA reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ipvg_ray.models.quiet import only_errors


class ClipVisionError(ValueError):
    """A folder that holds no CLIP vision model."""


class ClipVision:
    """A loaded vision model with its own preprocessing."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> ClipVision:
        """Load from a local transformers folder; of a whole CLIP model only the vision half is read.

        Args:
            folder: with config.json, preprocessor_config.json and model.safetensors, such as clip-vit-large-patch14.

        Raises:
            ClipVisionError: where the folder holds no CLIP, or not all of the vision model's weights.
        """
        from transformers import CLIPImageProcessorPil, CLIPVisionModel

        try:
            with only_errors():
                loaded: Any = CLIPVisionModel.from_pretrained(
                    folder, dtype=dtype, local_files_only=True, output_loading_info=True
                )
                # The Pillow backend: the default one needs torchvision.
                processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except (OSError, RuntimeError) as error:
            raise ClipVisionError(f"{folder} holds no CLIP vision model: {error}") from error
        model, report = loaded
        if report["missing_keys"]:  # transformers would fill them with random numbers
            raise ClipVisionError(f"{folder} lacks weights of the CLIP vision model: {sorted(report['missing_keys'])}")
        return cls(model.eval().requires_grad_(False).to(device), processor)

    @property
    def width(self) -> int:
        """Channels of the features."""
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def penultimate(self, picture: np.ndarray) -> torch.Tensor:
        """The second-to-last hidden state, (1, 1 + patches, width), of an RGB uint8 picture (height, width, 3)."""
        pixels = self.processor(picture, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        states = self.model(pixels.to(self.model.device, self.model.dtype), output_hidden_states=True).hidden_states
        result: torch.Tensor = states[-2]
        return result
