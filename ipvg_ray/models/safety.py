"""Is a picture fit to be shown: any transformers picture classifier that the user names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ipvg_ray.models.quiet import only_errors


class SafetyError(ValueError):
    """A folder that holds no picture classifier, or none that knows the labels asked for."""


class SafetyCheck:
    """A loaded classifier.

    Args:
        model: transformers' `…ForImageClassification`.
        processor: its preprocessing.
        labels: of its labels, those that make a picture unsafe; upper and lower case are one.

    Raises:
        SafetyError: where the model has none of them.
    """

    def __init__(self, model: Any, processor: Any, labels: Sequence[str]) -> None:
        self.model = model
        self.processor = processor
        known = {str(label).lower(): int(place) for place, label in model.config.id2label.items()}
        self._places = [known[label.lower()] for label in labels if label.lower() in known]
        if not self._places:
            raise SafetyError(
                f"the safety model knows the labels {', '.join(known)} and none of {', '.join(labels)}; "
                "set first_frame.safety.labels to those that are not to be shown"
            )

    @classmethod
    def load(cls, folder: Path, labels: Sequence[str], *, device: str = "cpu") -> SafetyCheck:
        """Load from a local transformers folder, in float32.

        Raises:
            SafetyError: where it holds no picture classifier with all its weights, or none that knows a label.
        """
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        try:
            with only_errors():
                loaded: Any = AutoModelForImageClassification.from_pretrained(
                    folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
                )
                # The Pillow backend: the default one needs torchvision.
                processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise SafetyError(f"{folder} holds no picture classifier: {error}") from error
        model, report = loaded
        if report["missing_keys"]:  # transformers would fill them with random numbers
            raise SafetyError(f"{folder} lacks weights of the classifier: {sorted(report['missing_keys'])}")
        return cls(model.eval().requires_grad_(False).to(device), processor, labels)

    @torch.no_grad()
    def scores(self, pictures: Sequence[np.ndarray]) -> list[float]:
        """Per RGB uint8 picture the probability, 0 to 1, of all unsafe labels together."""
        pixels = self.processor(list(pictures), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        logits = self.model(pixels.to(self.model.device)).logits.float()
        result: list[float] = logits.softmax(-1)[:, self._places].sum(-1).tolist()
        return result
