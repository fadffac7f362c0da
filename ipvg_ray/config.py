"""The one typed configuration. Defaults are the method's published settings; profiles and `--set` change them.

Every stage has a section with two kinds of fields: what decides its results (part of the stage's fingerprint), and
`pool`, which only decides how it runs. A model is named by a path, or by a name below `models.root`.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ipvg_ray.errors import UserError

DType = Literal["float32", "bfloat16", "float16"]
Unit = Annotated[float, Field(ge=0, le=1)]


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run; the message names the field and what it may be."""


def _multiple(section: Any, step: int) -> Any:
    for name in ("width", "height"):
        value = getattr(section, name)
        if value % step:
            near = max(1, round(value / step)) * step
            raise ValueError(f"{name} is {value}; it must be a multiple of {step}, such as {near}")
    return section


def _nearest(word: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values cannot be changed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PoolConfig(Section):
    """How many workers a stage has and what each asks for; see `ipvg_ray.pipeline.stage.Resources`."""

    min_workers: int = Field(1, ge=1)
    max_workers: int = Field(1, ge=1)
    initial_workers: int = Field(0, ge=0)
    batch_size: int = Field(1, ge=1)
    concurrency: int = Field(1, ge=1)
    cpus: float = Field(1.0, ge=0)
    gpus: float = Field(0.0, ge=0)
    memory_gb: float = Field(0.0, ge=0)
    accelerator_type: str | None = None
    threads: int = Field(1, ge=1)
    time_limit_s: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _possible(self) -> PoolConfig:
        if self.max_workers < self.min_workers:
            raise ValueError(f"max_workers is {self.max_workers}, below min_workers {self.min_workers}")
        if self.initial_workers and not self.min_workers <= self.initial_workers <= self.max_workers:
            raise ValueError(f"initial_workers is {self.initial_workers}; it must lie between min_ and max_workers")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus is {self.gpus}: use a share below 1, or a whole number of cards")
        return self


class StageSection(Section):
    """Base of the stages' sections."""

    pool: PoolConfig = PoolConfig()


class DatasetConfig(Section):
    """Where the identity set is and what is refused in it.

    `columns` renames the columns of CSV, JSONL and Parquet inputs: ours to theirs (`{identity_id: person}`).
    """

    path: str | None = None
    format: Literal["auto", "vip200k", "images", "csv", "jsonl", "parquet", "eval_json", "tpige_json"] = "auto"
    prompts: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    images: str | None = None
    strict: bool = False
    limit: int | None = Field(None, ge=1)
    min_image_side: int = Field(32, ge=1)
    max_image_pixels: int = Field(100_000_000, ge=1)
    max_prompt_chars: int = Field(10_000, ge=1)

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, value: dict[str, str]) -> dict[str, str]:
        known = ("identity_id", "image", "prompt", "prompt_id")
        for key in value:
            if key not in known:
                raise ValueError(f"columns renames {key!r}, which is none of {', '.join(known)}{_nearest(key, known)}")
        return value


class ModelsConfig(Section):
    """Where models lie. `root` holds them by name; `~` is the home folder."""

    root: Path = Field(Path("~/.cache/ipvg_ray/models"), validate_default=True)

    @field_validator("root")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()  # workers and later starts may have another working directory

    def path(self, name: str) -> Path:
        """`name` itself where it begins with `/`, `~` or `.`, else its place below `root`; always absolute."""
        given = Path(name).expanduser()
        if given.is_absolute() or name.startswith("."):
            return given.absolute()
        return self.root / name


