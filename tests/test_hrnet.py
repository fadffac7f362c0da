"""HRNetV2: sizes and key names of the published networks, the forward pass, loading, the miniature."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pytest
import skimage.data
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ipvg_ray.models import hrnet, hrnet_load, matte_network
from ipvg_ray.models.mini import hrnet as mini_hrnet

LAYERS = Path(__file__).with_name("hrnet_w48_layers.txt")
"""Name and shape of the weight of each layer of timm's `hrnet_w48`, features only, without its classification head."""
NORM = ("weight", "bias", "running_mean", "running_var")


def on_meta(name: str) -> hrnet.HRNet:
    with torch.device("meta"):
        return hrnet.HRNet(hrnet.CONFIGS[name])


def random_mini(seed: int = 0, config: hrnet.HRNetConfig = hrnet.CONFIGS["mini"]) -> hrnet.HRNet:
    torch.manual_seed(seed)
    model = hrnet.HRNet(config).eval()
    shake(model)
    return model


def shake(model: nn.Module) -> None:
    """Batch normalisation with other than its first values, so that a mix-up of them is seen."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.1, 0.1)
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)


OCR_MINI = hrnet.HRNetConfig(8, 1, (1, 1, 1), 1, 8, head="ocr", ocr_width=24, ocr_keys=12, align_corners=True)


def published_body() -> dict[str, tuple[int, ...]]:
    """Every tensor of W48's body, by name, with its shape."""
    tensors: dict[str, tuple[int, ...]] = {}
    for line in LAYERS.read_text().splitlines():
        name, size = line.split()
        shape = tuple(map(int, size.split("x")))
        if len(shape) == 4:
            tensors[f"{name}.weight"] = shape
        else:
            tensors |= {f"{name}.{part}": shape for part in NORM} | {f"{name}.num_batches_tracked": ()}
    return tensors


def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{part}": (channels,) for part in NORM} | {f"{name}.num_batches_tracked": ()}


PLAIN_HEAD = {
    "last_layer.0.weight": (720, 720, 1, 1),
    "last_layer.0.bias": (720,),
    **norm("last_layer.1", 720),
    "last_layer.3.weight": (20, 720, 1, 1),
    "last_layer.3.bias": (20,),
}
_CONTEXT = "ocr_distri_head.object_context_block"
OCR_HEAD = {
    **{key.replace("last_layer", "aux_head"): shape for key, shape in PLAIN_HEAD.items()},
    "conv3x3_ocr.0.weight": (512, 720, 3, 3),
    "conv3x3_ocr.0.bias": (512,),
    **norm("conv3x3_ocr.1", 512),
    **{f"{_CONTEXT}.{part}.0.weight": (256, 512, 1, 1) for part in ("f_pixel", "f_object", "f_down")},
    **{f"{_CONTEXT}.{part}.2.weight": (256, 256, 1, 1) for part in ("f_pixel", "f_object")},
    f"{_CONTEXT}.f_up.0.weight": (512, 256, 1, 1),
    **norm(f"{_CONTEXT}.f_pixel.1.0", 256),
    **norm(f"{_CONTEXT}.f_pixel.3.0", 256),
    **norm(f"{_CONTEXT}.f_object.1.0", 256),
    **norm(f"{_CONTEXT}.f_object.3.0", 256),
    **norm(f"{_CONTEXT}.f_down.1.0", 256),
    **norm(f"{_CONTEXT}.f_up.1.0", 512),
    "ocr_distri_head.conv_bn_dropout.0.weight": (512, 1024, 1, 1),
    **norm("ocr_distri_head.conv_bn_dropout.1.0", 512),
    "cls_head.weight": (20, 512, 1, 1),
    "cls_head.bias": (20,),
}


