"""HyperLoRA's network against the golden values, and the names of its modules on the full SDXL UNet."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sdxl_minis import add_base, full_unet, make_minis, one_condition
from torch import nn

from ipvg_ray.models import hyperlora, lora
from ipvg_ray.models.hyperlora import HyperLora, HyperLoraError
from ipvg_ray.models.mini import clip_vision as mini_clip
from ipvg_ray.models.mini import hyperlora as mini_hyperlora

# Written out from the published table, not calculated: attention blocks in the original numbering, in diffusers'
# numbering, and how many transformer blocks each holds.
SGM_BLOCKS = {
    "input_blocks_4_1": ("down_blocks.1.attentions.0", 2),
    "input_blocks_5_1": ("down_blocks.1.attentions.1", 2),
    "input_blocks_7_1": ("down_blocks.2.attentions.0", 10),
    "input_blocks_8_1": ("down_blocks.2.attentions.1", 10),
    "middle_block_1": ("mid_block.attentions.0", 10),
    "output_blocks_0_1": ("up_blocks.0.attentions.0", 10),
    "output_blocks_1_1": ("up_blocks.0.attentions.1", 10),
    "output_blocks_2_1": ("up_blocks.0.attentions.2", 10),
    "output_blocks_3_1": ("up_blocks.1.attentions.0", 2),
    "output_blocks_4_1": ("up_blocks.1.attentions.1", 2),
    "output_blocks_5_1": ("up_blocks.1.attentions.2", 2),
}


def names(style: str) -> dict[str, str]:
    """All 140 attention modules' names in one numbering, to their paths."""
    return {
        f"lora_unet_{block if style == 'sgm' else place.replace('.', '_')}_transformer_blocks_{i}_{attention}": (
            f"{place}.transformer_blocks.{i}.{attention}"
        )
        for block, (place, depth) in SGM_BLOCKS.items()
        for i in range(depth)
        for attention in ("attn1", "attn2")
    }


@pytest.fixture
def golden(shared: Path) -> Path:
    return shared / "golden" / "hyperlora"


@pytest.fixture
def copy(golden: Path, tmp_path: Path) -> Path:
    """The golden checkpoint, for tests that change it."""
    return Path(shutil.copytree(golden, tmp_path / "checkpoint"))


