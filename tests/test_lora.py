"""Per-sample adapters against the same weights fused, on layers and on the miniature SDXL's UNet."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from sdxl_minis import embedding, make_minis
from torch import nn

from ipvg_ray.models import sdxl_load
from ipvg_ray.models.hyperlora import ALPHA_PER_RANK, HyperLora, kohya_state_dict, save_lora
from ipvg_ray.models.lora import LoraError, LoraLinear, LoraPair, PerSampleLora
from ipvg_ray.models.mini import hyperlora as mini_hyperlora
from ipvg_ray.models.mini import sdxl as mini_sdxl

SCALE = 0.85 * ALPHA_PER_RANK


@pytest.fixture(scope="module")
def minis(tmp_path_factory) -> Path:
    return make_minis(tmp_path_factory.mktemp("minis"))


@pytest.fixture(scope="module")
def pipeline(minis) -> Any:
    place = minis / mini_sdxl.NAME, minis / mini_sdxl.CONFIG_NAME
    return sdxl_load.load(*place, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def hyper(minis) -> HyperLora:
    return HyperLora.load(minis / mini_hyperlora.NAME)


@pytest.fixture
def unet(pipeline) -> nn.Module:
    return copy.deepcopy(pipeline.unet)


def adapters(hyper: HyperLora, count: int) -> list[dict[str, LoraPair]]:
    return [adapter(hyper, i) for i in range(count)]


def adapter(hyper: HyperLora, identity: int, pictures: int = 1) -> dict[str, LoraPair]:
    generator = torch.Generator().manual_seed(identity)
    features = torch.randn(pictures, 17, 32, generator=generator)
    embeds = torch.stack([embedding(identity + 100 * i) for i in range(pictures)])
    return hyper.lora(hyper.tokens(embeds, features))


def fused(unet: nn.Module, paths: dict[str, str], adapter: dict[str, LoraPair], scale: float) -> nn.Module:
    """W + scale · up · down in every layer of a copy."""
    unet = copy.deepcopy(unet)
    for name, path in paths.items():
        layer = unet.get_submodule(path)
        layer.weight.data += scale * adapter[name].up @ adapter[name].down
    return unet


def inputs(unet: Any, samples: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        "sample": torch.randn(samples, 4, 12, 22, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(samples, 77, config.cross_attention_dim, generator=generator),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(samples, pooled, generator=generator),
            "time_ids": torch.tensor([[96, 176, 0, 0, 96, 176]] * samples),
        },
    }


def pick(batch: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Some rows of a batch of inputs."""
    added = {key: value[rows] for key, value in batch["added_cond_kwargs"].items()}
    states = batch["encoder_hidden_states"][rows]
    return {**batch, "sample": batch["sample"][rows], "encoder_hidden_states": states, "added_cond_kwargs": added}


# -- one layer ---------------------------------------------------------------------------------------------------------


def test_a_layer_adds_each_samples_own_pair():
    torch.manual_seed(0)
    layer = LoraLinear.around(nn.Linear(6, 5))
    x, down, up = torch.randn(3, 7, 6), torch.randn(3, 2, 6), torch.randn(3, 5, 2)
    plain = layer(x)
    layer.set(down, up)
    expected = torch.stack([x[i] @ (layer.weight + up[i] @ down[i]).T + layer.bias for i in range(3)])
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=0)
    layer.clear()
    assert torch.equal(layer(x), plain)


def test_a_wrapped_layer_shares_its_parameters():
    linear = nn.Linear(4, 4, bias=False)
    layer = LoraLinear.around(linear)
    assert layer.weight is linear.weight
    assert layer.bias is None
    assert layer.state_dict().keys() == linear.state_dict().keys()


def test_shapes_that_do_not_fit_are_refused():
    layer = LoraLinear.around(nn.Linear(6, 5))
    for down, up in (((3, 2, 5), (3, 5, 2)), ((3, 2, 6), (3, 6, 2)), ((3, 2, 6), (2, 5, 2))):
        with pytest.raises(LoraError, match="do not fit"):
            layer.set(torch.zeros(down), torch.zeros(up))
    layer.set(torch.zeros(3, 2, 6), torch.zeros(3, 5, 2))
    with pytest.raises(LoraError, match="batch of 4"):
        layer(torch.zeros(4, 7, 6))


# -- the UNet ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 3, 8])
@torch.no_grad()
def test_a_mixed_batch_equals_the_fused_weights_sample_by_sample(unet, hyper, samples):
    made, batch = adapters(hyper, samples), inputs(unet, samples)
    plain = unet(**batch).sample
    expected = torch.cat([fused(unet, hyper.paths, made[i], SCALE)(**pick(batch, [i])).sample for i in range(samples)])
    assert (expected - plain).abs().max() > 0.01
    with PerSampleLora(unet, hyper.paths).applied(made, SCALE):
        torch.testing.assert_close(unet(**batch).sample, expected, atol=1e-4, rtol=0)
    assert torch.equal(unet(**batch).sample, plain)


