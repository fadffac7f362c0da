"""The denoising loop: equal to diffusers' pipelines on the miniature of every task, whatever way it is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from wan_minis import FOLDERS, SIZE, encoder, model, picture, sample, stock

from ipvg_ray.models.mini import wan_vace
from ipvg_ray.models.wan.errors import WanError
from ipvg_ray.models.wan.guidance import Cfg, Step, Tpige, Window
from ipvg_ray.models.wan.loop import Denoiser, LoopState, evaluate_in_turn, evaluate_together, skipping
from ipvg_ray.models.wan.tasks import TASKS
from ipvg_ray.models.wan.text import padded

STEPS = 6
PROMPT, NEGATIVE = "a woman smiles", "blurred"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    wan_vace.make(root)
    return root


@pytest.fixture(scope="module")
def pipelines(root: Path) -> dict[str, Any]:
    return {task: stock(root, task) for task in TASKS}


@pytest.fixture(scope="module")
def texts(pipelines: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    ours = encoder(pipelines["vace-i2v"])
    return ours.states(PROMPT), ours.states(NEGATIVE)


def stock_latents(pipeline: Any, task: str, seed: int = 7) -> torch.Tensor:
    """What the pipeline itself makes, from the prompts' words."""
    first = picture()
    inputs: dict[str, Any] = {}
    if not task.startswith("vace"):
        inputs["image"] = Image.fromarray(first)
        if task == "i2v-A14B":
            inputs["guidance_scale_2"] = 3.0
    elif TASKS[task].first_frame:
        inputs["video"] = np.full((1, SIZE.frames, SIZE.height, SIZE.width, 3), 0.5, np.float32)
        inputs["video"][0, 0] = first / np.float32(255)
        inputs["mask"] = np.ones((1, SIZE.frames, SIZE.height, SIZE.width, 1), np.float32)
        inputs["mask"][0, 0] = 0
    if TASKS[task].reference:
        inputs["reference_images"] = [Image.fromarray(picture(48, 40))]
    result: torch.Tensor = pipeline(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=SIZE.height,
        width=SIZE.width,
        num_frames=SIZE.frames,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(seed),
        max_sequence_length=512,
        output_type="latent",
        **inputs,
    ).frames
    return result


@pytest.mark.parametrize("evaluate", [evaluate_in_turn, evaluate_together])
@pytest.mark.parametrize("task", TASKS)
def test_cfg_is_the_stock_pipeline(task: str, evaluate: Any, root: Path, pipelines: Any, texts: Any) -> None:
    ours = model(root, task, evaluate=evaluate)
    latents = ours.denoise([sample(task, texts[0])], texts[1], SIZE, Cfg(5.0, 3.0), STEPS)
    expected = stock_latents(pipelines[task], task)[:, :, ours.conditions.references :]
    assert latents.shape == expected.shape
    assert expected.std() > 0.1
    assert (latents - expected).abs().max() < 1e-5


def test_both_experts_of_a14b_work_on_their_side_of_the_boundary(root: Path, texts: Any) -> None:
    ours = model(root, "i2v-A14B")
    calls: list[tuple[int, float]] = []
    for number, transformer in enumerate(ours.denoiser.transformers):
        transformer.register_forward_pre_hook(
            lambda module, args, kwargs, n=number: calls.append((n, float(kwargs["timestep"][0]))), with_kwargs=True
        )
    ours.denoise([sample("i2v-A14B", texts[0])], texts[1], SIZE, Cfg(5.0), STEPS)
    assert {n for n, _ in calls} == {0, 1}
    assert all((t < 900) == bool(n) for n, t in calls)


@pytest.mark.parametrize("task", ["vace-i2v+ref", "ti2v-5B", "i2v-A14B"])
def test_a_batch_is_its_samples_alone(task: str, root: Path, texts: Any) -> None:
    ours = model(root, task)
    samples = [sample(task, texts[0]), sample(task, texts[1], seed=8, flip=True)]
    together = ours.denoise(samples, texts[1], SIZE, Cfg(5.0), STEPS)
    alone = torch.cat([ours.denoise([one], texts[1], SIZE, Cfg(5.0), STEPS) for one in samples])
    assert (together - alone).abs().max() < 1e-4
    assert (alone[0] - alone[1]).abs().max() > 0.1