def as_mmseg(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A plain network's tensors under MMSegmentation's names; its head's first convolution has no bias."""
    head = {"0.weight": "convs.0.conv.weight", "3.weight": "conv_seg.weight", "3.bias": "conv_seg.bias"}
    renamed = {}
    for key, value in state.items():
        part = key.removeprefix("last_layer.")
        if part == key:
            renamed[f"backbone.{key}"] = value
        elif part.startswith("1."):
            renamed[f"decode_head.convs.0.bn.{part[2:]}"] = value
        elif part in head:
            renamed[f"decode_head.{head[part]}"] = value
    return renamed


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    """timm, which is no dependency: it needs torchvision, whose usual build refuses to be imported beside CPU torch."""
    try:
        import timm
    except Exception as error:  # a broken torchvision raises RuntimeError
        pytest.skip(f"timm cannot be imported: {error}")
    return timm


@pytest.fixture(scope="module")
def mini_file(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mini")
    mini_hrnet.make(root)
    return root / "mini-hrnet.pth"


class TestArchitecture:
    @pytest.mark.parametrize(("name", "head", "millions"), [("w48", PLAIN_HEAD, 65.9), ("w48_ocr", OCR_HEAD, 70.4)])
    def test_tensors_are_the_published_ones(self, name, head, millions):
        """Names, shapes and the number of parameters that the authors give; the body's 1,830 tensors are timm's."""
        model = on_meta(name)
        body = published_body()
        assert len(body) == 1830
        assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == body | head
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions

    @pytest.mark.parametrize(("name", "head"), [("w18", 270), ("w18_small", 240), ("w18_small_v2", 270), ("mini", 120)])
    def test_other_widths(self, name, head):
        state = on_meta(name).state_dict()
        assert state["last_layer.3.weight"].shape == (20, head, 1, 1)
        assert hrnet_load.infer_config(state, Path("x")) == hrnet.CONFIGS[name]

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

    def test_ocr_forward_by_hand(self):
        """The head's own formula, written out with loops over pixels and regions."""
        model = random_mini(config=OCR_MINI)
        features = torch.rand(1, 120, 3, 5)
        model.features = lambda x: x  # type: ignore[method-assign]
        with torch.inference_mode():
            logits = model(features)
            pixels = model.conv3x3_ocr(features)[0].flatten(1)  # (24, 15)
            shares = model.aux_head(features)[0].flatten(1).softmax(dim=1)  # (20, 15)
            regions = torch.stack([sum(share[p] * pixels[:, p] for p in range(15)) for share in shares])
            block = model.ocr_distri_head.object_context_block
            key = block.f_object(regions.T[None, ..., None])[0, :, :, 0]
            value = block.f_down(regions.T[None, ..., None])[0, :, :, 0]
            query = block.f_pixel(pixels[None, ..., None])[0, :, :, 0]
            found = torch.stack(
                [value @ (key.T @ query[:, p] / math.sqrt(12)).softmax(dim=0) for p in range(15)], dim=1
            )
            context = block.f_up(found[None, ..., None])
            joined = model.ocr_distri_head.conv_bn_dropout(torch.cat([context, pixels[None, ..., None]], dim=1))
            expected = model.cls_head(joined).reshape(1, 20, 3, 5)
        assert torch.allclose(logits, expected, atol=1e-5)

    @pytest.mark.parametrize("align", [False, True])
    def test_body_and_head_equal_timms(self, timm, align):
        """timm's W48 with the same weights and its interpolations set to bilinear, and our concatenation and head."""
        torch.manual_seed(0)
        theirs = timm.create_model("hrnet_w48", features_only=True, feature_location="", out_indices=(1, 2, 3, 4))
        shake(theirs)
        upsamples = [module for module in theirs.modules() if isinstance(module, nn.Upsample)]
        for module in upsamples:
            module.mode, module.align_corners = "bilinear", align
        config = hrnet.HRNetConfig(align_corners=align)
        ours = hrnet.HRNet(config).eval()
        missing, surplus = ours.load_state_dict(theirs.eval().state_dict(), strict=False)
        x = torch.randn(2, 3, 96, 64)
        with torch.inference_mode():
            maps = theirs(x)
            size = maps[0].shape[-2:]
            joined = [
                nn.functional.interpolate(m, size, mode="bilinear", align_corners=align) if m.shape[-2:] != size else m
                for m in maps
            ]
            expected = ours.last_layer(torch.cat(joined, dim=1))
            difference = (ours(x) - expected).abs().max() / expected.abs().max()
        assert len(upsamples) == 31
        assert set(missing) <= set(PLAIN_HEAD)
        assert surplus == []
        assert difference <= 1e-5


class TestLoad:
    @pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_round_trip(self, tmp_path, prefix, suffix):
        model, path = random_mini(), tmp_path / f"net{suffix}"
        state = {prefix + key: value for key, value in model.state_dict().items()}
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
        loaded = hrnet_load.load(path)
        x = torch.randn(1, 3, 64, 48)
        with torch.inference_mode():
            assert torch.equal(loaded(x), model(x))
        assert not loaded.training
        assert loaded.config == hrnet.CONFIGS["mini"]

    def test_as_pytorch_04_wrote_it(self, tmp_path):
        """The old file format, no batch counters, the loss's tensors beside the network's.

        That release's in-place normalisation scales by |weight| + 1e-5, also where training has made weights negative.
        """
        model = random_mini()
        model.bn2.weight.data.neg_()
        state = model.state_dict()
        old = {f"model.{key}": value for key, value in state.items() if "num_batches" not in key}
        old["loss.criterion.weight"] = torch.ones(20)
        torch.save({"state_dict": old}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        loaded = hrnet_load.load(tmp_path / "old.pth").state_dict()
        for key, value in state.items():
            if "num_batches" not in key:
                is_norm = key.endswith(".weight") and value.dim() == 1
                assert torch.equal(loaded[key], value.abs() + 1e-5 if is_norm else value), key

    def test_ocr(self, tmp_path):
        model = random_mini(config=OCR_MINI)
        torch.save({f"model.{key}": value for key, value in model.state_dict().items()}, tmp_path / "ocr.pth")
        loaded = hrnet_load.load(tmp_path / "ocr.pth")
        x = torch.randn(2, 3, 64, 48)
        with torch.inference_mode():
            assert torch.equal(loaded(x), model(x))
        assert loaded.config == OCR_MINI

    def test_mmseg(self, tmp_path):
        model = random_mini()
        nn.init.zeros_(model.last_layer[0].bias)
        state = as_mmseg(model.state_dict())
        assert "decode_head.convs.0.conv.bias" not in state
        meta = {"mmseg_version": "0.5.0", "CLASSES": ("background", "person"), "epoch": 3}
        torch.save({"meta": meta, "state_dict": state}, tmp_path / "fcn.pth")
        loaded = hrnet_load.load(tmp_path / "fcn.pth")
        x = torch.randn(1, 3, 64, 64)
        with torch.inference_mode():
            assert torch.equal(loaded(x), model(x))
        assert not loaded.config.align_corners

    def test_another_head_of_mmseg(self, tmp_path):
        state = as_mmseg(random_mini().state_dict()) | {"decode_head.1.bottleneck.conv.weight": torch.ones(1)}
        torch.save(state, tmp_path / "ocrnet.pth")
        with pytest.raises(hrnet_load.HRNetError, match="head is not FCN's"):
            hrnet_load.load(tmp_path / "ocrnet.pth")

    @pytest.mark.parametrize(
        ("classes", "mmseg", "aligned"),
        [
            *[(19, False, False), (20, False, False), (59, False, False), (150, False, True), (171, False, True)],
            *[(150, True, False), (21, True, False)],
        ],
    )
    def test_align_corners_of_each_family(self, classes, mmseg, aligned):
        """As the original's configuration files say, whose default is True, and MMSegmentation's code."""
        state = random_mini(config=hrnet.HRNetConfig(8, 1, (1, 1, 1), 1, 8, classes)).state_dict()
        assert hrnet_load.infer_config(state, Path("x"), mmseg=mmseg).align_corners is aligned

    def test_align_corners_is_the_callers(self, mini_file):
        assert hrnet_load.load(mini_file, align_corners=True).config.align_corners

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("last_layer.3.weight"), "lacks last_layer.3.weight"),
            (lambda s: s.pop("stage3.0.fuse_layers.1.0.0.0.weight"), "lacks stage3.0.fuse_layers.1.0.0.0.weight"),
            (lambda s: s.update({"bn1.weight": torch.ones(7)}), r"other shapes: bn1.weight \(7,\) for \(64,\)"),
            (lambda s: s.update({"aux_head.0.weight": torch.ones(7)}), "also holds aux_head.0.weight"),
            (lambda s: s.update({"cls_head.weight": torch.ones(7)}), "lacks ocr_distri_head"),
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
        with pytest.raises(hrnet_load.HRNetError, match=message):
            hrnet_load.load(tmp_path / "wrong.pth")

    @pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_unreadable_file(self, tmp_path, content, suffix):
        path = tmp_path / f"net{suffix}"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(hrnet_load.HRNetError, match=r"net\."):
            hrnet_load.load(path)

    def test_cut_short(self, tmp_path, mini_file):
        path = tmp_path / "cut.pth"
        path.write_bytes(mini_file.read_bytes()[:100_000])
        with pytest.raises(hrnet_load.HRNetError, match="fetch it again"):
            hrnet_load.load(path)

    def test_nothing_in_a_pickle_is_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "was_run",))

        torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
        with pytest.raises(hrnet_load.HRNetError, match="cannot be read"):
            hrnet_load.load(tmp_path / "evil.pth")
        assert not (tmp_path / "was_run").exists()


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
        network = matte_network.load(mini_file, input_size=128)
        for picture in (skimage.data.astronaut(), skimage.data.cat(), skimage.data.coffee()):
            alpha = network.alpha(picture)
            assert 0.1 < (alpha > 0.5).mean() < 0.9
            assert alpha.std() > 0.1
