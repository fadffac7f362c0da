"""`.pdparams` files: read without running what is in them, and turned into the networks of `pp_matting`."""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ipvg_ray import cli
from ipvg_ray.models import hrnet, matte_network, paddle_files, pp_matting

CONFIG = hrnet.HRNetConfig(8, 1, (1, 2, 1), 1, 8)


def paddle_names(model: nn.Module) -> dict[str, np.ndarray]:
    """A network's tensors as Paddle names them, by PaddleSeg's layer names, apart from the code under test."""
    arrays = {}
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        if key.startswith("backbone."):
            key = "backbone." + _body(key.removeprefix("backbone."))
        key = re.sub(r"running_mean$", "_mean", key)
        key = re.sub(r"running_var$", "_variance", key)
        key = re.sub(r"inorm\.weight$", "inorm.scale", key)
        arrays[key] = value.numpy()
    return arrays


def _body(key: str) -> str:
    layer, last = key.rsplit(".", 1)
    parts = layer.split(".")

    def piece(name: str) -> str:
        return ("._conv." if name in ("0", "conv") else "._batch_norm.") + last

    if parts[0] in ("conv1", "conv2", "bn1", "bn2"):
        return f"conv_layer1_{parts[0][-1]}" + piece(parts[0][:-1])
    if parts[0] == "layer1":
        start = f"la1.bb_layer2_{int(parts[1]) + 1}."
        if parts[2] == "downsample":
            return start + "conv_down" + piece(parts[3])
        return start + f"conv{parts[2][-1]}" + piece(parts[2][:-1])
    if parts[0].startswith("transition"):
        n = parts[0][-1]
        return f"tr{n}.transition_tr{n}_layer_{int(parts[1]) + 1}" + piece(parts[-1])
    n, m = parts[0][-1], int(parts[1]) + 1
    start = f"st{n}.stage_st{n}_{m}."
    numbers = [str(int(part) + 1) for part in parts[3:5]]
    if parts[2] == "branches":
        name = f"bb_st{n}_{m}_branch_layer_{'_'.join(numbers)}.conv{parts[5][-1]}"
        return start + "branches_func." + name + piece(parts[5][:-1])
    numbers += [str(int(part) + 1) for part in parts[5:-1]]
    return start + f"fuse_func.residual_st{n}_{m}_layer_{'_'.join(numbers)}" + piece(parts[-1])


