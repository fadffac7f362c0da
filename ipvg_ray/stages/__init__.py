"""One file a stage: what it needs and adds, what it asks of the machine, how it calls its model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipvg_ray.errors import UserError

if TYPE_CHECKING:
    from ipvg_ray.config import Config
    from ipvg_ray.pipeline.stage import Stage


class UnknownStageError(UserError, ValueError):
    """A name that is no stage."""


NAMES = ("faces", "matting", "prompts", "text_states", "first_frame", "video", "evaluate")


def make_stages(config: Config, until: str | None = None) -> list[Stage]:
    """The pipeline's stages in order, to `until` (the last one unless given). Loads no model.

    Stages whose work the configuration has no use for are left out, unless they are `until`.

    Raises:
        UnknownStageError: for a name that is no stage.
    """
    from ipvg_ray.stages.evaluate import EvaluateStage
    from ipvg_ray.stages.faces import FacesStage
    from ipvg_ray.stages.first_frame import FirstFrameStage
    from ipvg_ray.stages.matting import MattingStage
    from ipvg_ray.stages.prompts import PromptsStage
    from ipvg_ray.stages.text_states import TextStatesStage
    from ipvg_ray.stages.video import VideoStage

    if until is not None and until not in NAMES:
        raise UnknownStageError(f"there is no stage {until!r}; there are {', '.join(NAMES)}")
    classes: tuple[type[Stage], ...] = (
        FacesStage,
        MattingStage,
        PromptsStage,
        TextStatesStage,
        FirstFrameStage,
        VideoStage,
        EvaluateStage,
    )
    wanted = classes if until is None else classes[: NAMES.index(until) + 1]
    idle = {"text_states"} if config.video.text_in_worker else set()
    if config.video.task == "vace-r2v" and config.video.reference != "reference_picture":
        idle.add("first_frame")
    return [stage(config) for stage in wanted if stage.name not in idle - {until}]
