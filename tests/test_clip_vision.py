"""CLIP's picture encoder on the miniature: its layer, its preprocessing, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sdxl_minis import face

from ipvg_ray.models.clip_vision import ClipVision, ClipVisionError
from ipvg_ray.models.mini import clip_vision as mini_clip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("minis")
    mini_clip.make(root)
    return root


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
