"""The scoring networks: names and shapes of the published weights, and the outputs of the original code.

`state_dicts/` lists the names and shapes of the original implementations' state dicts. The golden values are what those
implementations gave for the weights and pictures of `random_weights`.
"""

from __future__ import annotations

import importlib.util
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from random_weights import drawn, pictures

from ipvg_ray.metrics.nets import (
    amt,
    curricular_face,
    inception,
    musiq,
    raft,
    resnet_face,
    retina_face,
    vi_clip,
    weights,
)

LISTS = Path(__file__).parent / "state_dicts"
NETS: dict[str, Callable[[], torch.nn.Module]] = {
    "amt_s": amt.AmtS,
    "inception_v3": inception.InceptionV3,
    "musiq_spaq": lambda: musiq.Musiq(musiq.MusiqSizes()),
    "raft_things": raft.Raft,
    "resnet_face": resnet_face.ResNetFace,
    "retina_face": retina_face.RetinaFace,
    "vi_clip": lambda: vi_clip.ViClip(vi_clip.ViClipSizes()),
}
UNUSED = ("AuxLogits.", "fc.")  # Inception's classifiers


def listed(name: str) -> dict[str, tuple[int, ...]]:
    pairs = (line.split() for line in (LISTS / f"{name}.txt").read_text().splitlines())
    return {key: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for key, shape in pairs}


def filled(name: str, scale: float = 1.0) -> torch.nn.Module:
    return weights.fill(NETS[name], drawn(listed(name), scale), Path(name), spare=UNUSED)


