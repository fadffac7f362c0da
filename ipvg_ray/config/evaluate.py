"""Section of the stage evaluate."""

from __future__ import annotations

from pydantic import Field

from ipvg_ray.config.base import StageSection, Unit


class EvaluateConfig(StageSection):
    """Arc-Sim as the challenge computes it, and two figures that need no weights."""

    pack: str = "insightface/models/buffalo_l"
    det_size: int = Field(320, ge=32, multiple_of=32)
    det_threshold: Unit = 0.5
    frames: int = Field(16, ge=1)
