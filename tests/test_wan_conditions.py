"""Conditions of the tasks, computed by hand from the rule; and pictures of any shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from wan_minis import SIZE, model, picture

from ipvg_ray.models.mini import wan_vace
from ipvg_ray.models.wan.errors import WanError
from ipvg_ray.models.wan.tasks import Pictures, Size, fit_frame, letterbox


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    wan_vace.make(root)
    return root


@torch.no_grad()
def by_hand(vae: Any, video: torch.Tensor) -> torch.Tensor:
    """(z − mean) / std of the posterior's mean."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return (vae.encode(video).latent_dist.mean - mean) / std


def signed(array: np.ndarray) -> torch.Tensor:
    """(h, w, 3) uint8 to (3, h, w), float64, in [-1, 1]."""
    return torch.from_numpy(array.astype(np.float64) / 127.5 - 1).permute(2, 0, 1)


def first_then_grey() -> torch.Tensor:
    video = torch.zeros(1, 3, SIZE.frames, SIZE.height, SIZE.width)
    video[0, :, 0] = signed(picture()).float()
    return video


def test_control_of_a_first_frame(root: Path) -> None:
    """Inactive: first frame, then grey. Reactive: grey. Mask: 1 in every latent frame, the kept one too: trained so."""
    ours = model(root, "vace-i2v")
    condition: Any = ours.conditions.make([Pictures(picture())], SIZE, without=True)
    vae = ours.autoencoder.vae
    grey = by_hand(vae, torch.zeros(1, 3, SIZE.frames, SIZE.height, SIZE.width))
    assert condition.control.shape == (1, 96, 3, 4, 8)
    assert (condition.control[:, :16] - by_hand(vae, first_then_grey())).abs().max() < 1e-6
    assert (condition.control[:, 16:32] - grey).abs().max() < 1e-6
    assert (condition.control[:, 32:] == 1).all()
    assert (condition.control[:, :16] - condition.control[:, 16:32]).abs().max() > 1e-2
    assert (condition.without - torch.cat([grey, grey, torch.ones(1, 64, 3, 4, 8)], 1)).abs().max() < 1e-6


def test_eight_bit_grey_would_miss_the_empty_frames(root: Path) -> None:
    """Why they are made here as exact zeros: 127 or 128 of 255 is another latent."""
    ours = model(root, "vace-i2v")
    exact = ours.conditions.grey(SIZE)
    off = by_hand(ours.autoencoder.vae, torch.full((1, 3, SIZE.frames, SIZE.height, SIZE.width), 1 / 255))
    assert (exact - off).abs().max() > 1e-4


def test_control_of_a_reference(root: Path) -> None:
    """One latent frame in front: the letterboxed picture, reactive 0, mask 0; behind it grey, grey, 1."""
    ours = model(root, "vace-r2v")
    square = picture(32, 32)
    condition: Any = ours.conditions.make([Pictures(reference=square)], SIZE)
    vae = ours.autoencoder.vae
    canvas = torch.ones(1, 3, 1, SIZE.height, SIZE.width)
    canvas[0, :, 0, :, 16:48] = signed(square).float()
    grey = by_hand(vae, torch.zeros(1, 3, SIZE.frames, SIZE.height, SIZE.width))
    assert condition.control.shape == (1, 96, 4, 4, 8)
    assert (condition.control[:, :16, :1] - by_hand(vae, canvas)).abs().max() < 1e-6
    assert (condition.control[:, 16:, 0] == 0).all()
    assert (condition.control[:, :16, 1:] - grey).abs().max() < 1e-6
    assert (condition.control[:, 16:32, 1:] - grey).abs().max() < 1e-6
    assert (condition.control[:, 32:, 1:] == 1).all()


def test_control_of_both(root: Path) -> None:
    both: Any = model(root, "vace-i2v+ref").conditions.make([Pictures(picture(), picture(32, 32))], SIZE)
    frame: Any = model(root, "vace-i2v").conditions.make([Pictures(picture())], SIZE)
    reference: Any = model(root, "vace-r2v").conditions.make([Pictures(reference=picture(32, 32))], SIZE)
    assert torch.equal(both.control, torch.cat([reference.control[:, :, :1], frame.control], 2))


