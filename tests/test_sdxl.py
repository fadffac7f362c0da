"""SDXL on the miniature: the single file, prompts in chunks, the sampler, one picture."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sdxl_minis import make_minis

from ipvg_ray.models import sdxl
from ipvg_ray.models.mini import sdxl as mini_sdxl
from ipvg_ray.models.mini.sdxl_keys import single_file
from ipvg_ray.models.sdxl import Sdxl, SdxlError

SMALL = {"height": 32, "width": 48, "steps": 3, "guidance": 5.0}
PROMPT = "fcsks fxhks fhyks, a woman in a red dress, close-up"
NEGATIVE = "blurry, low quality"


@pytest.fixture(scope="module")
def minis(tmp_path_factory) -> Path:
    return make_minis(tmp_path_factory.mktemp("minis"))


def load(minis: Path, dtype: torch.dtype = torch.float32) -> Any:
    return sdxl.load(minis / mini_sdxl.NAME, minis / mini_sdxl.CONFIG_NAME, dtype=dtype, device="cpu")


@pytest.fixture(scope="module")
def pipeline(minis) -> Any:
    return load(minis)


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
    again = sdxl.load(tmp_path / "folder", tmp_path / "unread", dtype=torch.float32, device="cpu")
    ours, theirs = (m.generate(PROMPT, NEGATIVE, seed=1, **SMALL).astype(int) for m in (model, Sdxl(again)))
    # Not always to the bit: matrix products depend on where in memory the weights of a mapped file lie.
    assert np.abs(ours - theirs).max() <= 1


def test_half_precision_spares_the_vae(minis):
    pipeline = load(minis, torch.float16)
    assert {p.dtype for p in pipeline.vae.parameters()} == {torch.float32}
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
        assert {p.dtype for p in part.parameters()} == {torch.float16}
    half = Sdxl(pipeline).generate(PROMPT, NEGATIVE, seed=1, **SMALL).astype(int)
    full = Sdxl(load(minis)).generate(PROMPT, NEGATIVE, seed=1, **SMALL).astype(int)
    assert np.abs(half - full).max() > 0
    assert np.abs(half - full).mean() < 2


def test_loading_reaches_for_no_network_and_prints_nothing(minis, monkeypatch, capfd):
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    Sdxl(load(minis)).generate(PROMPT, NEGATIVE, seed=1, **SMALL)
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
            sdxl.load(path, config, dtype=torch.float32, device="cpu")
    with pytest.raises(SdxlError, match=r"gone\.safetensors"):
        sdxl.load(tmp_path / "gone.safetensors", config, dtype=torch.float32, device="cpu")
    with pytest.raises(SdxlError, match="no diffusers folder"):
        sdxl.load(minis / mini_sdxl.NAME, tmp_path / "gone", dtype=torch.float32, device="cpu")


# -- prompts -----------------------------------------------------------------------------------------------------------


def words(count: int) -> str:
    """A text of that many tokens in the miniature's vocabulary."""
    known = ("woman", "man", "red", "dress", "smile", "street", "light")
    return " ".join(known[i * i % len(known)] for i in range(count))


