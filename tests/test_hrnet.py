"""HRNetV2: sizes and key names of the published networks, the forward pass, loading, the miniature."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from safetensors.torch import save_file
from torch import nn

from ipvg_ray.models import hrnet
from ipvg_ray.models.mini import hrnet as mini_hrnet


def on_meta(name: str) -> hrnet.HRNet:
    with torch.device("meta"):
        return hrnet.HRNet(hrnet.CONFIGS[name])


def random_mini(seed: int = 0) -> hrnet.HRNet:
    torch.manual_seed(seed)
    model = hrnet.HRNet(hrnet.CONFIGS["mini"]).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def mini_file(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mini")
    mini_hrnet.make(root)
    return root / "mini-hrnet.pth"


class TestArchitecture:
    def test_w48_is_the_published_lip_network(self):
        """65.9 M parameters; 1,830 tensors of the body, as timm's hrnet_w48 has, and 9 of the head."""
        model = on_meta("w48")
        state = model.state_dict()
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 65.9
        assert len([key for key in state if not key.startswith("last_layer.")]) == 1830
        assert {key: tuple(v.shape) for key, v in state.items() if key.startswith("last_layer.")} == {
            "last_layer.0.weight": (720, 720, 1, 1),
            "last_layer.0.bias": (720,),
            "last_layer.1.weight": (720,),
            "last_layer.1.bias": (720,),
            "last_layer.1.running_mean": (720,),
            "last_layer.1.running_var": (720,),
            "last_layer.1.num_batches_tracked": (),
            "last_layer.3.weight": (20, 720, 1, 1),
            "last_layer.3.bias": (20,),
        }

    @pytest.mark.parametrize(
        ("key", "shape"),
        [
            ("conv1.weight", (64, 3, 3, 3)),
            ("layer1.0.downsample.0.weight", (256, 64, 1, 1)),
            ("layer1.3.conv3.weight", (256, 64, 1, 1)),
            ("transition1.0.0.weight", (48, 256, 3, 3)),
            ("transition1.1.0.0.weight", (96, 256, 3, 3)),
            ("stage2.0.branches.1.3.conv2.weight", (96, 96, 3, 3)),
            ("stage2.0.fuse_layers.0.1.0.weight", (48, 96, 1, 1)),
            ("stage2.0.fuse_layers.1.0.0.0.weight", (96, 48, 3, 3)),
            ("transition2.2.0.0.weight", (192, 96, 3, 3)),
            ("stage3.3.fuse_layers.2.0.0.0.weight", (48, 48, 3, 3)),  # keeps its width until the last step down
            ("stage3.3.fuse_layers.2.0.1.0.weight", (192, 48, 3, 3)),
            ("transition3.3.0.0.weight", (384, 192, 3, 3)),
            ("stage4.2.branches.3.3.conv1.weight", (384, 384, 3, 3)),
            ("stage4.2.fuse_layers.3.0.2.1.running_var", (384,)),
        ],
    )
    def test_key_names(self, key, shape):
        assert tuple(on_meta("w48").state_dict()[key].shape) == shape

    @pytest.mark.parametrize(("name", "head"), [("w18", 270), ("w18_small", 240), ("mini", 120)])
    def test_other_widths(self, name, head):
        state = on_meta(name).state_dict()
        assert state["last_layer.3.weight"].shape == (20, head, 1, 1)
        assert hrnet.infer_config(state, Path("x")) == hrnet.CONFIGS[name]

    @pytest.mark.parametrize(("height", "width"), [(64, 96), (473, 473), (33, 50)])
    def test_forward_shape(self, height, width):
        with torch.device("meta"):
            logits = hrnet.HRNet(hrnet.CONFIGS["w18_small"]).eval()(torch.empty(2, 3, height, width))
        assert logits.shape == (2, 20, math.ceil(height / 4), math.ceil(width / 4))

    def test_bilinear_fusion(self):
        """A coarse branch alone, through an otherwise silent module: what arrives is its bilinear interpolation."""
        for align in (False, True):
            module = hrnet.ExchangeModule([4, 8], blocks=1, align_corners=align).eval()
            fine, coarse = torch.zeros(1, 4, 8, 8), torch.rand(1, 8, 4, 4)
            for branch in module.branches:
                nn.init.zeros_(branch[0].conv2.weight)  # blocks become the identity for values above 0
            weight = module.fuse_layers[0][1][0].weight
            with torch.inference_mode():
                nn.init.zeros_(weight)
                weight[0, 3, 0, 0] = math.sqrt(1 + 1e-5)  # undoes batch norm's epsilon
                result, _ = module([fine, coarse])
            expected = nn.functional.interpolate(coarse[:, 3:4], (8, 8), mode="bilinear", align_corners=align)
            assert torch.allclose(result[:, :1], expected, atol=1e-6)


