"""Networks behind one interface: classes that are a person, preparation of pictures, batches, which file is which."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from torch import nn

from ipvg_ray.models import hrnet, hrnet_load, matte_network, pp_matting
from ipvg_ray.models.matte_network import Preparation


def constant(classes: int, logits: dict[int, float]) -> hrnet.HRNet:
    """A network that says the same everywhere."""
    torch.manual_seed(0)
    model = hrnet.HRNet(hrnet.HRNetConfig(8, 1, (1, 1, 1), 1, 8, classes)).eval().requires_grad_(False)
    head = model.last_layer[3]
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    for index, value in logits.items():
        head.bias[index] = value
    return model


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


class TestPerson:
    @pytest.mark.parametrize(
        ("classes", "logits", "person"),
        [
            (20, {0: math.log(19)}, 0.5),  # LIP: everything but background
            (20, {0: math.log(57)}, 0.25),
            (21, {15: math.log(20)}, 0.5),  # VOC: class 15 alone
            (2, {1: math.log(3)}, 0.75),
            (19, {11: math.log(17), 12: math.log(17)}, 2 / 3),  # Cityscapes: person and rider
            (59, {36: math.log(58)}, 0.5),
            (60, {37: math.log(59)}, 0.5),
            (150, {12: math.log(149)}, 0.5),  # ADE20K
            (171, {0: math.log(170)}, 0.5),  # COCO-Stuff
        ],
    )
    def test_class_tables(self, classes, logits, person):
        network = matte_network.of_segmentation(constant(classes, logits), 64)
        alpha = network.alpha(picture(30, 50))
        assert (alpha.shape, alpha.dtype) == ((30, 50), np.float32)
        assert alpha == pytest.approx(np.full((30, 50), person), abs=1e-5)

    def test_unknown_head(self):
        with pytest.raises(ValueError, match="33 classes"):
            matte_network.of_segmentation(constant(33, {}))

    def test_input_is_imagenet_normalised_rgb(self):
        seen = []
        model = constant(20, {})
        model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        matte_network.of_segmentation(model, 64).alpha(np.full((20, 40, 3), (124, 116, 104), np.uint8))
        expected = [(124 / 255 - 0.485) / 0.229, (116 / 255 - 0.456) / 0.224, (104 / 255 - 0.406) / 0.225]
        assert seen[0].shape == (1, 3, 64, 64)
        assert seen[0][0, :, 10, 10].tolist() == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize(("classes", "side", "square"), [(20, 473, True), (21, 512, False), (150, 520, False)])
    def test_sizes_of_the_authors_own_tests(self, classes, side, square):
        prepare = matte_network.of_segmentation(constant(classes, {})).prepare
        assert (prepare.side, prepare.square) == (side, square)

    @pytest.mark.parametrize("align", [False, True])
    def test_alpha_lies_where_the_picture_does(self, align):
        """A network that sees brightness, on a picture that is bright on its right half."""

        class Bright(nn.Module):
            config = hrnet.HRNetConfig(classes=2, align_corners=align)

            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(1))  # says the device

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                value = x.mean(dim=1, keepdim=True)[:, :, 2::4, 2::4] * 20
                return torch.cat([-value, value], dim=1)

        rgb = np.zeros((90, 160, 3), np.uint8)
        rgb[:, 80:] = 255
        alpha = matte_network.of_segmentation(Bright(), 64).alpha(rgb)  # type: ignore[arg-type]
        assert alpha[:, :72].max() < 0.05
        assert alpha[:, 88:].min() > 0.95


class TestPreparation:
    @pytest.mark.parametrize(
        ("prepare", "size", "expected"),
        [
            (Preparation(473, square=True), (900, 400), (473, 473)),
            (Preparation(512), (1024, 1536), (512, 768)),
            (Preparation(512), (100, 150), (512, 768)),
            (Preparation(512, enlarge=False), (100, 150), (96, 128)),
            (Preparation(512), (500, 999), (512, 992)),  # 1,023 in steps of 32
            (Preparation(512), (10, 4000), (32, 2048)),  # a strip: the longer side is bounded
            (Preparation(64, enlarge=False), (1, 1), (32, 32)),
        ],
    )
    def test_size(self, prepare, size, expected):
        assert prepare.size(*size) == expected
        assert prepare(picture(*size)).shape == (3, *expected)

    def test_own_mean_and_deviation(self):
        prepare = Preparation(64, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        rgb = np.full((64, 64, 3), (0, 51, 255), np.uint8)
        assert prepare(rgb)[:, 5, 5].tolist() == pytest.approx([-1, -0.6, 1])


def save(model: nn.Module, path: Path) -> Path:
    torch.save(model.state_dict(), path)
    return path


class TestLoad:
    config = hrnet.HRNetConfig(8, 1, (1, 1, 1), 1, 8)

    @pytest.mark.parametrize(("kind", "enlarge"), [(pp_matting.PPMatting, False), (pp_matting.MODNet, True)])
    def test_matting_networks(self, tmp_path, kind, enlarge):
        torch.manual_seed(0)
        model = kind(self.config).eval()
        network = matte_network.load(save(model, tmp_path / "net.pth"), input_size=64)
        assert isinstance(network.network, kind)
        assert not network.coarse
        assert network.prepare == Preparation(64, enlarge=enlarge, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        rgb = skimage.data.astronaut()[:200, :300]
        x = network.prepare(rgb)
        with torch.inference_mode():
            assert torch.equal(torch.from_numpy(network.run(x[None])), model(x[None])[:, 0])
        alpha = network.alpha(rgb)
        assert alpha.shape == (200, 300)
        assert 0 <= alpha.min() <= alpha.max() <= 1

    def test_segmentation(self, tmp_path):
        network = matte_network.load(save(constant(21, {15: 3}), tmp_path / "net.pth"))
        assert isinstance(network.network, hrnet.HRNet)
        assert network.coarse

    def test_wrong_files(self, tmp_path):
        state = pp_matting.MODNet(self.config).state_dict()
        state.pop("head.f_branch.conv_f2x.layers.0.bias")
        torch.save(state, tmp_path / "modnet.pth")
        with pytest.raises(pp_matting.PPMattingError, match=r"no MODNet .* lacks head.f_branch.conv_f2x.layers.0.bias"):
            matte_network.load(tmp_path / "modnet.pth")
        torch.save({key: value for key, value in state.items() if "layer1" not in key}, tmp_path / "other.pth")
        with pytest.raises(pp_matting.PPMattingError, match=r"lacks layer1\.0\.conv1\.weight"):
            matte_network.load(tmp_path / "other.pth")
        with pytest.raises(hrnet_load.HRNetError, match="there is no"):
            matte_network.load(tmp_path / "none.pth")


class TestBatches:
    @pytest.mark.parametrize("kind", ["segmentation", "ocr", "matting"])
    def test_mates_change_nothing(self, kind):
        torch.manual_seed(3)
        if kind == "matting":
            model: nn.Module = pp_matting.MODNet(TestLoad.config).eval()
            network = matte_network.MatteNetwork(Preparation(64), model, model, coarse=False)
        else:
            head = {"head": "ocr", "ocr_width": 24, "ocr_keys": 12} if kind == "ocr" else {}
            segmentation = hrnet.HRNet(hrnet.HRNetConfig(8, 1, (1, 1, 1), 1, 8, **head)).eval()
            (segmentation.cls_head if kind == "ocr" else segmentation.last_layer[3]).weight.data.mul_(50)
            network = matte_network.of_segmentation(segmentation, 64)
        inputs = torch.stack([network.prepare(picture(64, 64, seed)) for seed in range(5)])
        with torch.inference_mode():
            together = network.alphas(inputs)[:, 0].numpy()  # as on a GPU
            reversed_ = network.alphas(inputs.flip(0))[:, 0].flip(0).numpy()
        alone = np.stack([network.run(inputs[i : i + 1])[0] for i in range(5)])
        assert np.abs(alone - together).max() <= 1e-5
        assert np.abs(reversed_ - together).max() <= 1e-5
        assert np.array_equal(network.run(inputs), alone)
        assert np.abs(together[0] - together[1]).max() > 1e-4  # they do say different things