def by_hand(pipeline: Any, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunk by chunk, encoder by encoder, each chunk alone."""
    states, pooled = [], None
    with torch.no_grad():
        all_ids = [t(text, add_special_tokens=False).input_ids for t in (pipeline.tokenizer, pipeline.tokenizer_2)]
        for start in range(0, len(all_ids[0]), 75):
            both = []
            for ids, tokenizer, encoder in zip(
                all_ids,
                (pipeline.tokenizer, pipeline.tokenizer_2),
                (pipeline.text_encoder, pipeline.text_encoder_2),
                strict=True,
            ):
                row = [tokenizer.bos_token_id, *ids[start : start + 75], tokenizer.eos_token_id]
                row += [tokenizer.pad_token_id] * (77 - len(row))
                output = encoder(torch.tensor([row]), output_hidden_states=True)
                both.append(output.hidden_states[-2])
                if pooled is None and encoder is pipeline.text_encoder_2:
                    pooled = output.text_embeds
            states.append(torch.cat(both, dim=-1))
    return torch.cat(states, dim=1), pooled


@pytest.mark.parametrize(("tokens", "chunks"), [(1, 1), (75, 1), (76, 2), (150, 2), (300, 4)])
def test_long_prompts_are_encoded_in_chunks(pipeline, model, tokens, chunks):
    text = words(tokens)
    assert len(pipeline.tokenizer(text, add_special_tokens=False).input_ids) == tokens
    states, pooled = by_hand(pipeline, text)
    made = model.encode(text)
    assert made.states.shape == (1, 77 * chunks, 80)
    torch.testing.assert_close(made.states, states, atol=1e-5, rtol=0)
    torch.testing.assert_close(made.pooled, pooled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("text", ["", PROMPT, words(75)])
def test_short_prompts_are_those_of_the_stock_pipeline(pipeline, model, text):
    states, _, pooled, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False)
    made = model.encode(text)
    torch.testing.assert_close(made.states, states, atol=1e-6, rtol=0)
    torch.testing.assert_close(made.pooled, pooled, atol=1e-6, rtol=0)


def test_the_tokenizers_pad_as_sdxls_do(pipeline):
    first, second = (sdxl._token_rows(t, "man") for t in (pipeline.tokenizer, pipeline.tokenizer_2))
    end = pipeline.tokenizer.eos_token_id
    assert first[0, 2:].tolist() == [end] * 75
    assert second[0, 2:].tolist() == [end] + [0] * 74


def test_the_shorter_text_is_filled_up_with_empty_chunks(pipeline, model):
    long, short, empty = (by_hand(pipeline, text)[0] for text in (words(160), NEGATIVE, "man"))
    empty = model.encode("").states
    for texts, expected in (
        ((NEGATIVE, words(160)), (torch.cat([short, empty, empty], 1), long)),
        ((words(160), NEGATIVE), (long, torch.cat([short, empty, empty], 1))),
    ):
        made = model._conditions([model.encode(text) for text in texts], 32, 48)
        torch.testing.assert_close(made["encoder_hidden_states"], torch.cat(expected), atol=1e-5, rtol=0)
        assert made["added_cond_kwargs"]["time_ids"].tolist() == [[32, 48, 0, 0, 32, 48]] * 2


def test_the_negative_prompt_is_encoded_once(pipeline):
    model, calls = Sdxl(pipeline), []
    hook = pipeline.text_encoder_2.register_forward_pre_hook(lambda *_: calls.append(1))
    for prompt in ("a man", "a woman", "a person"):
        model.generate(prompt, NEGATIVE, seed=1, **SMALL)
    hook.remove()
    assert len(calls) == 1 + 3


# -- the sampler -------------------------------------------------------------------------------------------------------


def karras(steps: int, low: float, high: float) -> list[float]:
    """Karras et al., eq. 5, with ρ = 7, then zero."""
    ramp = np.linspace(0, 1, steps)
    return [*((high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7), 0.0]


@pytest.mark.parametrize("steps", [4, 20])
def test_the_schedule_is_karras_from_the_models_own_sigmas(pipeline, steps):
    pipeline.scheduler.set_timesteps(steps)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = np.cumprod(1 - betas)
    sigmas = ((1 - alphas) / alphas) ** 0.5
    assert pipeline.scheduler.sigmas.tolist() == pytest.approx(karras(steps, sigmas[0], sigmas[-1]), rel=1e-3)
    nearest = [np.abs(np.log(sigmas) - math.log(s)).argmin() for s in karras(steps, sigmas[0], sigmas[-1])[:-1]]
    assert np.abs(pipeline.scheduler.timesteps.numpy() - nearest).max() <= 1


@pytest.mark.parametrize("steps", [4, 20])
@torch.no_grad()
def test_the_steps_are_dpm_plus_plus_2m(model, steps):
    """The method written out in σ, x = noise · √(1 + σ²) at the start, first order in the last step."""
    conditions = model._conditions([model.encode(NEGATIVE), model.encode(PROMPT)], 32, 48)
    noise = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    made = model._denoise(noise, conditions, steps, 5.0)
    sigmas, timesteps = model.pipeline.scheduler.sigmas.double().tolist(), model.pipeline.scheduler.timesteps
    x, before = noise.double() * (1 + sigmas[0] ** 2) ** 0.5, None
    for i in range(steps):
        sigma, following = sigmas[i], sigmas[i + 1]
        scaled = (x / (1 + sigma**2) ** 0.5).float().expand(2, -1, -1, -1)
        uncond, cond = model.unet(scaled, timesteps[i], **conditions).sample.double().chunk(2)
        denoised = x - sigma * (uncond + 5.0 * (cond - uncond))
        if following == 0:
            x = denoised
        else:
            h = math.log(sigma / following)
            mixed = denoised
            if before is not None:
                r = math.log(sigmas[i - 1] / sigma) / h
                mixed = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * before
            x = following / sigma * x - math.expm1(-h) * mixed
        before = denoised
    torch.testing.assert_close(made, x.float(), atol=1e-3, rtol=1e-3)


def test_it_is_the_stock_pipeline_with_the_same_settings(pipeline, model):
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        height=32,
        width=48,
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).images[0]
    ours = model.generate(PROMPT, NEGATIVE, seed=7, **SMALL)
    assert ours.dtype == np.uint8
    assert ours.shape == (32, 48, 3)
    assert np.abs(ours.astype(int) - (stock * 255).round().astype(int)).max() <= 1


# -- the picture -------------------------------------------------------------------------------------------------------


def test_everything_that_should_matter_does(model):
    def make(prompt=PROMPT, negative=NEGATIVE, seed=1, **changes):
        return model.generate(prompt, negative, seed=seed, **(SMALL | changes))

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
    one = model.generate(PROMPT, NEGATIVE, seed=1, **(SMALL | {"guidance": 1.0}))
    other = model.generate(PROMPT, "grey", seed=1, **(SMALL | {"guidance": 1.0}))
    hook.remove()
    assert sizes == [1] * 6
    assert np.array_equal(one, other)


def test_global_random_state_is_neither_read_nor_changed(model):
    torch.manual_seed(1)
    one = model.generate(PROMPT, NEGATIVE, seed=7, **SMALL)
    state = torch.get_rng_state()
    assert np.array_equal(one, model.generate(PROMPT, NEGATIVE, seed=7, **SMALL))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("change", [{"height": 36}, {"width": 44}])
def test_sizes_off_the_grid_are_refused(model, change):
    with pytest.raises(SdxlError, match="multiples of 8"):
        model.generate(PROMPT, NEGATIVE, seed=1, **(SMALL | change))


def test_a_single_step_and_an_odd_size_are_possible(model):
    assert model.generate(PROMPT, NEGATIVE, seed=1, height=40, width=56, steps=1, guidance=5.0).shape == (40, 56, 3)


def test_nan_is_an_error_not_a_black_picture(minis):
    pipeline = load(minis)
    with torch.no_grad():
        pipeline.unet.conv_out.bias[0] = torch.nan
    with pytest.raises(SdxlError, match="NaN"):
        Sdxl(pipeline).generate(PROMPT, NEGATIVE, seed=1, **SMALL)


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


def test_the_scheduler_keeps_the_checkpoints_own_prediction(minis, tmp_path):
    folder = tmp_path / "config"
    shutil.copytree(minis / mini_sdxl.CONFIG_NAME, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    pipeline = sdxl.load(minis / mini_sdxl.NAME, folder, dtype=torch.float32, device="cpu")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