def some(values: torch.Tensor) -> list[float]:
    return values.flatten()[:: max(1, values.numel() // 4)][:4].tolist()


@pytest.mark.parametrize("name", NETS)
def test_names_and_shapes_are_the_published_ones(name):
    with torch.device("meta"):
        ours = {key: tuple(value.shape) for key, value in NETS[name]().state_dict().items()}
    theirs = {key: shape for key, shape in listed(name).items() if not key.startswith(UNUSED)}
    assert ours == theirs


def test_names_and_shapes_of_curricular_face():
    with torch.device("meta"):
        ours = {key: tuple(value.shape) for key, value in curricular_face.CurricularFace().state_dict().items()}
    depths = [64] * 3 + [128] * 13 + [256] * 30 + [512] * 3
    before = [64, *depths[:-1]]
    norm = ("weight", "bias", "running_mean", "running_var")
    expected: dict[str, tuple[int, ...]] = {"input_layer.0.weight": (64, 3, 3, 3), "input_layer.2.weight": (64,)}
    expected |= {f"input_layer.1.{key}": (64,) for key in norm}
    for number, (inputs, depth) in enumerate(zip(before, depths, strict=True)):
        name = f"body.{number}.res_layer"
        expected |= {f"{name}.1.weight": (depth, inputs, 3, 3), f"{name}.3.weight": (depth,)}
        expected |= {f"{name}.4.weight": (depth, depth, 3, 3)}
        expected |= {f"{name}.{i}.{key}": (size,) for i, size in ((0, inputs), (2, depth), (5, depth)) for key in norm}
        if inputs != depth:
            expected[f"body.{number}.shortcut_layer.0.weight"] = (depth, inputs, 1, 1)
            expected |= {f"body.{number}.shortcut_layer.1.{key}": (depth,) for key in norm}
    expected |= {f"output_layer.0.{key}": (512,) for key in norm}
    expected |= {"output_layer.3.weight": (512, 25088), "output_layer.3.bias": (512,)}
    expected |= {f"output_layer.4.{key}": (512,) for key in ("running_mean", "running_var")}
    assert {key: shape for key, shape in ours.items() if not key.endswith("num_batches_tracked")} == expected
    numbers = sum(torch.Size(shape).numel() for shape in expected.values())
    assert round(4 * numbers / 1e6) == 261  # the published file's size in MB


class TestGolden:
    def test_amt(self):
        first = pictures(1, 3, 128, 192)
        found = filled("amt_s", 0.5)(first, first.roll(3, -1))
        assert some(found) == pytest.approx([0.407134, 0.27772, 0.535331, 0.439213], abs=2e-5)

    def test_raft(self):
        first = pictures(1, 3, 128, 160) * 255
        found = filled("raft_things", 0.5)(first, first.roll(3, -1))
        assert some(found) == pytest.approx([5.795603, 10.25082, 5.431228, 7.862743], abs=1e-4)

    def test_inception(self):
        found = filled("inception_v3")(pictures(1, 3, 299, 299))
        assert found.shape == (1, 2048)
        assert some(found) == pytest.approx([0.01486, 0.148946, 0.000486, 0.0], abs=1e-5)

    def test_resnet_face(self):
        found = filled("resnet_face")(pictures(2, 1, 128, 128))
        assert some(found) == pytest.approx([-3.559389, 11.077574, -5.680133, 13.047625], abs=1e-4)

    def test_retina_face(self):
        boxes, logits = filled("retina_face")(pictures(1, 3, 128, 128))
        assert some(boxes) == pytest.approx([-0.497973, -0.58685, -0.734939, -0.163809], abs=1e-5)
        assert some(logits) == pytest.approx([-0.366198, -0.112718, -0.19658, 0.389053], abs=1e-5)
        corners = retina_face.decoded(boxes[0], retina_face.anchors(128))
        assert some(corners) == pytest.approx([-0.035246, 0.213626, 0.454947, 0.722741], abs=1e-5)

    def test_boxes_of_several_pictures_are_those_of_each_alone(self):
        torch.manual_seed(0)
        find = retina_face.FaceBoxes(retina_face.RetinaFace(4, 16).eval(), side=128, threshold=0.5)
        frames = np.random.default_rng(0).integers(0, 256, (3, 60, 90, 3), np.uint8)
        together = find(frames)
        assert together == [found for frame in frames for found in find(frame[None])]
        assert all(together)
        assert len({tuple(found) for found in together}) == 3

    @pytest.mark.parametrize(("size", "score"), [((96, 176), 0.488389), ((295, 512), 0.538078), ((100, 40), 0.498459)])
    def test_musiq(self, size, score):
        assert filled("musiq_spaq")(pictures(1, 3, *size)).item() == pytest.approx(score, abs=1e-5)

    def test_vi_clip(self):
        sizes = vi_clip.ViClipSizes(28, 14, 4, 128, 2, 64, 2, 100, 8, 24)
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in vi_clip.ViClip(sizes).state_dict().items()}
        net = weights.fill(lambda: vi_clip.ViClip(sizes), drawn(shapes), Path("vi_clip"))
        video = net.vision_encoder(pictures(2, 4, 3, 28, 28))
        text = net.text_encoder(torch.tensor([[1, 5, 7, 99, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 99]]))
        assert some(video) == pytest.approx([-3.466798, -0.163825, -3.487947, 0.34457], abs=1e-5)
        assert some(text) == pytest.approx([-1.955523, 2.144937, -0.017777, 2.288716], abs=1e-5)


def _torchvision():
    """A CUDA torchvision beside a CPU torch can be imported once two of its operators are declared."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor d, Tensor s, float t) -> Tensor")
        import torchvision
    return torchvision


def test_raft_and_inception_equal_torchvisions():
    torchvision = _torchvision()
    theirs = torchvision.models.optical_flow.raft_large(weights=None).eval()
    ours = weights.fill(raft.Raft, raft.from_torchvision(theirs.state_dict()), Path("raft"))
    first = pictures(1, 3, 128, 160)
    with torch.no_grad():
        flow = theirs(2 * first - 1, 2 * first.roll(2, -1) - 1, num_flow_updates=4)[-1]
    assert torch.allclose(ours(255 * first, 255 * first.roll(2, -1), 4), flow, atol=1e-5)
    net = torchvision.models.inception_v3(weights=None, init_weights=False, transform_input=True).eval()
    features = weights.fill(inception.InceptionV3, net.state_dict(), Path("inception"), spare=UNUSED)
    net.fc = torch.nn.Identity()
    with torch.no_grad():
        assert torch.allclose(features(pictures(1, 3, 299, 299)), net(pictures(1, 3, 299, 299)), atol=1e-5)


def test_the_original_and_torchvisions_names_of_raft_mean_the_same():
    state = drawn(listed("raft_things"))
    renamed = {
        "feature_encoder.convnormrelu.0.weight": "fnet.conv1.weight",
        "feature_encoder.layer2.0.convnormrelu1.0.bias": "fnet.layer2.0.conv1.bias",
        "feature_encoder.conv.weight": "fnet.conv2.weight",
        "context_encoder.layer3.1.convnormrelu2.1.running_var": "cnet.layer3.1.norm2.running_var",
        "context_encoder.layer2.0.downsample.0.weight": "cnet.layer2.0.downsample.0.weight",
        "update_block.motion_encoder.convflow2.0.weight": "update_block.encoder.convf2.weight",
        "update_block.recurrent_block.convgru2.convq.bias": "update_block.gru.convq2.bias",
        "mask_predictor.conv.weight": "update_block.mask.2.weight",
    }
    found = raft.from_torchvision({theirs: state[ours] for theirs, ours in renamed.items()})
    assert set(found) == set(renamed.values())


@pytest.mark.parametrize("count", range(1, 41))
def test_musiq_lays_its_grid_over_any_size(count):
    wanted = torch.nn.functional.interpolate(torch.arange(10).float()[None, None], count, mode="nearest")[0, 0].long()
    _, places = musiq._patches(torch.zeros(1, 3, 32, 32 * count), 10)
    assert places.tolist() == wanted.tolist()


def test_small_pictures_give_numbers():
    first = pictures(1, 3, 48, 64)
    assert torch.isfinite(filled("amt_s", 0.5)(first, first.roll(1, -1))).all()
    assert torch.isfinite(filled("raft_things", 0.5)(255 * first, 255 * first.roll(1, -1), 2)).all()


class TestLoading:
    @pytest.fixture
    def state(self) -> dict[str, torch.Tensor]:
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in resnet_face.ResNetFace(4, 8).state_dict().items()}
        return drawn(shapes)

    def test_sizes_come_from_the_file_and_wrappers_go(self, state, tmp_path):
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "a.pth")
        assert resnet_face.load(tmp_path / "a.pth")(pictures(1, 1, 128, 128)).shape == (1, 8)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("bn4.bias"), r"1 missing \(bn4.bias\)"),
            (lambda s: s.update({"bn9.bias": torch.ones(1)}), r"1 not known \(bn9.bias\)"),
            (lambda s: s.update({"bn4.bias": torch.ones(1)}), r"1 of another shape \(bn4.bias\)"),
            (lambda s: s.pop("fc5.weight"), "holds no 'fc5.weight'"),
        ],
    )
    def test_other_weights_are_refused(self, state, tmp_path, change, message):
        change(state)
        torch.save(state, tmp_path / "a.pth")
        with pytest.raises(weights.WeightsError, match=message):
            resnet_face.load(tmp_path / "a.pth")

    def test_a_checkpoint_in_a_zip_archive(self, state, tmp_path):
        torch.save(state, tmp_path / "a.pth")
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.write(tmp_path / "a.pth", "a.pth")
        assert resnet_face.load(tmp_path / "a.zip").fc5.out_features == 8

    @pytest.mark.parametrize("zipped", [True, False])
    def test_settings_beside_the_weights_are_left_alone(self, state, tmp_path, zipped):
        class Settings:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path}/ran",)

        content = {"epoch": 3, "args": Settings(), "state_dict": state}
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        assert resnet_face.load(tmp_path / "a.pth").fc5.out_features == 8
        assert not (tmp_path / "ran").exists()

    def test_what_is_no_checkpoint_is_refused(self, tmp_path):
        (tmp_path / "a.pth").write_bytes(b"nothing of the kind")
        with pytest.raises(weights.WeightsError, match="cannot be read"):
            resnet_face.load(tmp_path / "a.pth")
