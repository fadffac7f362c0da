"""Noise levels and samplers: ComfyUI's, and the stock pipeline's where they agree."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sdxl_minis import NEGATIVE, PROMPT, SMALL, drawn, load_pipeline, make_minis

from ipvg_ray.models.sdxl import DrawSettings, Request, Sdxl
from ipvg_ray.models.sdxl_sampler import Noise, sample


@pytest.fixture(scope="module")
def minis(tmp_path_factory) -> Path:
    return make_minis(tmp_path_factory.mktemp("minis"))


@pytest.fixture(scope="module")
def pipeline(minis) -> Any:
    return load_pipeline(minis)


@pytest.fixture(scope="module")
def model(pipeline) -> Sdxl:
    return Sdxl(pipeline)


def karras(steps: int, low: float, high: float) -> list[float]:
    """Karras et al., eq. 5, with ρ = 7, then zero."""
    ramp = np.linspace(0, 1, steps)
    return [*((high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7), 0.0]


@pytest.fixture
def noise(pipeline) -> Noise:
    return Noise(pipeline.scheduler.config)


# -- noise levels ------------------------------------------------------------------------------------------------------


def test_the_levels_are_comfyuis(noise):
    """Its numbers for SDXL: highest 14.6146, lowest 0.0292."""
    assert (len(noise.sigmas), float(noise.sigmas[-1]), float(noise.sigmas[0])) == (
        1000,
        pytest.approx(14.614642, rel=1e-6),
        pytest.approx(0.029167158, rel=1e-6),
    )


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_karras_spaces_them_from_the_first_to_zero(noise, steps):
    made = noise.levels("karras", steps)
    assert len(made) == steps + 1
    assert made == pytest.approx(karras(steps, 0.029167158, 14.614642), rel=1e-6)
    assert made[0] == pytest.approx(14.614642)
    assert made[-1] == 0


def test_other_spacings(noise):
    exponential, normal = noise.levels("exponential", 5), noise.levels("normal", 5)
    ratios = [b / a for a, b in pairwise(exponential[:-1])]
    assert ratios == pytest.approx([ratios[0]] * 4)
    places = [noise.timestep(sigma) for sigma in normal[:-1]]
    assert places == pytest.approx([999, 749.25, 499.5, 249.75, 0], abs=1)
    assert exponential[-1] == normal[-1] == 0


@pytest.mark.parametrize(("steps", "denoise", "total"), [(10, 0.5, 20), (10, 0.4, 25), (3, 0.7, 4), (4, 1.0, 4)])
def test_part_of_the_noise_is_the_last_steps_of_a_longer_schedule(noise, steps, denoise, total):
    assert noise.levels("karras", steps, denoise) == noise.levels("karras", total)[-(steps + 1) :]


def test_a_level_has_the_training_step_nearest_by_ratio(noise):
    sigmas = noise.sigmas.numpy()
    for sigma in noise.levels("karras", 20)[:-1]:
        assert noise.timestep(sigma) == np.abs(np.log(sigmas) - math.log(sigma)).argmin()


def test_what_sdxl_checkpoints_do_not_have_is_refused(pipeline):
    settings = dict(pipeline.scheduler.config)
    for field, value in (("prediction_type", "sample"), ("beta_schedule", "squaredcos_cap_v2")):
        with pytest.raises(ValueError, match=value):
            Noise(settings | {field: value})
    linear = Noise(settings | {"beta_schedule": "linear"}).sigmas
    trained = Noise(settings | {"trained_betas": np.linspace(0.00085, 0.012, 1000).tolist()}).sigmas
    torch.testing.assert_close(linear, trained)


# -- samplers ----------------------------------------------------------------------------------------------------------


def error(name: str, steps: int) -> float:
    """Distance from the exact path where the data is normal: x keeps its quotient by √(1 + σ²)."""
    sigmas = torch.logspace(1, -1, steps + 1, dtype=torch.float64).tolist()
    x = torch.full((1,), (1 + sigmas[0] ** 2) ** 0.5, dtype=torch.float64)
    made = sample(name, lambda x, sigma: x / (1 + sigma**2), x, sigmas)
    return abs(float(made) - (1 + sigmas[-1] ** 2) ** 0.5)


def test_dpm_plus_plus_2m_is_of_second_order_and_euler_of_first():
    assert 1.8 < error("euler", 40) / error("euler", 80) < 2.2
    assert 3.5 < error("dpmpp_2m", 40) / error("dpmpp_2m", 80) < 4.5
    assert error("dpmpp_2m", 80) < error("euler", 80) / 10


@pytest.mark.parametrize("steps", [1, 2, 4, 20])
@torch.no_grad()
def test_the_loop_is_dpm_plus_plus_2m_with_guidance(model, noise, steps):
    """The whole loop written out, network calls and guidance included, at double precision outside the network."""
    settings = DrawSettings(**(SMALL | {"steps": steps}), negative_prompt=NEGATIVE)
    decoded = []
    kept, model._decode = model._decode, lambda latents: decoded.append(latents) or []
    try:
        model.draw([Request(PROMPT, 5)], settings)
    finally:
        model._decode = kept
    conditions = model._conditions([Request(PROMPT, 5)], settings).unet
    sigmas = karras(steps, 0.029167158, 14.614642)
    x = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(5)).double() * (1 + sigmas[0] ** 2) ** 0.5
    before = None
    for i in range(steps):
        sigma, following = sigmas[i], sigmas[i + 1]
        scaled = (x / (1 + sigma**2) ** 0.5).float().expand(2, -1, -1, -1)
        step = torch.tensor(noise.timestep(sigma))
        uncond, cond = model.unet(scaled, step, **conditions).sample.double().chunk(2)
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
    torch.testing.assert_close(decoded[0], x.float(), atol=1e-3, rtol=1e-3)


def test_it_is_the_stock_pipeline_where_that_rounds_to_the_same_training_steps(pipeline, model, noise, monkeypatch):
    from diffusers import DPMSolverMultistepScheduler

    pipeline.set_progress_bar_config(disable=True)
    stock = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++", use_karras_sigmas=True, final_sigmas_type="zero"
    )
    stock.set_timesteps(3)
    assert stock.sigmas.tolist() == pytest.approx(noise.levels("karras", 3), rel=1e-3)
    theirs = stock.timesteps.tolist()
    assert max(abs(a - noise.timestep(b)) for a, b in zip(theirs, noise.levels("karras", 3), strict=False)) <= 1
    pipeline.scheduler, kept = stock, pipeline.scheduler
    try:
        picture = pipeline(
            PROMPT,
            negative_prompt=NEGATIVE,
            height=32,
            width=48,
            num_inference_steps=3,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(7),
            output_type="np",
        ).images[0]
    finally:
        pipeline.scheduler = kept
    order = iter(theirs)
    monkeypatch.setattr(model.noise, "timestep", lambda sigma: next(order))
    ours = drawn(model, seed=7)
    assert np.abs(ours.astype(int) - (picture * 255).round().astype(int)).max() <= 1


@torch.no_grad()
def test_v_prediction_is_the_same_data_in_other_words(pipeline):
    """v = α·noise − s·data of latents scaled to variance 1, α = 1/√(1 + σ²), s = σ/√(1 + σ²)."""
    settings = dict(pipeline.scheduler.config)
    data, made = torch.randn(2, 1, 4, 4, 6)
    for sigma in (0.05, 1.0, 14.0):
        x = data + sigma * made
        v = (made - sigma * data) / (1 + sigma**2) ** 0.5
        by_v = Noise(settings | {"prediction_type": "v_prediction"}).data(x, v, sigma)
        torch.testing.assert_close(by_v, data, atol=1e-4, rtol=0)
        torch.testing.assert_close(Noise(settings).data(x, made, sigma), data, atol=1e-4, rtol=0)
