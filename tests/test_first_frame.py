"""The first-frame stage on the miniatures: what changes a picture, what must not, and how rows fail."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sdxl_minis import embedding, face, make_minis

from ipvg_ray import config
from ipvg_ray.media import images
from ipvg_ray.models.clip_vision import ClipVision, ClipVisionError
from ipvg_ray.models.mini import clip_vision as mini_clip
from ipvg_ray.pipeline.stage import RowError, StageContext
from ipvg_ray.stages import first_frame
from ipvg_ray.stages.first_frame import FirstFrameStage

SMALL = {"width": 88, "height": 64, "steps": 2, "format": "png"}


class NoMedia:
    """The stage publishes no files."""

    def publish(self, folder: str, identity_id: str, name: str, suffix: str, data: bytes) -> str:
        raise AssertionError("the first frame belongs into its row")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return make_minis(tmp_path_factory.mktemp("minis"))


def started(models: Path, **section: object) -> FirstFrameStage:
    values = {"models": {"root": str(models)}, "first_frame": {**SMALL, **section}}
    stage = FirstFrameStage(config.load("cpu-mini", values=values))
    stage.setup(StageContext("cpu", 1, NoMedia(), "run"))
    return stage


@pytest.fixture
def stage(models) -> FirstFrameStage:
    return started(models)


def row(identity: int = 1, prompt: int = 1, **changes: object) -> dict[str, Any]:
    texts = {1: "a woman in a red dress, close-up", 2: "a man in a black suit, close-up"}
    return {
        "sample_id": f"id{identity:03}/prompt{prompt}",
        "identity_id": f"id{identity:03}",
        "prompt_id": f"prompt{prompt}",
        "seed": 100 * identity + prompt,
        "id_picture": images.encode(face(identity)),
        "id_embedding": embedding(identity).tolist(),
        "image_prompt": f"fcsks fxhks fhyks, {texts[prompt]}",
        **changes,
    }


def picture(result: dict[str, Any] | RowError) -> np.ndarray:
    assert isinstance(result, dict)
    return images.decode(result["first_frame"]["bytes"])


# -- the row -----------------------------------------------------------------------------------------------------------


def test_the_row_holds_the_picture_as_configured(models):
    (result,) = started(models, format="jpeg").process([row()])
    assert tuple(result) == tuple(FirstFrameStage.table().columns)
    assert (result["first_frame_width"], result["first_frame_height"]) == (88, 64)
    assert result["first_frame"]["bytes"][:3] == b"\xff\xd8\xff"
    assert picture(result).shape == (64, 88, 3)
    (lossless,) = started(models).process([row()])
    assert lossless["first_frame"]["bytes"][:4] == b"\x89PNG"
    assert picture(lossless).std() > 5


def test_bytes_follow_row_and_seed_whatever_the_order_and_batch(models, stage):
    rows = [row(1, 1), row(1, 2), row(2, 1), row(2, 2), row(3, 1)]
    together = stage.process(rows)
    backwards = stage.process(rows[::-1])[::-1]
    alone = [started(models).process([r])[0] for r in rows[::2]]
    assert together == backwards
    assert together[::2] == alone
    assert len({r["first_frame"]["bytes"] for r in together}) == len(rows)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 7},
        {"image_prompt": "fcsks fxhks fhyks, a man"},
        {"identity_id": "x", "id_embedding": embedding(9).tolist()},
        {"identity_id": "x", "id_picture": images.encode(face(9))},
    ],
)
def test_seed_prompt_embedding_and_id_picture_change_the_picture(stage, change):
    before, after = (picture(stage.process([row(**changes)])[0]) for changes in ({}, change))
    assert np.abs(before.astype(int) - after).mean() > 1


# -- the identity ------------------------------------------------------------------------------------------------------


def test_the_weight_decides_how_much_of_the_identity_is_drawn(models):
    """At 0 all identities look alike; at 0.85 each has its own picture, farther away than at 0.2."""
    drawn = {
        weight: [picture(started(models, weight=weight).process([row(i, seed=5)])[0]).astype(int) for i in (1, 2)]
        for weight in (0.0, 0.2, 0.85)
    }
    assert np.array_equal(*drawn[0.0])
    assert not np.array_equal(*drawn[0.85])
    for i in range(2):
        near, far = (np.abs(drawn[weight][i] - drawn[0.0][i]).mean() for weight in (0.2, 0.85))
        assert 0 < near < far


def test_the_effective_scale_is_half_the_weight(stage, monkeypatch):
    scales = []
    apply = stage._lora.applied
    monkeypatch.setattr(stage._lora, "applied", lambda batch, scale: scales.append(scale) or apply(batch, scale))
    stage.process([row()])
    assert scales == [0.85 * 0.5]


def test_an_identitys_lora_is_made_once_and_few_are_kept(stage, monkeypatch):
    made = []
    make = stage._make_adapter
    monkeypatch.setattr(stage, "_make_adapter", lambda r: made.append(r["identity_id"]) or make(r))
    monkeypatch.setattr(first_frame, "KEPT_IDENTITIES", 2)
    order = [1, 1, 2, 1, 3, 1, 2, 2]
    stage.process([row(i, 1 + n % 2) for n, i in enumerate(order)])
    assert made == ["id001", "id002", "id003", "id002"]
    assert len(stage._adapters) == 2


def test_a_kept_lora_draws_what_a_new_one_does(models, stage):
    kept = [stage.process([row(1, prompt)])[0] for prompt in (1, 2)][1]
    assert kept == started(models).process([row(1, 2)])[0]


# -- failures ----------------------------------------------------------------------------------------------------------


def test_bad_rows_fail_alone(stage, tmp_path):
    broken = {"bytes": b"not a picture", "path": None}
    gone = {"bytes": None, "path": str(tmp_path / "gone.png")}
    results = stage.process([row(1, id_picture=broken), row(2, id_picture=gone), row(3, image_prompt=" "), row(1)])
    assert [r.kind for r in results if isinstance(r, RowError)] == ["broken_image", "missing_image", "empty_prompt"]
    assert picture(results[3]).shape == (64, 88, 3)


def test_nan_is_a_failed_row_and_leaves_no_adapter_behind(stage):
    with torch.no_grad():
        stage._sdxl.unet.conv_out.bias[0] = torch.nan
    (result,) = stage.process([row()])
    assert isinstance(result, RowError)
    assert result.kind == "bad_first_frame"
    assert all(stage._sdxl.unet.get_submodule(path).pairs is None for path in stage._hyperlora.paths.values())


# -- the contract ------------------------------------------------------------------------------------------------------


def test_the_contract(models):
    stage = FirstFrameStage(config.load("cpu-mini", values={"models": {"root": str(models)}}))
    assert (stage.grain, stage.needs) == ("sample", ("id_picture", "id_embedding", "image_prompt"))
    assert all(path.exists() for path in stage.models().values())
    assert not set(stage.models()) & set(stage.fingerprint_settings())


def test_importing_the_stage_loads_no_heavy_library():
    heavy = {"torch", "diffusers", "transformers", "ray"}
    code = f"import sys, ipvg_ray.stages.first_frame; print({heavy} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


@pytest.mark.slow
def test_the_profile_size_is_drawn_in_seconds(models):
    stage = FirstFrameStage(config.load("cpu-mini", values={"models": {"root": str(models)}}))
    stage.setup(StageContext("cpu", 1, NoMedia(), "run"))
    stage.process([row(1)])
    begun = time.process_time()
    results = stage.process([row(2, 1), row(2, 2), row(3, 1)])
    assert (time.process_time() - begun) / 3 < 1.5
    assert {picture(result).shape for result in results} == {(96, 176, 3)}


# -- CLIP --------------------------------------------------------------------------------------------------------------


def test_features_are_the_penultimate_layers(models):
    clip = ClipVision.load(models / mini_clip.NAME)
    states = []
    last = clip.model.encoder.layers[-1]
    hook = last.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    made = clip.penultimate(face(1))
    hook.remove()
    assert made.shape == (1, 17, 32)
    assert torch.equal(made, states[0])


def test_pictures_go_through_clips_own_preprocessing(models):
    """Shorter edge to 56, middle cut out, CLIP's mean and deviation."""
    clip = ClipVision.load(models / mini_clip.NAME)
    grey = np.full((90, 150, 3), 127, np.uint8)
    grey[:, :20] = 255  # cut off
    pixels = []
    hook = clip.model.register_forward_pre_hook(lambda _, args: pixels.append(args[0]))
    clip.penultimate(grey)
    hook.remove()
    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    assert pixels[0].shape == (1, 3, 56, 56)
    expected = torch.tensor((127 / 255 - mean) / deviation, dtype=torch.float32)[:, None, None].expand(3, 56, 56)
    torch.testing.assert_close(pixels[0][0], expected, atol=1e-4, rtol=0)