def network(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    model = kind(CONFIG).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, nn.InstanceNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
    return model


def write(path: Path, tree: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(tree, protocol))
    return path


class TestConvert:
    @pytest.mark.parametrize("protocol", [2, 3, 4])
    @pytest.mark.parametrize("kind", [pp_matting.PPMatting, pp_matting.MODNet])
    def test_round_trip(self, tmp_path, kind, protocol):
        model = network(kind)
        arrays: dict[str, object] = dict(paddle_names(model))
        arrays["blurer.op.1.weight"] = np.ones((1, 1, 3, 3), np.float32)  # training alone reads these
        arrays["head.hr_branch.conv_hr.0.layers.0.weight"] = np.ones((1,), np.float32)
        arrays["StructuredToParameterName@@"] = {key: f"conv2d_{i}.w_0" for i, key in enumerate(arrays)}
        source = write(tmp_path / "net.pdparams", OrderedDict(arrays), protocol)
        count = paddle_files.convert(source, tmp_path / "out" / "net.safetensors")
        written = load_file(tmp_path / "out" / "net.safetensors")
        own = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
        assert count == len(written) == len(own)
        assert all(torch.equal(written[key], value) for key, value in own.items())
        for path in (source, tmp_path / "out" / "net.safetensors"):
            loaded = matte_network.load(path, input_size=64)
            x = torch.randn(1, 3, 64, 96)
            with torch.inference_mode():
                assert torch.equal(torch.from_numpy(loaded.run(x)), model(x)[:, 0])

    def test_arrays_with_their_names(self, tmp_path):
        """How `paddle.save` writes tensors that stand in no state dict."""
        arrays = {
            key: (f"p_{i}", value) for i, (key, value) in enumerate(paddle_names(network(pp_matting.MODNet)).items())
        }
        assert len(paddle_files.state_dict(write(tmp_path / "net.pdparams", arrays))) == len(arrays)

    def test_wrong_target(self, tmp_path):
        with pytest.raises(paddle_files.PaddleFileError, match="must end in"):
            paddle_files.convert(tmp_path / "net.pdparams", tmp_path / "net.pth")

    def test_another_network(self, tmp_path):
        path = write(tmp_path / "resnet.pdparams", {"backbone.conv1_1._conv.weight": np.zeros((3, 3), np.float32)})
        with pytest.raises(paddle_files.PaddleFileError, match=r"it holds backbone\.conv1_1\._conv\.weight"):
            paddle_files.convert(path, tmp_path / "net.safetensors")
        assert not (tmp_path / "net.safetensors").exists()

    def test_incomplete(self, tmp_path):
        arrays = paddle_names(network(pp_matting.PPMatting))
        arrays.pop("scb.psps.2.0._conv.bias")
        with pytest.raises(pp_matting.PPMattingError, match=r"lacks scb\.psps\.2\.0\._conv\.bias"):
            paddle_files.convert(write(tmp_path / "net.pdparams", arrays), tmp_path / "net.safetensors")


class TestSafety:
    def test_nothing_in_it_is_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "was_run",))

        path = write(tmp_path / "evil.pdparams", {"weight": Evil()})
        with pytest.raises(paddle_files.PaddleFileError, match="arrays of numbers do not need"):
            paddle_files.read(path)
        assert not (tmp_path / "was_run").exists()

    @pytest.mark.parametrize("name", ["eval", "exec", "getattr", "__import__"])
    def test_builtins_are_out_of_reach(self, tmp_path, name):
        path = tmp_path / "evil.pdparams"
        path.write_bytes(f"cbuiltins\n{name}\n(S'1'\ntR.".encode())
        with pytest.raises(paddle_files.PaddleFileError, match=f"it names builtins.{name}"):
            paddle_files.read(path)

    @pytest.mark.parametrize(
        ("tree", "message"),
        [
            ([1, 2], "holds a list"),
            ({"a": "text"}, "a is no array"),
            ({"a": np.array([{}, None], dtype=object)}, "a is no array"),
            ({"a": None}, "a is no array"),
        ],
    )
    def test_other_content(self, tmp_path, tree, message):
        with pytest.raises(paddle_files.PaddleFileError, match=message):
            paddle_files.read(write(tmp_path / "net.pdparams", tree))

    @pytest.mark.parametrize("content", [b"", b"no pickle", None])
    def test_unreadable(self, tmp_path, content):
        path = tmp_path / "net.pdparams"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(paddle_files.PaddleFileError, match=r"net\.pdparams"):
            paddle_files.read(path)


class TestArchitecture:
    @pytest.mark.parametrize(("kind", "millions"), [(pp_matting.PPMatting, 24.5), (pp_matting.MODNet, 10.2)])
    def test_published_number_of_parameters(self, kind, millions):
        with torch.device("meta"):
            model = kind(hrnet.CONFIGS["w18"])
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions

    @pytest.mark.parametrize("kind", [pp_matting.PPMatting, pp_matting.MODNet])
    def test_alpha_of_the_inputs_size(self, kind):
        with torch.inference_mode():
            alpha = network(kind)(torch.randn(2, 3, 64, 96))
        assert alpha.shape == (2, 1, 64, 96)
        assert 0 <= alpha.min() <= alpha.max() <= 1

    def test_padding_is_paddles(self):
        """Paddle's "same" for stride 2 and even sizes adds one row and column after the last, none before the first."""
        body = network(pp_matting.PPMatting).backbone
        nn.init.zeros_(body.conv1.weight)
        body.conv1.weight.data[:, :, 0, 0] = 1
        x = torch.arange(64.0).reshape(1, 1, 8, 8).expand(1, 3, 8, 8)
        assert body.conv1(x)[0, 0, 0].tolist() == [0, 6, 12, 18]  # columns 0, 2, 4, 6 of the first row, three channels


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "net.pdparams", paddle_names(network(pp_matting.MODNet)))
    assert cli.main(["models", "convert-paddle", str(source), str(tmp_path / "net.safetensors")]) == 0
    assert "tensors written" in capsys.readouterr().out
    assert cli.main(["models", "convert-paddle", str(tmp_path / "gone.pdparams"), str(tmp_path / "x.safetensors")]) != 0
    error = capsys.readouterr().err
    assert "there is no file" in error
    assert "Traceback" not in error