@pytest.mark.parametrize("guidance", [Cfg(5.0), Tpige(Cfg(5.0))])
def test_going_on_from_any_step_is_bitwise_the_same(guidance: Any, root: Path, texts: Any) -> None:
    ours = model(root, "vace-i2v")
    states: list[LoopState] = []
    job: Any = ([sample("vace-i2v", texts[0])], texts[1], SIZE, guidance, STEPS)
    whole = ours.denoise(*job, on_step=lambda step, state: states.append(state))
    assert [state.done for state in states] == [1, 2, 3, 4, 5, 6]
    for state in (states[0], states[3], states[5]):
        again: list[Step] = []
        assert torch.equal(ours.denoise(*job, start=state, on_step=lambda step, _, a=again: a.append(step)), whole)
        assert len(again) == STEPS - state.done


def test_guidance_of_one_and_closed_windows_skip_the_second_forward(root: Path, texts: Any) -> None:
    ours = model(root, "vace-i2v")
    calls: list[int] = []
    ours.denoiser.transformers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for guidance, forwards in (
        (Cfg(1.0), 4),
        (Cfg(5.0), 8),
        (Cfg(5.0, window=Window(0.0, 0.5)), 6),
        (Tpige(Cfg(5.0)), 12),
        (Tpige(Cfg(5.0), window=Window(0.5, 1.0)), 10),
        (Tpige(Cfg(5.0), scale=0.0), 8),
    ):
        calls.clear()
        ours.denoise([sample("vace-i2v", texts[0])], texts[1], SIZE, guidance, 4)
        assert len(calls) == forwards, guidance


# -- TPIGE -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["vace-i2v", "vace-r2v", "vace-i2v+ref"])
@pytest.mark.parametrize("mode", ["release", "paper"])
@torch.no_grad()
def test_tpige_is_its_formula_with_forwards_made_apart(task: str, mode: Any, root: Path, texts: Any) -> None:
    """By hand: a second copy of the network whose block 2 is the identity and whose hint there has scale 0."""
    ours, hand = model(root, task), model(root, task).denoiser.transformers[0]
    weak = model(root, task).denoiser.transformers[0]
    weak.blocks[2].forward = lambda hidden_states, *rest: hidden_states
    vae = ours.autoencoder
    inputs = ours.inputs([sample(task, texts[0])], texts[1], SIZE, without=True)
    control: torch.Tensor = inputs.condition.control  # type: ignore[attr-defined]
    frames = (SIZE.frames - 1) // 4 + 1
    grey = vae.encode(torch.zeros(1, 3, SIZE.frames, SIZE.height, SIZE.width))
    bare = torch.cat([grey, grey, torch.ones(1, 64, *grey.shape[2:])], 1)
    assert bare.shape[2] == frames
    assert control.shape[2] == frames + TASKS[task].reference, "the weak branch's control is short by the reference"
    states = [padded(text).unsqueeze(0) for text in texts]

    def forward(network: Any, x: torch.Tensor, t: torch.Tensor, text: int, given: torch.Tensor, scales: Any) -> Any:
        return network(x, t.expand(1), states[text], None, given, torch.tensor(scales), return_dict=False)[0]

    scheduler = ours.denoiser.scheduler()
    scheduler.set_timesteps(4)
    seen: list[torch.Tensor] = []
    ours.denoise(
        [sample(task, texts[0])], texts[1], SIZE, Tpige(Cfg(5.0), 0.5, mode), 4,
        on_step=lambda step, state: seen.append(state.latents),
    )  # fmt: skip
    x = inputs.noise
    for number, t in enumerate(scheduler.timesteps):
        conditional = forward(hand, x, t, 0, control, [1.0, 1.0])
        unconditional = forward(hand, x, t, 1, control, [1.0, 1.0])
        v = unconditional + 5.0 * (conditional - unconditional)
        if mode == "release":
            v = 1.5 * v - 0.5 * forward(weak, x, t, 0, bare, [1.0, 0.0])
        else:
            v = v + 0.5 * (conditional - forward(weak, x, t, 1, control, [1.0, 0.0]))
        x = scheduler.step(v, t, x, return_dict=False)[0]
        assert (seen[number] - x).abs().max() < 1e-5, f"step {number}"