@torch.no_grad()
def test_identities_of_one_two_and_three_pictures_share_a_batch(unet, hyper):
    made, batch = [adapter(hyper, 5, pictures) for pictures in (1, 2, 3)], inputs(unet, 3)
    expected = [fused(unet, hyper.paths, made[i], SCALE)(**pick(batch, [i])).sample for i in range(3)]
    alone = fused(unet, hyper.paths, made[0], SCALE)(**pick(batch, [1])).sample
    assert (alone - expected[1]).abs().max() > 0.01, "the second picture is heard"
    with PerSampleLora(unet, hyper.paths).applied(made, SCALE):
        torch.testing.assert_close(unet(**batch).sample, torch.cat(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("samples", [1, 3, 8])
@torch.no_grad()
def test_guidance_gives_both_halves_the_same_pairs(unet, hyper, samples):
    made, batch = adapters(hyper, samples), inputs(unet, 2 * samples)
    expected = torch.empty_like(batch["sample"])
    for i in range(samples):
        rows = [i, samples + i]
        expected[rows] = fused(unet, hyper.paths, made[i], SCALE)(**pick(batch, rows)).sample
    adapted = PerSampleLora(unet, hyper.paths)
    for copies in (1, 2):
        with adapted.applied(made, SCALE, copies):
            torch.testing.assert_close(unet(**batch).sample, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_it_is_the_lora_that_diffusers_would_read(hyper):
    """diffusers' own reading of kohya files gives the same scale, names and directions."""
    from diffusers import StableDiffusionXLPipeline

    (made,) = adapters(hyper, 1)
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(kohya_state_dict(made))
    for name, path in hyper.paths.items():
        attention, _, projection = path.removesuffix(".0").rpartition(".")
        prefix = f"unet.{attention}.processor.{projection}_lora"
        down, up = state.pop(f"{prefix}.down.weight"), state.pop(f"{prefix}.up.weight")
        alpha = alphas.pop(f"{prefix}.down.weight.alpha")
        scaled = alpha / len(down) * up @ down
        torch.testing.assert_close(ALPHA_PER_RANK * made[name].up @ made[name].down, scaled, atol=1e-6, rtol=0)
    assert not state
    assert not alphas


@pytest.mark.parametrize("weight", [0.85, 0.3])
@torch.no_grad()
def test_a_saved_lora_does_in_diffusers_what_it_does_here(minis, pipeline, hyper, tmp_path, weight):
    """The file that `ipvg-ray hyperlora export` writes, through `load_lora_weights` as diffusers' users load it."""
    pytest.importorskip("peft", reason="diffusers loads LoRA files through peft")
    (made,) = adapters(hyper, 1)
    batch = inputs(pipeline.unet, 1)
    unet = copy.deepcopy(pipeline.unet)
    with PerSampleLora(unet, hyper.paths).applied([made], weight * ALPHA_PER_RANK):
        expected = unet(**batch).sample
    save_lora(tmp_path / "id001.safetensors", made, "id001")
    theirs = sdxl_load.load(minis / mini_sdxl.NAME, minis / mini_sdxl.CONFIG_NAME, dtype=torch.float32, device="cpu")
    plain = theirs.unet(**batch).sample
    theirs.load_lora_weights(tmp_path, weight_name="id001.safetensors", adapter_name="id001")
    theirs.set_adapters("id001", weight)
    loaded = theirs.unet(**batch).sample
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(loaded, expected, atol=1e-4, rtol=0)


def test_a_saved_lora_says_what_it_is(hyper, tmp_path):
    (made,) = adapters(hyper, 1)
    save_lora(tmp_path / "a.safetensors", made, "id001")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        described = file.metadata()
        assert len(file.keys()) == 3 * len(made)
    assert described["modelspec.trigger_phrase"] == "fcsks fxhks fhyks"
    assert (described["ss_network_dim"], described["ss_network_alpha"]) == ("4", "2.0")


@torch.no_grad()
def test_scale_zero_is_the_plain_unet(unet, hyper):
    batch = inputs(unet, 2)
    plain = unet(**batch).sample
    with PerSampleLora(unet, hyper.paths).applied(adapters(hyper, 2), 0.0):
        assert torch.equal(unet(**batch).sample, plain)


def test_wrapping_changes_no_names_and_can_be_done_twice(unet, hyper):
    before = list(unet.state_dict())
    layers = [PerSampleLora(unet, hyper.paths)._layers for _ in range(2)]
    assert list(unet.state_dict()) == before
    assert all(layers[0][name] is layers[1][name] for name in hyper.paths)


def test_adapters_are_cleared_whatever_happens(unet, hyper):
    adapted = PerSampleLora(unet, hyper.paths)
    (good,) = adapters(hyper, 1)
    with pytest.raises(KeyboardInterrupt), adapted.applied([good], SCALE):
        raise KeyboardInterrupt
    name = next(iter(reversed(hyper.paths)))
    lacking = {key: pair for key, pair in good.items() if key != name}
    misshapen = {**good, name: LoraPair(good[name].down[:, :-1], good[name].up)}
    for bad, message in ((lacking, "another network"), (misshapen, "do not fit")):
        with pytest.raises(LoraError, match=message):
            adapted.set([bad], SCALE)
    assert all(unet.get_submodule(path).pairs is None for path in hyper.paths.values())


def test_a_path_that_the_unet_lacks_is_refused_and_changes_nothing(unet, hyper):
    name, path = next(iter(hyper.paths.items()))
    with pytest.raises(LoraError, match=r"down_blocks\.7"):
        PerSampleLora(unet, {name: path, "other": path.replace("down_blocks.1", "down_blocks.7")})
    assert type(unet.get_submodule(path)) is nn.Linear
