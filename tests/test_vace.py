"""Wan VACE: the condition, the loading rules and the generator, on the miniature."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ipvg_ray.models import vace
from ipvg_ray.models.mini import wan_vace

SMALL = {"frames": 5, "height": 32, "width": 48, "steps": 2, "guidance": 5.0}


def picture(height: int = 32, width: int = 48, flip: bool = False) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    array = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (height + width)], -1).astype(np.uint8)
    return np.ascontiguousarray(array[::-1, ::-1]) if flip else array


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    wan_vace.make(root)
    return root / wan_vace.NAME


@pytest.fixture(scope="module")
def pipeline(folder):
    return vace.load(folder, dtype=torch.float32, device="cpu", shift=16.0)


@pytest.fixture
def model(pipeline):
    return vace.FirstFrameToVideo(pipeline)


# -- the condition ---------------------------------------------------------------------------------------------------


def test_condition_is_the_first_frame_then_grey_and_keep_then_generate():
    first = picture()
    video, mask = vace.first_frame_condition(first, 5, 32, 48)
    assert (video.shape, video.dtype) == ((1, 5, 32, 48, 3), np.float32)
    assert (mask.shape, mask.dtype) == ((1, 5, 32, 48, 1), np.float32)
    assert np.array_equal((video[0, 0] * 255).round().astype(np.uint8), first)
    assert (video[0, 1:] == 0.5).all()
    assert (mask[0, 0] == 0).all()
    assert (mask[0, 1:] == 1).all()


def test_the_pipeline_reads_the_condition_exactly(pipeline):
    first = picture()
    video, mask, references = _preprocessed(pipeline, first)
    assert video.shape == (1, 3, 5, 32, 48)
    assert (video[:, :, 1:] == 0.0).all()
    expected = torch.from_numpy(first).permute(2, 0, 1).double() / 127.5 - 1
    assert (video[0, :, 0].double() - expected).abs().max() < 1e-6
    assert (mask[:, :, 0] == 0).all()
    assert (mask[:, :, 1:] == 1).all()
    assert references == [[]]


def test_what_the_transformer_gets_is_the_rule_computed_by_hand(model):
    """Channels: VAE(first frame, then grey), VAE(grey), 64 mask channels; latents as (z - mean) / std."""
    seen = []
    hook = model.pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["control_hidden_states"].clone()), with_kwargs=True
    )
    first = picture()
    model.generate(first, "a", "b", seed=1, **SMALL)
    hook.remove()
    assert len(seen) == 2 * SMALL["steps"]
    control = seen[0]
    assert control.shape == (1, 96, 2, 4, 6)
    assert all(torch.equal(control, other) for other in seen)

    inactive = torch.zeros(1, 3, 5, 32, 48)
    inactive[0, :, 0] = torch.from_numpy(first).permute(2, 0, 1).float() / 127.5 - 1
    vae = model.pipeline.vae
    assert (control[:, :16] - _latents(vae, inactive)).abs().max() < 1e-6
    assert (control[:, 16:32] - _latents(vae, torch.zeros_like(inactive))).abs().max() < 1e-6
    # Nearest-exact sampling over time takes frames 1 and 3 of 5: no latent frame counts as kept. Trained so.
    assert (control[:, 32:] == 1).all()
    assert (control[:, :16] - control[:, 16:32]).abs().max() > 1e-3


def _preprocessed(pipeline, first):
    video, mask = vace.first_frame_condition(first, 5, 32, 48)
    return pipeline.preprocess_conditions(video, mask, None, 1, 32, 48, 5, torch.float32, torch.device("cpu"))


@torch.no_grad()
def _latents(vae, video):
    mean, std = (
        torch.tensor(values).view(1, 16, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (vae.encode(video).latent_dist.mean - mean) / std


def test_a_first_frame_of_the_right_size_is_untouched():
    first = picture()
    assert vace.fit_frame(first, 32, 48) is first


def test_a_larger_frame_is_antialiased():
    stripes = np.zeros((320, 480, 3), np.uint8)
    stripes[:, ::2] = 255  # one-pixel stripes: sampling without a filter gives black or white
    assert np.abs(vace.fit_frame(stripes, 32, 48).astype(int) - 127).max() <= 8


def test_another_shape_is_cut_not_stretched():
    wide = np.zeros((40, 160, 3), np.uint8)
    wide[10:30, 70:90] = 255  # a square in the middle
    fitted = vace.fit_frame(wide, 80, 80) > 127
    rows, columns = np.nonzero(fitted[..., 0])
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (40, 40)
    assert (rows.min(), columns.min()) == (20, 20)


@pytest.mark.parametrize("first", [np.zeros((32, 48, 3)), np.zeros((32, 48), np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_arrays_that_are_no_picture_are_refused(first):
    with pytest.raises(vace.VaceError, match="first frame"):
        vace.first_frame_condition(first, 5, 32, 48)


# -- loading ---------------------------------------------------------------------------------------------------------


def test_the_checkpoints_own_shift_is_replaced(folder, pipeline):
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["flow_shift"] == 3.0
    pipeline.scheduler.set_timesteps(4)
    sigma = np.linspace(1, 1e-3, 5)[:-1]
    assert pipeline.scheduler.timesteps.tolist() == pytest.approx(1000 * 16 * sigma / (1 + 15 * sigma), abs=1)


def test_bfloat16_spares_what_must_stay_exact(folder):
    pipeline = vace.load(folder, dtype=torch.bfloat16, device="cpu", shift=16.0)
    transformer = pipeline.transformer
    assert transformer.blocks[0].ffn.net[0].proj.weight.dtype == torch.bfloat16
    assert transformer.vace_blocks[0].proj_out.weight.dtype == torch.bfloat16
    assert next(pipeline.text_encoder.parameters()).dtype == torch.bfloat16
    assert transformer.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert transformer.scale_shift_table.dtype == torch.float32
    assert transformer.blocks[0].norm2.weight.dtype == torch.float32
    assert {p.dtype for p in pipeline.vae.parameters()} == {torch.float32}
    result = vace.FirstFrameToVideo(pipeline).generate(picture(), "a", "b", seed=1, **SMALL)
    assert result.shape == (5, 32, 48, 3)


def test_folders_without_the_model_are_refused(tmp_path):
    with pytest.raises(vace.VaceError, match="no WanVACEPipeline"):
        vace.load(tmp_path, dtype=torch.float32, device="cpu", shift=16.0)
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(vace.VaceError, match="no WanVACEPipeline"):
        vace.load(tmp_path, dtype=torch.float32, device="cpu", shift=16.0)


def test_a_schedule_without_shift_is_refused(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_flow_sigmas": False}))
    with pytest.raises(vace.VaceError, match="shift"):
        vace.load(copy, dtype=torch.float32, device="cpu", shift=16.0)


def test_no_bars_are_drawn(folder, tmp_path, capfd):
    wan_vace.make(tmp_path)
    pipeline = vace.load(folder, dtype=torch.float32, device="cpu", shift=16.0)
    vace.FirstFrameToVideo(pipeline).generate(picture(), "a", "b", seed=1, **SMALL)
    printed = capfd.readouterr()
    assert "it/s" not in printed.err + printed.out
    assert "%|" not in printed.err + printed.out


# -- generating ------------------------------------------------------------------------------------------------------


def test_it_is_the_stock_pipeline_with_the_same_settings(model):
    first = picture()
    video, mask = vace.first_frame_condition(first, 5, 32, 48)
    stock = model.pipeline(
        video=video,
        mask=mask,
        prompt="a woman smiles",
        negative_prompt="blurred",
        height=32,
        width=48,
        num_frames=5,
        num_inference_steps=2,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).frames[0]
    ours = model.generate(first, "a woman smiles", "blurred", seed=7, **SMALL)
    assert ours.dtype == np.uint8
    assert np.array_equal(ours, (stock * 255).round().astype(np.uint8))


def test_everything_that_should_matter_does(model):
    def make(first=None, prompt="a woman smiles", negative="blurred", seed=7, **changes):
        return model.generate(picture() if first is None else first, prompt, negative, seed=seed, **(SMALL | changes))

    base = make()
    assert np.array_equal(base, make())
    assert not np.array_equal(base, make(picture(flip=True)))
    assert not np.array_equal(base, make(prompt="a man walks in the park"))
    assert not np.array_equal(base, make(negative="static, worst quality"))
    assert not np.array_equal(base, make(seed=8))
    assert not np.array_equal(base, make(guidance=3.0))
    assert not np.array_equal(base, make(steps=3))
    assert not np.array_equal(base, make(conditioning_scale=0.5))


def test_global_random_state_is_neither_read_nor_changed(model):
    torch.manual_seed(1)
    one = model.generate(picture(), "a", "b", seed=7, **SMALL)
    state = torch.get_rng_state()
    two = model.generate(picture(), "a", "b", seed=7, **SMALL)
    assert np.array_equal(one, two)
    assert torch.equal(state, torch.get_rng_state())


def test_the_negative_prompt_is_encoded_once(model):
    calls = []
    hook = model.pipeline.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    for prompt in ("a", "b", "c"):
        model.generate(picture(), prompt, "blurred", seed=1, **SMALL)
    hook.remove()
    assert len(calls) == 1 + 3


@pytest.mark.parametrize(("guidance", "forwards"), [(1.0, 2), (5.0, 4)])
def test_guidance_of_one_skips_the_second_forward(model, guidance, forwards):
    calls = []
    hook = model.pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    model.generate(picture(), "a", "b", seed=1, **(SMALL | {"guidance": guidance}))
    hook.remove()
    assert len(calls) == forwards


@pytest.mark.parametrize("change", [{"frames": 6}, {"height": 40}, {"width": 40}])
def test_sizes_off_the_grid_are_refused(model, change):
    with pytest.raises(vace.VaceError, match="multiples of 16"):
        model.generate(picture(), "a", "b", seed=1, **(SMALL | change))


def test_nan_is_an_error_not_a_black_video(folder):
    pipeline = vace.load(folder, dtype=torch.float32, device="cpu", shift=16.0)
    with torch.no_grad():
        pipeline.transformer.proj_out.bias[0] = torch.nan
    with pytest.raises(vace.VaceError, match="NaN"):
        vace.FirstFrameToVideo(pipeline).generate(picture(), "a", "b", seed=1, **SMALL)


def test_a_cut_prompt_is_said(model, caplog):
    model.generate(picture(), "a woman smiles", "b", seed=1, **SMALL)
    assert not caplog.records
    model.generate(picture(), "smiles " * 600, "b", seed=1, **SMALL)
    assert "cut to 512" in caplog.text


@pytest.mark.slow
def test_the_profile_size_is_the_same_twice_and_follows_its_first_frame(model):
    settings = {"frames": 17, "height": 96, "width": 176, "steps": 4, "guidance": 5.0}
    one, again, other = (
        model.generate(picture(96, 176, flip), "a woman smiles", "blurred", seed=3, **settings)
        for flip in (False, False, True)
    )
    assert one.shape == (17, 96, 176, 3)
    assert np.array_equal(one, again)
    assert np.abs(one.astype(int) - other).mean() > 0.5


# -- the miniature ---------------------------------------------------------------------------------------------------


def test_the_miniature_is_the_same_each_time(folder, tmp_path):
    state = torch.get_rng_state()
    wan_vace.make(tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert _digests(tmp_path / wan_vace.NAME) == _digests(folder)
    wan_vace.make(tmp_path / "other", seed=1)
    assert _digests(tmp_path / "other" / wan_vace.NAME) != _digests(folder)


def test_the_miniature_is_small_and_of_the_real_classes(folder):
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 5e6
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "WanVACETransformer3DModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKLWan"]
    assert index["text_encoder"] == ["transformers", "UMT5EncoderModel"]


def test_the_miniature_tokenizer_tells_prompts_apart(pipeline):
    ids = [pipeline.tokenizer(text).input_ids for text in ("A man smiles.", "A woman smiles.", "xyz 123")]
    assert len({tuple(i) for i in ids}) == 3
    assert all(i[-1] == 1 and 2 not in i for i in ids)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