def golden_input(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    values = load_file(folder / "io.safetensors")
    return values["id_embed"][0], values["clip_hidden_states"]


def change(path: Path, **changes: torch.Tensor | None) -> None:
    """Rewrite a file's tensors; None takes one away. Dots of names are written as two underscores."""
    tensors = load_file(path)
    for key, value in changes.items():
        tensors.pop(key.replace("__", "."), None)
        if value is not None:
            tensors[key.replace("__", ".")] = value
    save_file(tensors, path)


# -- golden values -----------------------------------------------------------------------------------------------------


@pytest.mark.shared
def test_tokens_and_every_lora_tensor_are_the_originals(golden):
    model = HyperLora.load(golden)
    expected = load_file(golden / "io.safetensors")
    tokens = model.tokens(*golden_input(golden))
    torch.testing.assert_close(tokens, expected["tokens"], atol=1e-5, rtol=0)
    made = hyperlora.kohya_state_dict(model.lora(tokens))
    wanted = {key.removeprefix("id."): value for key, value in expected.items() if key.startswith("id.")}
    assert made.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(made[key], value, atol=1e-5, rtol=0, msg=key)


@pytest.mark.shared
def test_sizes_are_read_off_the_tensors(golden):
    model = HyperLora.load(golden)
    assert (model.rank, model.clip_width) == (4, 32)
    assert [layer.attn1.heads for layer in model.resampler.layers] == [3, 3]
    assert model.paths["lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0"] == (
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    )


@pytest.mark.shared
def test_base_lora_tensors_are_left_aside(copy):
    before = HyperLora.load(copy).lora(HyperLora.load(copy).tokens(*golden_input(copy)))
    change(copy / "hyper_lora_modules.safetensors", **{"0__to_q__base_down_basis": torch.ones(16, 32, 2)})
    after = HyperLora.load(copy).lora(HyperLora.load(copy).tokens(*golden_input(copy)))
    assert all(torch.equal(after[name].down, before[name].down) for name in before)


@pytest.mark.shared
def test_several_reference_pictures_are_averaged(golden):
    model = HyperLora.load(golden)
    embeds, features = golden_input(golden)
    generator = torch.Generator().manual_seed(0)
    other = torch.nn.functional.normalize(torch.randn(1, 512, generator=generator), dim=-1)
    one = model.tokens(embeds, features)
    same = model.tokens(embeds.repeat(3, 1), features.repeat(3, 1, 1))
    torch.testing.assert_close(one, same, atol=1e-6, rtol=0)
    mixed = model.tokens(torch.cat([embeds, other]), features.repeat(2, 1, 1))
    swapped = model.tokens(torch.cat([other, embeds]), features.repeat(2, 1, 1))
    assert mixed.shape == one.shape
    assert (mixed - one).abs().max() > 0.01
    torch.testing.assert_close(mixed, swapped, atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed.norm(dim=-1), torch.ones(1, 24), atol=1e-4, rtol=0)


@pytest.mark.shared
@pytest.mark.parametrize("pictures", [2, 3])
def test_the_mean_is_taken_before_tokens_are_brought_to_length_one(golden, pictures):
    """What the projection gives for each picture alone, fused here by the published rule."""
    model = HyperLora.load(golden)
    generator = torch.Generator().manual_seed(pictures)
    embeds = torch.nn.functional.normalize(torch.randn(pictures, 512, generator=generator), dim=-1)
    features = torch.randn(pictures, 17, 32, generator=generator)
    given: list[torch.Tensor] = []
    hook = model.resampler.proj_out.register_forward_hook(lambda _, __, tokens: given.append(tokens))
    for i in range(pictures):
        model.tokens(embeds[i : i + 1], features[i : i + 1])
    hook.remove()
    mean = torch.cat(given).mean(0)
    expected = mean / (mean.square().sum(-1, keepdim=True) + 1e-8).sqrt()
    torch.testing.assert_close(model.tokens(embeds, features)[0], expected, atol=1e-5, rtol=0)
    each = [tokens / tokens.norm(dim=-1, keepdim=True) for tokens in given]
    after = torch.nn.functional.normalize(torch.cat(each).mean(0), dim=-1)
    assert (after - expected).abs().max() > 1e-3, "the order of mean and length matters"


@pytest.mark.shared
def test_embeddings_and_features_of_different_pictures_are_refused(golden):
    model = HyperLora.load(golden)
    embeds, features = golden_input(golden)
    for one, other in ((1, 2), (2, 1), (2, 3)):
        with pytest.raises(HyperLoraError, match=f"{one} pictures, CLIP features of {other}"):
            model.tokens(embeds.repeat(one, 1), features.repeat(other, 1, 1))


# -- the Base LoRA -----------------------------------------------------------------------------------------------------


@pytest.mark.shared
def test_the_base_lora_comes_from_its_own_resampler_and_bases(copy):
    embeds, features = golden_input(copy)
    before = HyperLora.load(copy)
    assert not before.has_base
    with pytest.raises(HyperLoraError, match="no Base LoRA"):
        before.base_tokens(features)
    added = add_base(copy)
    model = HyperLora.load(copy)
    tokens = model.base_tokens(features)
    assert torch.equal(model.tokens(embeds, features), before.tokens(embeds, features))
    assert tokens.shape == (1, 24, 16)
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(1, 24), atol=1e-4, rtol=0)
    assert (model.base_tokens(features.flip(1) * 2) - tokens).abs().max() > 0.01
    made = model.base_lora(tokens)
    assert made.keys() == model.lora(model.tokens(embeds, features)).keys()
    pair = made["lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_v"]  # module 1, its third projection
    assert (pair.down.shape, pair.up.shape) == ((2, 64), (32, 2))
    down = sum(tokens[0, 8 + 4, d] * added["1.to_v.base_down_basis"][d] for d in range(16))
    up = sum(tokens[0, 8 + 5, d] * added["1.to_v.base_up_basis"][d] for d in range(16))
    torch.testing.assert_close(pair.down, down.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(pair.up, up.T, atol=1e-5, rtol=0)


@pytest.mark.shared
def test_a_base_resampler_without_bases_is_refused(copy):
    add_base(copy)
    tensors = load_file(copy / "hyper_lora_modules.safetensors")
    save_file({k: v for k, v in tensors.items() if ".base_" not in k}, copy / "hyper_lora_modules.safetensors")
    with pytest.raises(HyperLoraError, match="base_down_basis"):
        HyperLora.load(copy)


@pytest.mark.shared
def test_merged_loras_add_up(copy):
    add_base(copy)
    model = HyperLora.load(copy)
    embeds, features = golden_input(copy)
    identity, base = model.lora(model.tokens(embeds, features)), model.base_lora(model.base_tokens(features))
    both = lora.merged([(identity, 0.85), (base, 0.5)])
    for name, pair in both.items():
        expected = 0.85 * identity[name].up @ identity[name].down + 0.5 * base[name].up @ base[name].down
        torch.testing.assert_close(pair.up @ pair.down, expected, atol=1e-5, rtol=0)
        assert len(pair.down) == 4 + 2
    with pytest.raises(lora.LoraError, match="same layers"):
        lora.merged([(identity, 1.0), ({}, 1.0)])


# -- checkpoints with one encoder, and broken ones ---------------------------------------------------------------------


@pytest.mark.shared
def test_one_condition_is_arcface_where_there_is_an_id_projector_else_clip(copy):
    embeds, features = golden_input(copy)
    one_condition(copy)
    arcface = HyperLora.load(copy)
    assert arcface.clip_width is None
    assert torch.equal(arcface.tokens(embeds, None), arcface.tokens(embeds, features * 2))
    (copy / "id_projector.safetensors").unlink()
    clip = HyperLora.load(copy)
    assert clip.clip_width == 32
    assert torch.equal(clip.tokens(None, features), clip.tokens(embeds * 2, features))
    assert not torch.equal(clip.tokens(None, features), clip.tokens(None, features * 2))


@pytest.mark.shared
@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("resampler", {"latents": None}, "latents"),
        ("resampler", {"proj_out__bias": None}, r"resampler\.safetensors"),
        ("resampler", {"latents": torch.zeros(1, 16, 64)}, "16 tokens, 3 modules need 24"),
        ("hyper_lora_modules", {"2__to_v__id_up_basis": None}, r"hyper_lora_modules\.safetensors"),
        ("hyper_lora_modules", {"0__to_q__id_down_basis": torch.zeros(16, 48, 4)}, r"hyper_lora_modules\.safetensors"),
        ("id_projector", {"2__weight": None}, "id projector"),
    ],
)
def test_tensors_that_do_not_fit_are_named(copy, file, changes, message):
    change(copy / f"{file}.safetensors", **changes)
    with pytest.raises(HyperLoraError, match=message):
        HyperLora.load(copy)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["resampler.safetensors", "id_projector.safetensors", "hyper_lora_modules.json"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(HyperLoraError, match=name):
        HyperLora.load(copy)


@pytest.mark.shared
def test_without_config_heads_are_64_wide(copy):
    (copy / "config.json").unlink()
    with pytest.raises(HyperLoraError, match=r"48 wide, no multiple of 64"):
        HyperLora.load(copy)


@pytest.mark.shared
def test_inputs_of_another_width_are_refused(golden):
    model = HyperLora.load(golden)
    embeds, features = golden_input(golden)
    for given in ((embeds[0], features), (embeds[:, :500], features), (embeds, features[..., :16]), (embeds, None)):
        with pytest.raises(HyperLoraError, match="wide"):
            model.tokens(*given)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["sgm", "diffusers"])
