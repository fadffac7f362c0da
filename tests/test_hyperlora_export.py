"""`ipvg-ray hyperlora export`: from pictures to a LoRA file."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sdxl_minis import add_base, load_pipeline

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


def export(models: Path, target: Path, *pictures: Path, more: Sequence[str] = ()) -> int:
    options = ["--profile", "cpu-mini", "--out", str(target)]
    for setting in (f"models.root={models}", *more):
        options += ["--set", setting]
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


@pytest.mark.slow
def test_what_an_export_is_made_from_and_what_is_left_out(mini_models, tmp_path, face_picture, capsys):
    """As in a run, but that all pictures which pass are used."""
    whole = np.asarray(Image.open(face_picture))
    for name, picture in {"flipped": whole[:, ::-1], "meadow": np.full((200, 200, 3), 99, np.uint8)}.items():
        Image.fromarray(np.ascontiguousarray(picture)).save(tmp_path / f"{name}.png")
    flipped, meadow = tmp_path / "flipped.png", tmp_path / "meadow.png"

    def exported(*pictures: Path, **options: object) -> dict[str, torch.Tensor]:
        settings = [f"{key}={value}" for key, value in options.items()]
        assert export(mini_models, tmp_path / "x.safetensors", *pictures, more=settings) == 0
        return load_file(tmp_path / "x.safetensors")

    alone = exported(face_picture)
    assert "from 1 of 1 pictures" in capsys.readouterr().out
    loose, strict = ({"faces.gates.odd_one_out.cosine": cosine} for cosine in (-1, 1))
    both = exported(face_picture, meadow, flipped, **loose, **{"faces.used_references": 1})
    printed = capsys.readouterr().out.replace("\n", "")
    assert "from 2 of 3 pictures" in printed
    assert f"left out: {meadow}: no_face: no face found" in printed
    assert any(not torch.equal(both[key], value) for key, value in alone.items())
    disagreeing = exported(face_picture, flipped, **strict)
    printed = capsys.readouterr().out.replace("\n", "")
    assert f"left out: {flipped}: it does not seem to show the person of the first" in printed
    assert all(torch.equal(disagreeing[key], value) for key, value in alone.items())
    refusing = ["faces.gates.odd_one_out.cosine=1", "faces.gates.odd_one_out.action=refuse"]
    assert export(mini_models, tmp_path / "y.safetensors", face_picture, flipped, more=refusing) == 1
    assert "astronaut.png" in (error := capsys.readouterr().err)
    assert "flipped.png: reference pictures 0, 1" in error.replace("\n", " ")


@pytest.mark.slow
def test_a_base_lora_is_in_the_file_with_its_own_weight(mini_models, tmp_path, face_picture):
    folder = tmp_path / "with-base"
    shutil.copytree(mini_models / mini_hyperlora.NAME, folder)
    add_base(folder)
    files = []
    for base_weight in (0, 0.425):
        settings = [f"first_frame.hyperlora={folder}", f"first_frame.base_weight={base_weight}"]
        assert export(mini_models, tmp_path / "x.safetensors", face_picture, more=settings) == 0
        files.append(load_file(tmp_path / "x.safetensors"))
    plain, merged = files
    name = next(iter(HyperLora.load(folder).paths))
    down, up = f"{name}.lora_down.weight", f"{name}.lora_up.weight"
    assert (len(plain[down]), len(merged[down])) == (4, 6)
    assert float(merged[f"{name}.alpha"]) == 3  # half the rank, as without
    assert torch.equal(merged[down][:4], plain[down])
    assert torch.equal(merged[up][:, :4], plain[up])
    doubled = ["first_frame.base_weight=0.85", f"first_frame.hyperlora={folder}"]
    assert export(mini_models, tmp_path / "x.safetensors", face_picture, more=doubled) == 0
    torch.testing.assert_close(
        load_file(tmp_path / "x.safetensors")[up][:, 4:], 2 * merged[up][:, 4:], rtol=2e-3, atol=0
    )


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
