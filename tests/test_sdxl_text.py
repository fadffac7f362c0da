"""SDXL's prompts: chunks, weights, and what is encoded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sdxl_minis import NEGATIVE, PROMPT, SMALL, drawn, load_pipeline, make_minis, words

from ipvg_ray.models import sdxl_text
from ipvg_ray.models.sdxl import DrawSettings, Request, Sdxl


@pytest.fixture(scope="module")
def minis(tmp_path_factory) -> Path:
    return make_minis(tmp_path_factory.mktemp("minis"))


@pytest.fixture(scope="module")
def pipeline(minis) -> Any:
    return load_pipeline(minis)


@pytest.fixture(scope="module")
def model(pipeline) -> Sdxl:
    return Sdxl(pipeline)


# -- prompts -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("text", ["", PROMPT, words(75), "A Woman,smiling;  in\n(\tRED dress", "don't - 1,234"])
def test_short_prompts_are_those_of_the_stock_pipeline(pipeline, model, text):
    states, _, pooled, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False)
    made = model.encode(text)
    torch.testing.assert_close(made.states, states, atol=1e-6, rtol=0)
    torch.testing.assert_close(made.pooled, pooled, atol=1e-6, rtol=0)


def test_the_tokenizers_pad_as_sdxls_do(pipeline):
    first, second = (sdxl_text.chunks(t, "man").ids for t in (pipeline.tokenizer, pipeline.tokenizer_2))
    end = pipeline.tokenizer.eos_token_id
    assert first[0, 2:].tolist() == [end] * 75
    assert second[0, 2:].tolist() == [end] + [0] * 74


def test_short_words_are_not_cut_at_a_chunks_end_and_long_ones_are(pipeline):
    """As ComfyUI packs them: fewer than eight tokens move to the next chunk whole."""
    tokenizer = pipeline.tokenizer
    short, long = "zqxj", "zqxjzqxjzqxjzqxj"
    sizes = [len(tokenizer(word, add_special_tokens=False).input_ids) for word in (short, long)]
    assert sizes[0] == 4 < 8 <= sizes[1] < 75
    end = tokenizer.eos_token_id
    first, second = sdxl_text.chunks(tokenizer, f"{words(73)} {short}").ids.tolist()
    assert first[74:] == [end] * 3
    assert second[5:] == [end] * 72
    first, second = sdxl_text.chunks(tokenizer, f"{words(73)} {long}").ids.tolist()
    assert end not in first[:76]
    assert second.index(end) == 1 + sizes[1] - 2


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_clip_skip_chooses_the_layer(pipeline, skip):
    states = Sdxl(pipeline, clip_skip=skip).encode(PROMPT).states
    ids = sdxl_text.chunks(pipeline.tokenizer, PROMPT).ids
    with torch.no_grad():
        expected = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states[-skip]
    torch.testing.assert_close(states[..., : expected.shape[-1]], expected, atol=1e-6, rtol=0)


def test_the_negative_prompt_is_encoded_once(pipeline):
    model, calls = Sdxl(pipeline), []
    hook = pipeline.text_encoder_2.register_forward_pre_hook(lambda *_: calls.append(1))
    for prompt in ("a man", "a woman", "a person", "a man"):
        drawn(model, prompt, steps=1)
    hook.remove()
    assert len(calls) == 1 + 3


# -- batches of prompts ------------------------------------------------------------------------------------------------


def test_a_long_neighbour_changes_no_picture(model):
    """Shorter texts are filled up and masked: what fills them must not be read."""
    settings = DrawSettings(**SMALL, negative_prompt=NEGATIVE)
    alone = drawn(model, "a man", seed=3).astype(int)
    beside = model.draw([Request(words(160), 1), Request("a man", 3), Request(words(230), 2)], settings)[1]
    assert np.abs(alone - beside).max() <= 1
    assert np.abs(drawn(model, f"a man {words(74)}", seed=3).astype(int) - alone).max() > 5


def test_times_and_lengths_of_a_batch(model):
    settings = DrawSettings(**SMALL, negative_prompt=NEGATIVE)
    requests = [Request(words(160), 1), Request("man", 2)]
    conditions = model._conditions(requests, settings).unet
    assert conditions["encoder_hidden_states"].shape[:2] == (4, 231)
    assert conditions["encoder_attention_mask"].sum(1).tolist() == [77, 77, 231, 77]
    assert conditions["added_cond_kwargs"]["time_ids"].tolist() == [[32, 48, 0, 0, 32, 48]] * 4
    same = model._conditions([Request("a man", 1), Request("man", 2)], settings).unet
    assert same["encoder_attention_mask"] is None


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a man", [("a man", 1.0)]),
        ("a (red dress:1.3), smiling", [("a ", 1.0), ("red dress", 1.3), (", smiling", 1.0)]),
        ("(red) ((hat))", [("red", 1.1), (" ", 1.0), ("hat", 1.1 * 1.1)]),
        ("(a (b:1.2) c:1.5)", [("a ", 1.5), ("b", 1.2), (" c", 1.5)]),
        ("(a: b)", [("a: b", 1.1)]),
        ("(dark:.5) (warm: 0.8 )", [("dark", 0.5), (" ", 1.0), ("warm", 0.8)]),
        (r"a \(red\) hat", [("a (red) hat", 1.0)]),
        ("open ( and ) (", [("open ", 1.0), (" and ", 1.1), (" (", 1.0)]),
        (") a (b", [(") a (b", 1.0)]),
        ("", []),
    ],
)
def test_brackets_give_weights(text, parts):
    found = sdxl_text.weighted_parts(text)
    assert [part for part, _ in found] == [part for part, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])


def token_weights(pipeline: Any, text: str) -> list[float]:
    chunks = sdxl_text.chunks(pipeline.tokenizer, text)
    end = chunks.ids[0].tolist().index(pipeline.tokenizer.eos_token_id)
    assert chunks.weights[0, 0] == 1
    assert (chunks.weights[0, end:] == 1).all()
    return chunks.weights[0, 1:end].tolist()


def test_weights_are_normalised_by_length_and_mean(pipeline):
    """Of "a", "red" and "dress," only the last has two tokens: its distance from 1 is divided by √2, then all are
    shifted until the mean over the four tokens is 1."""
    far = 0.3 / 2**0.5
    mean = (1 + 1.3 + 2 * (1 + far)) / 4
    expected = [1 + 1 - mean, 1.3 + 1 - mean, *[1 + far + 1 - mean] * 2]
    made = token_weights(pipeline, "a (red dress,:1.3)")
    assert made == pytest.approx(expected)
    assert sum(made) / 4 == pytest.approx(1)
    assert token_weights(pipeline, "(a red dress:1.3)") == pytest.approx([1, 1, 1])


@torch.no_grad()
def test_a_weight_changes_only_what_it_should(pipeline, model):
    """Each token's states are those of the plain prompt times its weight, all times one number that keeps the mean;
    the pooled text is the plain one."""
    plain, weighted = model.encode("a woman in a red dress"), model.encode("a woman in a (red dress:1.3)")
    assert torch.equal(plain.pooled, weighted.pooled)
    weights = torch.ones(77)
    weights[1:7] = torch.tensor(token_weights(pipeline, "a woman in a (red dress:1.3)"))
    assert weights[5:7].tolist() == pytest.approx([1.2, 1.2])
    assert weights[1:5].tolist() == pytest.approx([0.9] * 4)
    for part in (slice(0, 32), slice(32, 80)):  # encoder by encoder
        base, made = plain.states[0, :, part], weighted.states[0, :, part]
        scaled = base * weights[:, None]
        torch.testing.assert_close(made, scaled * (base.mean() / scaled.mean()), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(made.mean(), base.mean(), atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_a_weight_of_one_changes_nothing(model):
    for text in ("a woman in a (red dress:1)", "a (woman:1.0) in a red dress"):
        assert torch.equal(model.encode(text).states, model.encode("a woman in a red dress").states)
    assert not torch.equal(
        model.encode("a woman in a (red dress)").states, model.encode("a woman in a red dress").states
    )


def test_weights_reach_over_chunks(pipeline):
    text = f"{words(74)} (red hat coat:1.4)"
    chunks = sdxl_text.chunks(pipeline.tokenizer, text)
    assert chunks.ids.shape == (2, 77)
    light, heavy = 1 - 3 * 0.4 / 77, 1.4 - 3 * 0.4 / 77
    assert chunks.weights[0, 1:76].tolist() == pytest.approx([light] * 74 + [heavy])
    assert chunks.weights[1, 1:3].tolist() == pytest.approx([heavy] * 2)
    assert (chunks.weights[1, 3:] == 1).all()