class TestLoad:
    @pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_round_trip(self, tmp_path, prefix, suffix):
        model, path = random_mini(), tmp_path / f"net{suffix}"
        state = {prefix + key: value for key, value in model.state_dict().items()}
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
        loaded = hrnet.load(path)
        x = torch.randn(1, 3, 64, 48)
        with torch.inference_mode():
            assert torch.equal(loaded(x), model(x))
        assert not loaded.training
        assert loaded.config == hrnet.CONFIGS["mini"]

    def test_as_pytorch_04_wrote_it(self, tmp_path):
        """The old file format, no batch counters, the loss's tensors beside the network's."""
        state = random_mini().state_dict()
        old = {f"model.{key}": value for key, value in state.items() if "num_batches" not in key}
        old["loss.criterion.weight"] = torch.ones(20)
        torch.save({"state_dict": old}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        loaded = hrnet.load(tmp_path / "old.pth").state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in state.items() if "num_batches" not in key)

    def test_align_corners_is_the_callers(self, mini_file):
        assert hrnet.load(mini_file, align_corners=True).config.align_corners

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("last_layer.3.weight"), "lacks last_layer.3.weight"),
            (lambda s: s.pop("stage3.0.fuse_layers.1.0.0.0.weight"), "lacks stage3.0.fuse_layers.1.0.0.0.weight"),
            (lambda s: s.update({"bn1.weight": torch.ones(7)}), r"other shapes: bn1.weight \(7,\) for \(64,\)"),
            (lambda s: s.update({"aux_head.0.weight": torch.ones(7)}), "also holds aux_head.0.weight"),
            (lambda s: (s.pop("last_layer.3.weight"), s.update({"cls_head.weight": torch.ones(7)})), "OCR"),
            (
                lambda s: [s.pop(key) for key in list(s) if "branches" in key],
                "lacks stage4.0.branches.0.0.conv1.weight",
            ),
        ],
    )
    def test_wrong_file(self, tmp_path, change, message):
        state = random_mini().state_dict()
        change(state)
        torch.save(state, tmp_path / "wrong.pth")
        with pytest.raises(hrnet.HRNetError, match=message):
            hrnet.load(tmp_path / "wrong.pth")

    @pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_unreadable_file(self, tmp_path, content, suffix):
        path = tmp_path / f"net{suffix}"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(hrnet.HRNetError, match=r"net\."):
            hrnet.load(path)

    def test_cut_short(self, tmp_path, mini_file):
        path = tmp_path / "cut.pth"
        path.write_bytes(mini_file.read_bytes()[:100_000])
        with pytest.raises(hrnet.HRNetError, match="fetch it again"):
            hrnet.load(path)

    def test_nothing_in_a_pickle_is_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "was_run",))

        torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
        with pytest.raises(hrnet.HRNetError, match="cannot be read"):
            hrnet.load(tmp_path / "evil.pth")
        assert not (tmp_path / "was_run").exists()


class TestPersonProbability:
    def constant(self, classes: int, logits: dict[int, float]) -> hrnet.HRNet:
        """A network that says the same everywhere."""
        state = random_mini().state_dict()
        model = hrnet.HRNet(hrnet.HRNetConfig(8, 1, (1, 1, 1), 1, 8, classes)).eval()
        head = nn.Conv2d(120, classes, 1)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        for index, value in logits.items():
            head.bias.data[index] = value
        model.load_state_dict({k: v for k, v in state.items() if not k.startswith("last_layer.3")}, strict=False)
        model.last_layer[3] = head
        return model

    @pytest.mark.parametrize(
        ("classes", "logits", "person"),
        [
            (20, {0: math.log(19)}, 0.5),  # LIP: everything but background
            (20, {0: math.log(57)}, 0.25),
            (21, {15: math.log(20)}, 0.5),  # VOC: class 15 alone
            (2, {1: math.log(3)}, 0.75),
        ],
    )
    def test_class_tables(self, classes, logits, person):
        rgb = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
        alpha = hrnet.person_probability(self.constant(classes, logits), rgb, 64)
        assert (alpha.shape, alpha.dtype) == ((30, 50), np.float32)
        assert alpha == pytest.approx(np.full((30, 50), person), abs=1e-5)

    def test_unknown_head(self):
        with pytest.raises(ValueError, match="150 classes"):
            hrnet.person_probability(self.constant(150, {}), np.zeros((8, 8, 3), np.uint8), 64)

    def test_input_is_imagenet_normalised_rgb(self):
        seen = []
        model = self.constant(20, {})
        model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        hrnet.person_probability(model, np.full((20, 40, 3), (124, 116, 104), np.uint8), 64)
        expected = [(124 / 255 - 0.485) / 0.229, (116 / 255 - 0.456) / 0.224, (104 / 255 - 0.406) / 0.225]
        assert seen[0].shape == (1, 3, 64, 64)
        assert seen[0][0, :, 10, 10].tolist() == pytest.approx(expected, abs=1e-5)


class TestMini:
    def test_same_seed_same_bytes(self, tmp_path, mini_file):
        for name, seed in (("a", 0), ("b", 1)):
            (tmp_path / name).mkdir()
            mini_hrnet.make(tmp_path / name, seed)
        torch.manual_seed(99)
        mini_hrnet.make(tmp_path)
        same, other = ((tmp_path / name / "mini-hrnet.pth").read_bytes() for name in "ab")
        assert (tmp_path / "mini-hrnet.pth").read_bytes() == same == mini_file.read_bytes() != other

    def test_neither_all_person_nor_none(self, mini_file):
        model = hrnet.load(mini_file)
        assert model.config.classes == 20
        for picture in (skimage.data.astronaut(), skimage.data.cat(), skimage.data.coffee()):
            alpha = hrnet.person_probability(model, picture, 128)
            assert 0.1 < (alpha > 0.5).mean() < 0.9
            assert alpha.std() > 0.1
