"""Section of the stage prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ipvg_ray.config.base import DType, Section, StageSection, Unit


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
