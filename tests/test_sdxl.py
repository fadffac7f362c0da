"""SDXL on the miniature: the single file, prompts in chunks, the sampler, one picture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sdxl_minis import NEGATIVE, PROMPT, SMALL, drawn, embedding, load_pipeline, make_minis, words

from ipvg_ray.models import sdxl_load
from ipvg_ray.models.hyperlora import HyperLora
from ipvg_ray.models.lora import PerSampleLora
from ipvg_ray.models.mini import hyperlora as mini_hyperlora
from ipvg_ray.models.mini import sdxl as mini_sdxl
from ipvg_ray.models.mini.sdxl_keys import single_file
from ipvg_ray.models.sdxl import DrawSettings, Request, Sdxl
from ipvg_ray.models.sdxl_load import Memory, SdxlError


@pytest.fixture(scope="module")
def minis(tmp_path_factory) -> Path:
    return make_minis(tmp_path_factory.mktemp("minis"))


@pytest.fixture(scope="module")
def pipeline(minis) -> Any:
    return load_pipeline(minis)


@pytest.fixture(scope="module")
def model(pipeline) -> Sdxl:
    return Sdxl(pipeline)


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_file_read_back_by_diffusers_gives_the_same_file(minis, pipeline):
    stored = load_file(minis / mini_sdxl.NAME)
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    again = single_file(*(part.state_dict() for part in parts))
    extra = set(stored) - set(again)
    assert set(again) <= set(stored)
    assert {key.rpartition(".")[2] for key in extra} == {"position_ids", "logit_scale"}
    for key, value in again.items():
        assert torch.equal(value.half(), stored[key]), key


def test_every_tensor_arrives_at_its_own_place(minis, pipeline):
    """All values of the file are distinct enough that a swap of two layers would show."""
    stored = load_file(minis / mini_sdxl.NAME)
    encoder = "conditioner.embedders.0.transformer.text_model.encoder.layers.2.mlp.fc1.weight"
    fused = stored["conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"].float()
    attention = pipeline.text_encoder_2.text_model.encoder.layers[1].self_attn
    unet, vae = pipeline.unet, pipeline.vae
    pairs = {
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.1.attn2.to_k.weight": (
            unet.down_blocks[2].attentions[1].transformer_blocks[1].attn2.to_k.weight
        ),
        "model.diffusion_model.input_blocks.3.0.op.weight": unet.down_blocks[0].downsamplers[0].conv.weight,
        "model.diffusion_model.output_blocks.2.2.conv.weight": unet.up_blocks[0].upsamplers[0].conv.weight,
        "model.diffusion_model.output_blocks.6.0.skip_connection.weight": (
            unet.up_blocks[2].resnets[0].conv_shortcut.weight
        ),
        "model.diffusion_model.middle_block.2.out_layers.3.bias": unet.mid_block.resnets[1].conv2.bias,
        "model.diffusion_model.label_emb.0.2.weight": unet.add_embedding.linear_2.weight,
        "first_stage_model.decoder.up.3.block.0.conv1.weight": vae.decoder.up_blocks[0].resnets[0].conv1.weight,
        "first_stage_model.encoder.down.0.downsample.conv.weight": vae.encoder.down_blocks[0]
        .downsamplers[0]
        .conv.weight,
        encoder: dict(pipeline.text_encoder.named_parameters())["encoder.layers.2.mlp.fc1.weight"],
    }
    for key, parameter in pairs.items():
        assert torch.equal(stored[key].float(), parameter), key
    assert torch.equal(fused[48:96], attention.k_proj.weight)
    assert torch.equal(
        stored["conditioner.embedders.1.model.text_projection"].float().T,
        pipeline.text_encoder_2.text_projection.weight,
    )


def test_a_diffusers_folder_loads_as_well(pipeline, model, tmp_path):
    pipeline.save_pretrained(tmp_path / "folder")
    again = sdxl_load.load(tmp_path / "folder", tmp_path / "unread", dtype=torch.float32, device="cpu")
    ours, theirs = (drawn(m).astype(int) for m in (model, Sdxl(again)))
    # Not always to the bit: matrix products depend on where in memory the weights of a mapped file lie.
    assert np.abs(ours - theirs).max() <= 1


def test_half_precision_spares_the_vae(minis):
    pipeline = load_pipeline(minis, torch.float16)
    assert {p.dtype for p in pipeline.vae.parameters()} == {torch.float32}
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
        assert {p.dtype for p in part.parameters()} == {torch.float16}
    half = drawn(Sdxl(pipeline)).astype(int)
    full = drawn(Sdxl(load_pipeline(minis))).astype(int)
    assert np.abs(half - full).max() > 0
    assert np.abs(half - full).mean() < 2


def test_loading_reaches_for_no_network_and_prints_nothing(minis, monkeypatch, capfd):
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    drawn(Sdxl(load_pipeline(minis)))
    assert capfd.readouterr() == ("", "")


def test_incomplete_checkpoints_are_refused(minis, tmp_path):
    stored = load_file(minis / mini_sdxl.NAME)
    config = minis / mini_sdxl.CONFIG_NAME
    for prefix, message in (
        ("model.diffusion_model.input_blocks.8.1.transformer_blocks.1.attn2.to_k", "lacks weights"),
        ("first_stage_model", "cannot load"),
        ("conditioner.embedders.1", "cannot load"),
    ):
        path = tmp_path / "part.safetensors"
        save_file({key: value for key, value in stored.items() if not key.startswith(prefix)}, path)
        with pytest.raises(SdxlError, match=message):
            sdxl_load.load(path, config, dtype=torch.float32, device="cpu")
    with pytest.raises(SdxlError, match=r"gone\.safetensors"):
        sdxl_load.load(tmp_path / "gone.safetensors", config, dtype=torch.float32, device="cpu")
    with pytest.raises(SdxlError, match="no diffusers folder"):
        sdxl_load.load(minis / mini_sdxl.NAME, tmp_path / "gone", dtype=torch.float32, device="cpu")


# -- the picture -------------------------------------------------------------------------------------------------------


def test_everything_that_should_matter_does(model):
    def make(prompt=PROMPT, negative=NEGATIVE, seed=1, **changes):
        return drawn(model, prompt, negative, seed, **changes)

    base = make()
    assert np.array_equal(base, make())
    for other in (
        make(prompt="a man in a black suit"),
        make(prompt=f"{PROMPT}, {words(150)}"),
        make(prompt=f"{PROMPT}, {words(150)} hat"),
        make(negative="grey"),
        make(seed=2),
        make(steps=4),
        make(guidance=3.0),
        make(guidance=1.0),
    ):
        assert not np.array_equal(base, other)
    assert not np.array_equal(make(prompt=f"{words(150)} hat"), make(prompt=f"{words(150)} coat"))


def test_guidance_of_one_asks_only_for_the_prompt(model):
    sizes = []
    hook = model.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    one = drawn(model, guidance=1.0)
    other = drawn(model, negative="grey", guidance=1.0)
    hook.remove()
    assert sizes == [1] * 6
    assert np.array_equal(one, other)


def test_global_random_state_is_neither_read_nor_changed(model):
    torch.manual_seed(1)
    one = drawn(model, seed=7)
    state = torch.get_rng_state()
    assert np.array_equal(one, drawn(model, seed=7))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("change", [{"height": 36}, {"width": 44}])
def test_sizes_off_the_grid_are_refused(model, change):
    with pytest.raises(SdxlError, match="multiples of 8"):
        drawn(model, **change)


def test_a_single_step_and_an_odd_size_are_possible(model):
    assert drawn(model, height=40, width=56, steps=1).shape == (40, 56, 3)


def test_nan_is_an_error_not_a_black_picture(minis):
    pipeline = load_pipeline(minis)
    with torch.no_grad():
        pipeline.unet.conv_out.bias[0] = torch.nan
    with pytest.raises(SdxlError, match="NaN"):
        drawn(Sdxl(pipeline))


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [3, 8])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_mixed_identities_in_one_batch_are_each_drawn_as_if_fused_alone(minis, samples, guidance):
    """From noise to pixels: each sample with its own prompt, seed and LoRA, against a UNet with that LoRA fused."""
    hyper = HyperLora.load(minis / mini_hyperlora.NAME)
    features = torch.randn(samples, 17, 32, generator=torch.Generator().manual_seed(0))
    made = [hyper.lora(hyper.tokens(embedding(i)[None], features[i : i + 1])) for i in range(samples)]
    prompts = [words(4 + 30 * i) for i in range(samples)]  # one to four chunks
    settings = DrawSettings(**(SMALL | {"guidance": guidance}), negative_prompt=NEGATIVE)
    model = Sdxl(load_pipeline(minis))
    model.adapt(PerSampleLora(model.unet, hyper.paths), 0.425)
    together = model.draw([Request(p, i, made[i]) for i, p in enumerate(prompts)], settings)
    plain = Sdxl(load_pipeline(minis))
    for i, prompt in enumerate(prompts):
        model = Sdxl(load_pipeline(minis))
        with torch.no_grad():
            for name, path in hyper.paths.items():
                model.unet.get_submodule(path).weight += 0.425 * made[i][name].up @ made[i][name].down
        alone = drawn(model, prompt, seed=i, guidance=guidance).astype(int)
        assert np.abs(together[i] - alone).max() <= 1
        assert np.abs(together[i] - alone).mean() < 0.02
        assert np.abs(drawn(plain, prompt, seed=i, guidance=guidance) - alone).mean() > 0.3


def test_guidance_is_one_call_per_step_whatever_the_batch(model):
    sizes = []
    hook = model.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    model.draw([Request("a man", i) for i in range(5)], DrawSettings(**SMALL, negative_prompt=NEGATIVE))
    hook.remove()
    assert sizes == [10] * 3


def test_nan_fails_the_picture_that_has_it(model, monkeypatch):
    predict = model._predict

    def spoiled(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        data = predict(x, *rest)
        data[1] = torch.nan
        return data

    monkeypatch.setattr(model, "_predict", spoiled)
    good, bad, other = model.draw([Request("a man", i) for i in range(3)], DrawSettings(**(SMALL | {"guidance": 1.0})))
    assert isinstance(bad, SdxlError)
    monkeypatch.undo()
    for seed, made in ((0, good), (2, other)):
        assert np.abs(made.astype(int) - drawn(model, "a man", seed=seed, guidance=1.0)).max() <= 1


def test_an_adapter_is_not_forgotten(minis):
    hyper, model = HyperLora.load(minis / mini_hyperlora.NAME), Sdxl(load_pipeline(minis))
    model.adapt(PerSampleLora(model.unet, hyper.paths), 0.425)
    with pytest.raises(SdxlError, match="without an adapter"):
        drawn(model)


# -- from a picture ----------------------------------------------------------------------------------------------------


def start(number: int = 0) -> np.ndarray:
    return np.kron(
        np.random.default_rng(number).integers(0, 256, (4, 6, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8)
    )


@torch.no_grad()
def test_outside_the_mask_the_latents_are_the_pictures(model, monkeypatch):
    decoded = []
    monkeypatch.setattr(model, "_decode", lambda latents: decoded.append(latents) or [])
    mask = np.zeros((32, 48), bool)
    mask[8:24, 16:40] = True
    settings = DrawSettings(**SMALL, negative_prompt=NEGATIVE, denoise=0.5)
    model.draw([Request("a man", 1, picture=start(), mask=mask)], settings)
    pixels = torch.from_numpy(start()).permute(2, 0, 1)[None].float() / 127.5 - 1
    latents = model.pipeline.vae.encode(pixels).latent_dist.mode() * model.pipeline.vae.config.scaling_factor
    inside = torch.zeros(4, 6, dtype=torch.bool)
    inside[1:3, 2:5] = True
    assert torch.equal(decoded[0][..., ~inside], latents[..., ~inside])
    assert (decoded[0] - latents)[..., inside].abs().mean() > 0.01


def test_less_noise_stays_nearer_to_the_picture(model):
    def distance(denoise: float) -> float:
        settings = DrawSettings(**(SMALL | {"steps": 2}), negative_prompt=NEGATIVE, denoise=denoise)
        little, none = (
            model.draw([Request("a man", 1, picture=start(), mask=mask)], settings)[0].astype(int)
            for mask in (None, np.zeros((32, 48), bool))  # an empty mask: what the VAE makes of the picture
        )
        return float(np.abs(little - none).mean())

    assert 0 < distance(0.1) < distance(0.9)


def test_what_a_request_lacks_is_said(model):
    with pytest.raises(SdxlError, match="picture to begin with"):
        drawn(model, denoise=0.5)


# -- memory and speed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "memory", [Memory(vae_slicing=True), Memory(vae_tiling=True), Memory(channels_last=True), Memory(compile=True)]
)
def test_memory_options_change_no_picture(minis, memory):
    """Compiled by a backend that runs what was traced, so that the tracing is what is tested."""
    hyper = HyperLora.load(minis / mini_hyperlora.NAME)
    features = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0))
    made = [hyper.lora(hyper.tokens(embedding(i)[None], features[i : i + 1])) for i in range(2)]
    results = []
    for options in (Memory(), dataclasses.replace(memory, compile_backend="eager")):
        pipeline = load_pipeline(minis)
        model = Sdxl(pipeline)
        model.adapt(PerSampleLora(model.unet, hyper.paths), 0.425)
        sdxl_load.tune(pipeline, options, "cpu")
        requests = [Request(words(5), 0, made[0]), Request(words(90), 1, made[1])]
        settings = DrawSettings(**SMALL, negative_prompt=NEGATIVE)
        results.append([*model.draw(requests, settings), *model.draw(requests[:1], settings)])
    for plain, tuned in zip(*results, strict=True):
        assert np.abs(plain.astype(int) - tuned).max() <= 1


def test_offloading_wants_a_gpu(pipeline):
    with pytest.raises(SdxlError, match="offload"):
        sdxl_load.tune(pipeline, Memory(offload=True), "cpu")


def test_another_vae_can_take_the_place_of_the_checkpoints(minis, pipeline, model, tmp_path):
    from diffusers import AutoencoderKL

    other = AutoencoderKL.from_config(pipeline.vae.config)
    other.save_pretrained(tmp_path / "vae")
    place = minis / mini_sdxl.NAME, minis / mini_sdxl.CONFIG_NAME
    changed = sdxl_load.load(*place, dtype=torch.float32, device="cpu", vae=tmp_path / "vae", vae_dtype=torch.bfloat16)
    assert {p.dtype for p in changed.vae.parameters()} == {torch.bfloat16}
    assert np.abs(drawn(Sdxl(changed)).astype(int) - drawn(model)).mean() > 1
    with pytest.raises(SdxlError, match="gone"):
        sdxl_load.load(*place, dtype=torch.float32, device="cpu", vae=tmp_path / "gone")


# -- the miniature -----------------------------------------------------------------------------------------------------


def test_the_config_folder_is_like_the_published_one(minis):
    folder = minis / mini_sdxl.CONFIG_NAME
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    tokenizer = {"vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"}
    models = {f"{name}/config.json" for name in ("text_encoder", "text_encoder_2", "unet", "vae")}
    tokenizers = {f"{name}/{file}" for name in ("tokenizer", "tokenizer_2") for file in tokenizer}
    assert found == {"model_index.json", "scheduler/scheduler_config.json", *models, *tokenizers}
    unet = json.loads((folder / "unet" / "config.json").read_text())
    assert unet["addition_embed_type"] == "text_time"
    assert unet["use_linear_projection"] is True


def test_any_text_can_be_tokenized(pipeline):
    tokenizer = pipeline.tokenizer
    ids = {tuple(tokenizer(text).input_ids) for text in ("A man", "A woman", "Ж 漢字 🙂", "xyz", "\x00é")}
    assert len(ids) == 5
    assert tokenizer.convert_ids_to_tokens(tokenizer("woman,", add_special_tokens=False).input_ids) == [
        "woman</w>",
        ",</w>",
    ]
    assert tokenizer.unk_token_id not in tokenizer("Ж 漢字 🙂 é", add_special_tokens=False).input_ids