def test_both_numberings_name_all_560_projections_of_sdxl(style):
    with torch.device("meta"):  # no memory for its weights
        unet = full_unet()
    known = names(style)
    assert len(known) == 140
    assert {name: lora.attention_path(name) for name in known} == known
    paths = lora.projection_paths(known)
    assert len(set(paths.values())) == len(paths) == 560
    assert all(isinstance(unet.get_submodule(path), nn.Linear) for path in paths.values())
    attentions = {path for path, _ in unet.named_modules() if path.endswith((".attn1", ".attn2"))}
    assert set(known.values()) == attentions


def test_the_released_size_gives_11_6_million_lora_weights():
    with torch.device("meta"):  # no memory for its weights
        unet = full_unet()
    paths = lora.projection_paths(names("diffusers"))
    layers = [unet.get_submodule(path) for path in paths.values()]
    assert round(sum(8 * (layer.in_features + layer.out_features) for layer in layers) / 1e6, 1) == 11.6


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_input_blocks_0_1_transformer_blocks_0_attn1",
        "lora_unet_input_blocks_4_0_transformer_blocks_0_attn1",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn3",
        "lora_unet_left_blocks_1_attentions_0_transformer_blocks_0_attn1",
        "lora_te1_text_model_encoder_layers_0_self_attn",
        "input_blocks_4_1_transformer_blocks_0_attn1",
    ],
)
def test_other_names_are_refused(name):
    with pytest.raises(lora.LoraError, match="neither numbering"):
        lora.attention_path(name)


# -- the miniature -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minis(tmp_path_factory) -> Path:
    return make_minis(tmp_path_factory.mktemp("minis"))


def test_the_miniature_fits_its_sdxl_and_clip(minis):
    model = HyperLora.load(minis / mini_hyperlora.NAME)
    config = json.loads((minis / mini_clip.NAME / "config.json").read_text())
    assert model.clip_width == config["hidden_size"]
    assert len(model.paths) == 4 * 34
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    pairs = model.lora(model.tokens(torch.ones(1, 512) / 512**0.5, torch.zeros(1, 17, 32)))
    assert pairs.keys() == model.paths.keys()
    assert all(torch.isfinite(pair.up @ pair.down).all() for pair in pairs.values())


def test_the_miniatures_are_the_same_each_time(minis, tmp_path):
    state = torch.get_rng_state()
    make_minis(tmp_path / "again")
    assert torch.equal(state, torch.get_rng_state())
    make_minis(tmp_path / "other", seed=1)
    files = sorted(path.relative_to(minis) for path in minis.rglob("*") if path.is_file())
    assert sum((minis / name).stat().st_size for name in files) < 8e6
    for name in files:
        assert (minis / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
        if name.suffix == ".safetensors":
            assert (minis / name).read_bytes() != (tmp_path / "other" / name).read_bytes(), name