class FacesConfig(StageSection):
    """`pack` scores and describes; `id_pack` makes the embedding that HyperLoRA was trained on."""

    pack: str = "insightface/models/buffalo_l"
    id_pack: str = "insightface/models/antelopev2"
    det_sizes: tuple[int, ...] = (640, 512, 384, 256)
    det_threshold: Unit = 0.5
    choose: Literal["largest", "centre", "confident", "error"] = "largest"

    @field_validator("det_sizes")
    @classmethod
    def _multiples_of_32(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or any(size < 32 or size % 32 for size in value):
            raise ValueError(f"det_sizes is {list(value)}; each must be a positive multiple of 32")
        return value


class MattingConfig(StageSection):
    """`model` is read only by method hrnet. `landmarks` is what the released IPVG-STD code does."""

    method: Literal["hrnet", "landmarks", "none"] = "hrnet"
    model: str = "hrnet_lip_5583_torch04.pth"
    input_size: int = Field(473, ge=32)


class VllmConfig(Section):
    """Settings of engine `vllm`; None leaves a choice to vLLM. As many cards as `prompts.pool.gpus` share the model.

    `context` bounds question and answer together, `quantization` is `fp8`, `awq`, …; `extra` holds more of vLLM's own
    engine arguments, by their names.
    """

    context: int | None = Field(None, ge=64)
    gpu_memory: Unit | None = None
    kv_cache_gb: float | None = Field(None, gt=0)
    max_sequences: int | None = Field(None, ge=1)
    max_batched_tokens: int | None = Field(None, ge=1)
    chunked_prefill: bool = True
    prefix_caching: bool = True
    quantization: str | None = None
    eager: bool = False
    extra: dict[str, Any] = Field(default_factory=dict)


class EndpointConfig(Section):
    """Settings of engine `openai`: any endpoint that speaks OpenAI's chat completions.

    The key is read from the environment variable `api_key_env` of the workers and is never written down. `concurrency`
    bounds the requests that one worker has under way, `tries` how often one is sent where the endpoint is busy.
    """

    url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = Field(32, ge=1)
    tries: int = Field(6, ge=1)
    timeout_s: float = Field(300.0, gt=0)
    limit_parameter: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra_body: dict[str, Any] = Field(default_factory=dict)


class PromptsConfig(StageSection):
    """The language-model calls of each sample.

    `model` is asked by the methods ipvg_std and raw, `vision_model` by tpige; with engine openai they are names at the
    endpoint. `templates` is a folder with instructions of the user's own.
    """

    method: Literal["ipvg_std", "tpige", "raw"] = "ipvg_std"
    engine: Literal["vllm", "transformers", "openai"] = "transformers"
    model: str = "Qwen3-8B"
    vision_model: str = "Qwen3-VL-8B-Instruct"
    dtype: DType = "bfloat16"
    templates: Path | None = None
    spatial_source: Literal["refined", "raw"] = "refined"
    target: Literal["gender", "person"] = "gender"
    language: Literal["en", "any"] = "en"
    trigger_words: str = "fcsks fxhks fhyks"
    temperature: float = Field(0.1, ge=0)
    top_p: float = Field(0.9, gt=0, le=1)
    max_new_tokens: int = Field(1000, ge=1)
    retries: int = Field(2, ge=0)
    constrain: bool = True
    picture_side: int = Field(768, ge=64)
    vllm: VllmConfig = VllmConfig()
    endpoint: EndpointConfig = EndpointConfig()

    @field_validator("templates")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

    @model_validator(mode="after")
    def _endpoint_named(self) -> PromptsConfig:
        if self.engine == "openai" and not self.endpoint.url:
            raise ValueError("engine openai needs endpoint.url, such as http://host:8000/v1")
        return self

    @property
    def model_field(self) -> Literal["model", "vision_model"]:
        """The field that names the model which the method asks."""
        return "vision_model" if self.method == "tpige" else "model"


class FirstFrameConfig(StageSection):
    """`checkpoint` is a single SDXL .safetensors file, `checkpoint_config` the diffusers folder with its configs and
    tokenizers."""

    checkpoint: str = "RealVisXL_V4.0.safetensors"
    checkpoint_config: str = "stable-diffusion-xl-base-1.0"
    hyperlora: str = "sdxl_hyper_id_lora_v1_fidelity"
    clip_vision: str = "clip-vit-large-patch14"
    weight: float = 0.85
    width: int = Field(832, ge=64)
    height: int = Field(480, ge=64)
    steps: int = Field(20, ge=1)
    guidance: float = Field(5.0, ge=0)
    dtype: DType = "float16"
    format: Literal["jpeg", "png"] = "jpeg"
    quality: int = Field(95, ge=1, le=100)
    negative_prompt: str = (
        "blurry, out of focus, face hidden, no face, deformed anatomy, extra fingers, extra limbs, text, "
        "watermark, signature, low quality, jpeg artifacts, nudity"
    )

    @model_validator(mode="after")
    def _latent_grid(self) -> FirstFrameConfig:
        return _multiple(self, 8)


class VideoConfig(StageSection):
    """VACE from first frame and mask. The converted checkpoints carry shift 3; the official setting is `shift` 16."""

    task: Literal["vace-i2v"] = "vace-i2v"
    model: str = "Wan2.1-VACE-14B-diffusers"
    width: int = Field(832, ge=16)
    height: int = Field(480, ge=16)
    frames: int = Field(81, ge=5)
    fps: int = Field(16, ge=1)
    steps: int = Field(50, ge=1)
    guidance: float = Field(5.0, ge=0)
    shift: float = Field(16.0, gt=0)
    conditioning_scale: float = 1.0
    dtype: DType = "bfloat16"
    crf: int = Field(18, ge=0, le=51)
    negative_prompt: str = (
        "overexposed, static, blurred details, subtitles, painting, still picture, grey cast, worst quality, "
        "low quality, compression artefacts, ugly, mutilated, extra fingers, badly drawn hands, badly drawn face, "
        "deformed limbs, fused fingers, motionless frame, cluttered background, three legs, walking backwards"
    )

    @model_validator(mode="after")
    def _latent_grid(self) -> VideoConfig:
        if self.frames % 4 != 1:
            raise ValueError(f"frames is {self.frames}; Wan needs 4·n + 1, such as {self.frames // 4 * 4 + 1}")
        return _multiple(self, 16)


class EvaluateConfig(StageSection):
    """Arc-Sim as the challenge computes it, and two figures that need no weights."""

    pack: str = "insightface/models/buffalo_l"
    det_size: int = Field(320, ge=32, multiple_of=32)
    det_threshold: Unit = 0.5
    frames: int = Field(16, ge=1)


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
    video: VideoConfig = VideoConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()
    stop_grace_s: float = Field(30.0, ge=0)

    @model_validator(mode="after")
    def _one_face_pack(self) -> Config:
        if self.models.path(self.faces.pack) != self.models.path(self.evaluate.pack):
            raise ValueError(
                f"evaluate.pack is {self.evaluate.pack!r} and faces.pack {self.faces.pack!r}; they must be the same: "
                "the embeddings of the frames are compared with those of the reference"
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
            f"unknown profile {profile!r}; there are {', '.join(profiles())}{_nearest(profile, profiles())}"
        )
    tree = _read_yaml((resources.files("ipvg_ray.profiles") / f"{profile}.yaml").read_text(), f"profile {profile}")
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
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from None


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
        return f"unknown key {place!r}{_nearest(str(error['loc'][-1]), known) or '; known here: ' + ', '.join(known)}"
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