def test_branches_whose_controls_differ_in_length_can_be_asked_for_together(root: Path, texts: Any) -> None:
    """No block is skipped, and the weak branch's control lacks the reference's frame."""
    job: Any = ([sample("vace-r2v", texts[0])], texts[1], SIZE, Tpige(Cfg(5.0), skip=()), 2)
    in_turn, together = (
        model(root, "vace-r2v", evaluate=way).denoise(*job) for way in (evaluate_in_turn, evaluate_together)
    )
    assert (together - in_turn).abs().max() < 1e-5


def test_tpige_needs_vace(root: Path, texts: Any) -> None:
    with pytest.raises(ValueError, match="only VACE"):
        model(root, "ti2v-5B").denoise([sample("ti2v-5B", texts[0])], texts[1], SIZE, Tpige(Cfg(5.0)), 2)


def test_skipped_blocks_come_back_even_after_an_error(root: Path) -> None:
    transformer = model(root, "vace-i2v").denoiser.transformers[0]
    before = list(transformer.blocks)
    changed: list[bool] = []

    def fail() -> None:
        with skipping(transformer, (1, 2)):
            changed.extend(a is not b for a, b in zip(before, transformer.blocks, strict=True))
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert changed == [False, True, True, False]
    with pytest.raises(WanError, match="no block 4"), skipping(transformer, (4,)):
        pass
    assert all(a is b for a, b in zip(before, transformer.blocks, strict=True))


def test_two_transformers_without_boundary_are_refused() -> None:
    with pytest.raises(ValueError, match="boundary"):
        Denoiser([object(), object()], lambda: None)


# -- text and frames -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_text_states_are_the_pipelines_without_their_padding(pipelines: Any) -> None:
    pipeline = pipelines["vace-i2v"]
    for text in (PROMPT, "  A man &amp; a  dog ", "smiles " * 600):
        expected, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=512)
        states = encoder(pipeline).states(text)
        assert len(states) == min(len(pipeline.tokenizer(text.strip()).input_ids), 512) or "&" in text
        assert torch.equal(padded(states), expected[0])


def test_a_cut_prompt_is_said(pipelines: Any, caplog: pytest.LogCaptureFixture) -> None:
    ours = encoder(pipelines["vace-i2v"])
    ours.states(PROMPT)
    assert not caplog.records
    ours.states("smiles " * 600)
    assert "cut to 512" in caplog.text


def test_the_same_text_is_encoded_once(pipelines: Any) -> None:
    ours, calls = encoder(pipelines["vace-i2v"]), []
    hook = ours.model.register_forward_pre_hook(lambda *_: calls.append(1))
    for text in ("a", "b", "a", "b", "b"):
        ours.states(text)
    hook.remove()
    assert len(calls) == 2


@pytest.mark.parametrize("task", FOLDERS)
def test_frames_are_the_pipelines(task: str, root: Path, pipelines: Any, texts: Any) -> None:
    pipeline, ours = pipelines[task], model(root, task)
    latents = stock_latents(pipeline, task)[:, :, ours.conditions.references :]
    mean = torch.tensor(pipeline.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(pipeline.vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        video = pipeline.vae.decode(latents * std + mean, return_dict=False)[0]
    expected = pipeline.video_processor.postprocess_video(video, output_type="np")[0]
    frames = ours.decode(latents)
    assert frames.shape == (SIZE.frames, SIZE.height, SIZE.width, 3)
    assert frames.dtype == np.uint8
    assert np.abs(frames - expected * 255).max() <= 0.51
