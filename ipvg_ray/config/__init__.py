"""The one typed configuration. Defaults are the method's published settings; profiles and `--set` change them.

Every stage has a section with two kinds of fields: what decides its results (part of the stage's fingerprint), and
`pool`, which only decides how it runs. A model is named by a path, or by a name below `models.root`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from ipvg_ray import secrets
from ipvg_ray.config.base import ConfigError, DType, PoolConfig, Section, StageSection, Unit, nearest
from ipvg_ray.config.dataset import DatasetConfig, ModelsConfig
from ipvg_ray.config.evaluate import EvaluateConfig
from ipvg_ray.config.faces import FacesConfig, MattingConfig
from ipvg_ray.config.first_frame import FirstFrameConfig
from ipvg_ray.config.group import GroupConfig
from ipvg_ray.config.prompts import EndpointConfig, PromptsConfig, VllmConfig
from ipvg_ray.config.video import TextStatesConfig, VideoConfig

__all__ = [
    "Config",
    "ConfigError",
    "DType",
    "DatasetConfig",
    "EndpointConfig",
    "EvaluateConfig",
    "FacesConfig",
    "FirstFrameConfig",
    "GroupConfig",
    "MattingConfig",
    "ModelsConfig",
    "PoolConfig",
    "PromptsConfig",
    "ReportConfig",
    "Section",
    "StageSection",
    "TextStatesConfig",
    "Unit",
    "VideoConfig",
    "VllmConfig",
    "default_profile",
    "from_tree",
    "load",
    "profiles",
    "updated",
]


class ReportConfig(Section):
    """The report page: rows shown, and how many MB of media are packed into it before it links to files instead."""

    rows: int = Field(200, ge=1)
    embed_mb: int = Field(64, ge=0)


class Config(Section):
    """Everything a run depends on."""

    profile: str = "cpu-mini"
    seed: int = Field(2025, ge=0, lt=2**63)
    dataset: DatasetConfig = DatasetConfig()
    models: ModelsConfig = ModelsConfig()
    faces: FacesConfig = FacesConfig()
    matting: MattingConfig = MattingConfig()
    prompts: PromptsConfig = PromptsConfig()
    first_frame: FirstFrameConfig = FirstFrameConfig()
    text_states: TextStatesConfig = TextStatesConfig()
    video: VideoConfig = Field(default_factory=lambda: VideoConfig.model_validate({}))
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()
    stop_grace_s: float = Field(30.0, ge=0)
    traces: bool = False

    @model_validator(mode="after")
    def _one_face_pack(self) -> Config:
        if self.models.path(self.faces.pack) != self.models.path(self.evaluate.pack):
            raise ValueError(
                f"evaluate.pack is {self.evaluate.pack!r} and faces.pack {self.faces.pack!r}; they must be the same: "
                "the embeddings of the frames are compared with those of the reference"
            )
        return self

    @model_validator(mode="after")
    def _reference_is_drawn(self) -> Config:
        if self.video.reference == "reference_picture" and self.first_frame.reference.enhance == "none":
            raise ValueError(
                "video.reference is reference_picture, which nothing draws; set first_frame.reference.enhance to "
                "hyperlora, or video.reference to image or id_picture"
            )
        return self


def profiles() -> list[str]:
    """Names of the built-in profiles."""
    return sorted(Path(p.name).stem for p in resources.files("ipvg_ray.profiles").iterdir() if p.name.endswith(".yaml"))


def load(
    profile: str,
    *,
    file: str | Path | None = None,
    overrides: Iterable[str] = (),
    values: Mapping[str, Any] | None = None,
) -> Config:
    """Build a configuration: defaults, then profile, then file, then `values`, then `overrides`.

    Args:
        profile: name of a built-in profile.
        file: YAML file with any part of the configuration.
        overrides: `section.field=value` texts, the value read as YAML.
        values: nested mapping, for callers that are code.

    Raises:
        ConfigError: for an unknown profile or key (with the nearest right name), a wrong value, or values that
            exclude each other.
    """
    if profile not in profiles():
        raise ConfigError(
            f"unknown profile {profile!r}; there are {', '.join(profiles())}{nearest(profile, profiles())}"
        )
    tree = _profile(profile)
    if file is not None:
        try:
            _merge(tree, _read_yaml(Path(file).read_text(), str(file)))
        except OSError as error:
            raise ConfigError(f"cannot read the configuration file {file}: {error.strerror}") from error
    _merge(tree, values or {})
    for text in overrides:
        _merge(tree, _override(text))
    tree["profile"] = profile
    return from_tree(tree)


def updated(tree: Mapping[str, Any], overrides: Iterable[str], values: Mapping[str, Any]) -> Config:
    """A kept configuration with `values`, then `overrides`, on top. Raises ConfigError."""
    merged = copy.deepcopy(dict(tree))
    _merge(merged, values)
    for text in overrides:
        _merge(merged, _override(text))
    return from_tree(merged)


def default_profile() -> str:
    """`gpu` where this machine shows a GPU, else `cpu-mini`."""
    return "gpu" if Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists() else "cpu-mini"


def from_tree(tree: Mapping[str, Any]) -> Config:
    """Validate a nested mapping, such as the configuration kept in `run.json`. Raises ConfigError."""
    if planted := list(secrets.found_in(tree)):
        raise ConfigError(
            f"{', '.join(planted)}: this looks like a secret, and a run keeps its configuration; put keys into the "
            "environment (prompts.endpoint.api_key_env names the variable) or a credentials file"
        )
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from None


def _profile(name: str) -> dict[str, Any]:
    """A built-in profile, on top of the one that it names as its `base`."""
    tree = _read_yaml((resources.files("ipvg_ray.profiles") / f"{name}.yaml").read_text(), f"profile {name}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    whole = _profile(base)
    _merge(whole, tree)
    return whole


def _read_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} must hold sections and fields, not a {type(tree).__name__}")
    return tree


def _override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r}: write section.field=value, such as video.steps=4")
    try:
        leaf: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text!r}: the value is not YAML: {error}") from None
    for part in reversed(key.strip().split(".")):
        leaf = {part: leaf}
    return dict(leaf)


def _merge(into: dict[str, Any], tree: Mapping[str, Any]) -> None:
    for key, value in tree.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _explain(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields_at(error["loc"][:-1])
        return f"unknown key {place!r}{nearest(str(error['loc'][-1]), known) or '; known here: ' + ', '.join(known)}"
    reason = str(error.get("ctx", {}).get("error", error["msg"]))
    given = "" if isinstance(error["input"], Mapping | BaseModel) else f" (given: {error['input']!r})"
    return f"{place or 'configuration'}: {reason}{given}"


def _fields_at(loc: tuple[Any, ...]) -> list[str]:
    """Field names of the section at `loc`, for the nearest-name hint."""
    model: Any = Config
    for part in loc:
        annotation = model.model_fields[part].annotation
        model = next(
            (a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)), Config
        )
    return list(model.model_fields)
