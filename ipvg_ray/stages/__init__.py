"""One file a stage: what it needs and adds, what it asks of the machine, how it calls its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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


def stages_of(config: Config, run: Mapping[str, Any], until: str | None = None) -> list[Stage]:
    """The stages of a run that is there: those that score given videos where `evaluate` made it, else the pipeline's.

    Args:
        run: what run.json holds.

    Raises:
        UnknownStageError: for a name that is no stage of this run.
    """
    from ipvg_ray.stages.evaluate import EvaluateGivenStage
    from ipvg_ray.stages.given import GivenVideosStage, checked_layout

    source = _given_videos(run)
    if source is None:
        return make_stages(config, until)
    folder, layout = source
    given = GivenVideosStage(config, folder, checked_layout(layout))
    stages: list[Stage] = [given, EvaluateGivenStage(config)]
    names = [stage.name for stage in stages]
    if until is not None and until not in names:
        raise UnknownStageError(f"{until!r} is no stage of a run of given videos; there are {', '.join(names)}")
    return stages if until is None else stages[: names.index(until) + 1]


def _given_videos(run: Mapping[str, Any]) -> tuple[str, str] | None:
    """Folder and layout of the videos of a run that `evaluate` made; None for a run that makes its own."""
    dataset = run.get("dataset") or {}
    if "videos" in dataset:
        return dataset["videos"], dataset["layout"]
    # Runs of versions that did not keep them there hold them in what the stage's fingerprint was made from.
    settings = run.get("stages", {}).get("video", {}).get("inputs", {}).get("settings", {})
    return (settings["folder"], settings["layout"]) if {*settings} == {"folder", "layout"} else None