def test_of_a_whole_clip_model_the_vision_half_is_read(models, tmp_path, capfd):
    """openai/clip-vit-large-patch14 holds both halves in one file, the vision half under another prefix."""
    from transformers import CLIPConfig, CLIPModel

    clip = ClipVision.load(models / mini_clip.NAME)
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = CLIPModel(CLIPConfig(vision_config=clip.model.config.to_dict(), text_config=text, projection_dim=24))
    whole.vision_model.load_state_dict(clip.model.state_dict())
    whole.save_pretrained(tmp_path)
    processor = "preprocessor_config.json"
    (tmp_path / processor).write_bytes((models / mini_clip.NAME / processor).read_bytes())
    capfd.readouterr()
    again = ClipVision.load(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert again.width == 32
    assert torch.equal(again.penultimate(face(1)), clip.penultimate(face(1)))


def test_a_clip_without_all_its_weights_is_refused(models, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(ClipVisionError, match="gone"):
        ClipVision.load(tmp_path / "gone")
    for path in (models / mini_clip.NAME).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    key = next(key for key in tensors if "layers.1.mlp.fc1.weight" in key)
    del tensors[key]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ClipVisionError, match=r"layers\.1\.mlp\.fc1\.weight"):
        ClipVision.load(tmp_path)
