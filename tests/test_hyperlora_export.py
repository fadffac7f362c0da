"""`ipvg-ray hyperlora export`: from pictures to a LoRA file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sdxl_minis import load_pipeline

from ipvg_ray import cli
from ipvg_ray.models.hyperlora import HyperLora
from ipvg_ray.models.mini import hyperlora as mini_hyperlora


@pytest.fixture(scope="module")
def face_picture(tmp_path_factory) -> Path:
    """A public-domain photograph that scikit-image carries."""
    from skimage import data

    path = tmp_path_factory.mktemp("pictures") / "astronaut.png"
    Image.fromarray(data.astronaut()).save(path)
    return path


def export(models: Path, target: Path, *pictures: Path) -> int:
    options = ["--profile", "cpu-mini", "--set", f"models.root={models}", "--out", str(target)]
    return cli.main(["hyperlora", "export", *map(str, pictures), *options])


@pytest.mark.slow
def test_pictures_become_a_lora_that_diffusers_loads(mini_models, tmp_path, face_picture, capsys):
    target = tmp_path / "loras" / "astronaut.safetensors"
    assert export(mini_models, target, face_picture) == 0
    printed = capsys.readouterr().out
    assert "weight 0.85" in printed
    assert "fcsks fxhks fhyks" in printed
    tensors = load_file(target)
    names = HyperLora.load(mini_models / mini_hyperlora.NAME).paths
    assert {key.partition(".")[0] for key in tensors} == set(names)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    pytest.importorskip("peft", reason="diffusers loads LoRA files through peft")
    pipeline = load_pipeline(mini_models)
    pipeline.load_lora_weights(str(target.parent), weight_name=target.name)
    assert len(pipeline.get_list_adapters()["unet"]) == 1

    flipped = tmp_path / "flipped.png"
    Image.fromarray(np.ascontiguousarray(np.asarray(Image.open(face_picture))[:, ::-1])).save(flipped)
    assert export(mini_models, tmp_path / "two.safetensors", face_picture, flipped) == 0
    both = load_file(tmp_path / "two.safetensors")
    assert any(not torch.equal(both[key], value) for key, value in tensors.items() if key.endswith("down.weight"))


@pytest.mark.slow
def test_pictures_without_a_face_are_named(mini_models, tmp_path, capsys):
    Image.new("RGB", (200, 200), (90, 120, 60)).save(tmp_path / "meadow.png")
    assert export(mini_models, tmp_path / "x.safetensors", tmp_path / "meadow.png") == 1
    assert "meadow.png: no face found" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_missing_pictures_and_models_are_named(tmp_path, capsys):
    assert export(tmp_path, tmp_path / "x.safetensors", tmp_path / "gone.png") == 1
    assert "gone.png" in capsys.readouterr().err
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    assert export(tmp_path, tmp_path / "x.safetensors", tmp_path / "a.png") == 1
    assert "mini_buffalo_l" in capsys.readouterr().err