def test_channels_of_a14b(root: Path) -> None:
    ours = model(root, "i2v-A14B")
    condition: Any = ours.conditions.make([Pictures(picture())], SIZE)
    assert condition.channels.shape == (1, 20, 3, 4, 8)
    assert (condition.channels[:, :4, 0] == 1).all()
    assert (condition.channels[:, :4, 1:] == 0).all()
    assert (condition.channels[:, 4:] - by_hand(ours.autoencoder.vae, first_then_grey())).abs().max() < 1e-6


def test_first_latent_of_ti2v(root: Path) -> None:
    ours = model(root, "ti2v-5B")
    condition: Any = ours.conditions.make([Pictures(picture())], SIZE)
    assert (condition.first - by_hand(ours.autoencoder.vae, first_then_grey()[:, :, :1])).abs().max() < 1e-6
    noise = torch.randn(1, 48, 3, 2, 4)
    latents, times = condition.enter(noise, torch.tensor(700))
    assert torch.equal(latents[:, :, :1], condition.first)
    assert torch.equal(latents[:, :, 1:], noise[:, :, 1:])
    assert times.tolist() == [[0, 0] + [700] * 4], "tokens of the first latent frame have no noise"


def test_grey_is_encoded_once_for_each_size(root: Path) -> None:
    ours, calls = model(root, "vace-r2v"), []
    plain = ours.autoencoder.encode
    ours.autoencoder.encode = lambda video: (calls.append(tuple(video.shape)), plain(video))[1]  # type: ignore[method-assign]
    for size in (SIZE, SIZE, Size(5, 32, 64), SIZE):
        ours.conditions.make([Pictures(reference=picture())], size, without=True)
    assert [shape[2] for shape in calls] == [9, 1, 1, 5, 1, 1]


# -- pictures --------------------------------------------------------------------------------------------------------


def test_a_first_frame_of_the_right_size_is_untouched() -> None:
    first = picture()
    assert fit_frame(first, SIZE) is first


def test_a_first_frame_is_cut_around_its_middle_not_stretched() -> None:
    wide = np.zeros((40, 160, 3), np.uint8)
    wide[10:30, 70:90] = 255  # a square in the middle
    fitted = fit_frame(wide, Size(5, 80, 80)) > 127
    rows, columns = np.nonzero(fitted[..., 0])
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (40, 40)
    assert (rows.min(), columns.min()) == (20, 20)


def test_a_reference_stays_whole_on_white() -> None:
    canvas = letterbox(np.zeros((64, 32, 3), np.uint8), SIZE, 8)
    assert canvas.shape == (3, 32, 64)
    assert (canvas[:, :, :24] == 1).all()
    assert (canvas[:, :, 24:40] == -1).all()
    assert (canvas[:, :, 40:] == 1).all()


@pytest.mark.parametrize("first", [np.zeros((32, 48, 3)), np.zeros((32, 48), np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_arrays_that_are_no_picture_are_refused(first: np.ndarray) -> None:
    with pytest.raises(WanError, match="a picture is"):
        fit_frame(first, SIZE)
    with pytest.raises(WanError, match="a picture is"):
        letterbox(first, SIZE, 8)


@pytest.mark.parametrize("size", [Size(6, 32, 64), Size(5, 40, 64), Size(5, 32, 40)])
def test_sizes_off_the_grid_are_refused(size: Size, root: Path) -> None:
    with pytest.raises(WanError, match="multiples of 16"):
        model(root, "vace-i2v").conditions.make([Pictures(picture())], size)
    with pytest.raises(WanError, match="multiples of 32"):
        model(root, "ti2v-5B").conditions.make([Pictures(picture())], Size(5, 48, 64))


def test_missing_pictures_are_named(root: Path) -> None:
    with pytest.raises(WanError, match="a first frame"):
        model(root, "vace-i2v").conditions.make([Pictures(None, picture())], SIZE)
    with pytest.raises(WanError, match="a reference picture"):
        model(root, "vace-r2v").conditions.make([Pictures(picture(), None)], SIZE)
