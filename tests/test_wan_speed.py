"""Which attention a card gets, and that the options leave the network's output where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from wan_minis import SIZE, encoder, model, sample, stock

from ipvg_ray.models.mini import wan_vace
from ipvg_ray.models.wan import speed
from ipvg_ray.models.wan.errors import WanError
from ipvg_ray.models.wan.guidance import Cfg
from ipvg_ray.models.wan.speed import best_attention, speed_up


@pytest.mark.parametrize(
    ("card", "packages", "expected"),
    [
        (None, {"flash_attn", "flash_attn_interface"}, "native"),
        ((9, 0), {"flash_attn", "flash_attn_interface"}, "_flash_3"),
        ((9, 0), {"flash_attn"}, "flash"),
        ((10, 0), {"flash_attn", "flash_attn_interface"}, "flash"),
        ((8, 0), {"flash_attn_interface", "flash_attn"}, "flash"),
        ((8, 9), {"sageattention"}, "native"),
        ((7, 5), {"flash_attn"}, "native"),
    ],
)
def test_attention_follows_card_and_packages(card: Any, packages: set[str], expected: str) -> None:
    assert best_attention(card, packages.__contains__) == expected


def test_the_names_are_diffusers() -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    assert {"native", "flash", "_flash_3"} <= {name.value for name in AttentionBackendName}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    wan_vace.make(root)
    return root


@pytest.mark.parametrize("storage", ["fp8", "fp8_scaled"])
def test_eight_bit_storage_halves_the_weights_and_keeps_the_picture(storage: str, root: Path) -> None:
    if storage == "fp8_scaled":
        pytest.importorskip("torchao")
    pipeline = stock(root, "vace-i2v")
    text, negative = (encoder(pipeline).states(words) for words in ("a woman smiles", "blurred"))
    results = []
    for kept in ("dtype", storage):
        ours = model(root, "vace-i2v", torch.bfloat16)
        speed_up(ours.denoiser.transformers, storage=kept)  # type: ignore[arg-type]
        results.append(ours.denoise([sample("vace-i2v", text)], negative, SIZE, Cfg(5.0), 2))
    transformer = ours.denoiser.transformers[0]
    weight = transformer.blocks[0].ffn.net[0].proj.weight
    if storage == "fp8":
        assert weight.dtype == torch.float8_e4m3fn
    else:
        assert weight.qdata.dtype == torch.float8_e4m3fn
        assert weight.scale.shape == (len(weight), 1)
        assert type(transformer.vace_blocks[0].ffn.net[2].weight) is type(weight)
        assert type(transformer.vace_blocks[0].proj_out.weight) is torch.nn.Parameter
        assert type(transformer.condition_embedder.time_proj.weight) is torch.nn.Parameter
    assert transformer.dtype == torch.bfloat16, "what is computed with"
    assert transformer.blocks[0].norm2.weight.dtype == torch.float32
    difference = (results[0] - results[1]).abs().mean()
    assert 0 < difference < 0.2 * results[0].abs().mean()


def test_without_torchao_or_a_card_that_can_it_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = model(root, "vace-i2v").denoiser.transformers
    with pytest.raises(WanError, match=r"fp8_matmul needs compute capability 8\.9 or more, and here is no NVIDIA card"):
        speed_up(transformers, storage="fp8_matmul")
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WanError, match=r"fp8_scaled needs the package torchao: pip install 'ipvg-ray\[fp8\]'"):
        speed_up(transformers, storage="fp8_scaled")


def test_an_unknown_attention_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="magic"):
        speed_up(model(root, "vace-i2v").denoiser.transformers, attention="magic")
