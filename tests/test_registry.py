"""The table of real models agrees with the configuration and with its page."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest

from ipvg_ray import config
from ipvg_ray.metrics import catalogue
from ipvg_ray.models import docs, registry
from ipvg_ray.models.registry import HubSource, UrlSource

MODEL_FIELDS = (
    "faces.pack",
    "faces.id_pack",
    "matting.model",
    "prompts.model",
    "prompts.vision_model",
    "first_frame.checkpoint",
    "first_frame.checkpoint_config",
    "first_frame.hyperlora",
    "first_frame.clip_vision",
    "video.model",
    "evaluate.pack",
    *(f"evaluate.{field}" for field in catalogue.fields_of(catalogue.NAMES)),
)


def test_every_model_of_the_gpu_profile_is_known_under_its_field() -> None:
    settings = config.load("gpu")
    for field in MODEL_FIELDS:
        section, name = field.split(".")
        model = registry.get(getattr(getattr(settings, section), name))
        assert field in model.used_by
    assert {field for model in registry.MODELS for field in model.used_by} == set(MODEL_FIELDS)


def test_names_are_unique_relative_places() -> None:
    names = [model.name for model in registry.MODELS]
    assert len(set(names)) == len(names)
    for name in names:
        assert not Path(name).is_absolute()
        assert ".." not in Path(name).parts


def test_rows_are_filled_in() -> None:
    for model in registry.MODELS:
        assert model.purpose
        assert model.verified
        assert model.approx_bytes > 1e3
        assert model.licence.url.startswith("https://")
        if isinstance(model.source, UrlSource):
            digits = model.source.sha256
            assert digits is None or len(digits) == 64 or f"-{digits}." in model.name
            assert model.source.size in (None, model.approx_bytes)
        else:
            assert model.source.repo.count("/") == 1
            assert model.source.allow


def test_what_a_hub_model_needs_is_among_what_is_pulled() -> None:
    for model in registry.MODELS:
        if isinstance(model.source, HubSource):
            for need in model.needs:
                path = f"{model.source.subpath}/{need}" if model.source.subpath else need
                assert any(fnmatch.fnmatchcase(path, allowed) for allowed in model.source.allow), (model.name, need)


def test_only_configs_and_tokenizers_of_sdxl_base_are_pulled() -> None:
    source = registry.get("stable-diffusion-xl-base-1.0").source
    assert isinstance(source, HubSource)
    for unwanted in ("sd_xl_base_1.0.safetensors", "unet/diffusion_pytorch_model.safetensors", "vae_1_0/config.json"):
        assert not any(fnmatch.fnmatchcase(unwanted, allowed) for allowed in source.allow)


def test_the_non_commercial_ones_are_marked() -> None:
    assert {model.name for model in registry.non_commercial()} == {
        "insightface/models/buffalo_l",
        "insightface/models/antelopev2",
        "hrnet_lip_5583_torch04.pth",
        "hrnet_ocr_lip_5648_torch04.pth",
        "sdxl_hyper_id_lora_v1_fidelity",
        "glint360k_curricular_face_r101_backbone.bin",
        "retinaface_resnet50_2020-07-20-f168fae3c.zip",
        "resnet18_110.pth",
        "musiq_spaq_ckpt-358bb6af.pth",
        "amt-s.pth",
        "sdxl_hyper_id_lora_v1_edit",
    }


@pytest.mark.parametrize(
    ("name", "hint"), [("Qwen3-8b", "Qwen3-8B"), ("mini-qwen3", "make-mini"), ("something of mine", "no model")]
)
def test_an_unknown_name_is_refused_with_a_hint(name: str, hint: str) -> None:
    with pytest.raises(registry.UnknownModelError, match=hint):
        registry.get(name)


def test_a_place_is_recognised_by_its_end() -> None:
    found = registry.at(Path("/data/m/insightface/models/buffalo_l"))
    assert found is not None
    assert (found[0].name, found[1]) == ("insightface/models/buffalo_l", Path("/data/m"))
    assert registry.at(Path("/data/m/buffalo_l")) is None


def test_the_page_is_what_the_code_writes() -> None:
    path = Path(__file__).parents[1] / "docs" / "models.md"
    assert path.read_text() == docs.page(), "run: python -m ipvg_ray.models.docs > docs/models.md"


def test_the_table_has_a_row_of_equal_width_per_model() -> None:
    lines = docs.markdown_table().splitlines()
    assert len(lines) == 2 + len(registry.MODELS)
    assert {line.count("|") for line in lines} == {8}
    for model, line in zip(registry.MODELS, lines[2:], strict=True):
        assert f"`{model.name}`" in line
        assert line.rstrip().endswith("| yes |" if model.licence.commercial else "| **no** |")
