"""The miniature models: whole sets made twice are equal, and a set that is there is left alone."""

from __future__ import annotations

import sys
import time
import types
from pathlib import Path

import pytest

from ipvg_ray import config, files
from ipvg_ray.metrics import catalogue
from ipvg_ray.models import fetch, mini


class Makers:
    """Stand-ins for the makers: each writes a file from its name and the seed, and can be told to fail."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.fail: str = ""
        self.extra = ""

    def make(self, name: str, root: Path, seed: int) -> None:
        if name == self.fail:
            raise KeyboardInterrupt
        self.runs.append(name)
        if name == "hyperlora":
            assert (root / "mini-sdxl" / "w.bin").exists(), "SDXL must be made before HyperLoRA"
        folder = root / "insightface/models/mini_x" if name == "insightface_pack" else root / f"mini-{name}"
        folder.mkdir(parents=True)
        (folder / "w.bin").write_bytes(f"{name} {seed} ".encode() * 100)
        if self.extra and name == "qwen3":
            (folder / self.extra).write_bytes(b"old")


@pytest.fixture
def makers(monkeypatch: pytest.MonkeyPatch) -> Makers:
    made = Makers()
    for name in mini.MAKERS:
        module = types.ModuleType(name)
        module.make = lambda root, seed, name=name: made.make(name, root, seed)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"ipvg_ray.models.mini.{name}", module)
    return made


def quiet(_: str) -> None:
    """Take a report line and drop it."""


def test_a_set_that_is_there_is_left_alone(makers: Makers, tmp_path: Path) -> None:
    mini.make_all(tmp_path, 1, quiet)
    mini.make_all(tmp_path, 1, quiet)
    assert makers.runs == list(mini.MAKERS)
    listed = files.read_json(tmp_path / "mini.json")
    assert listed is not None
    assert len(listed["files"]) == len(mini.MAKERS)
    assert files.differing(listed["files"], tmp_path, verify=True) == []


@pytest.mark.parametrize("change", ["seed", "version", "gone", "cut"])
def test_it_is_made_anew_when_something_differs(
    makers: Makers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    mini.make_all(tmp_path, 1, quiet)
    place = tmp_path / "mini-qwen3" / "w.bin"
    if change == "version":
        monkeypatch.setattr(mini, "VERSION", mini.VERSION + 1)
    elif change == "gone":
        place.unlink()
    elif change == "cut":
        place.write_bytes(b"q")
    mini.make_all(tmp_path, 2 if change == "seed" else 1, quiet)
    assert len(makers.runs) == 2 * len(mini.MAKERS)
    assert place.read_bytes().startswith(b"qwen3 2" if change == "seed" else b"qwen3 1")


def test_other_models_below_the_same_root_stay(makers: Makers, tmp_path: Path) -> None:
    real = tmp_path / "insightface" / "models" / "buffalo_l" / "det_10g.onnx"
    real.parent.mkdir(parents=True)
    real.write_bytes(b"real")
    makers.extra = "left-over.bin"
    mini.make_all(tmp_path, 1, quiet)
    makers.extra = ""
    mini.make_all(tmp_path, 2, quiet)
    assert real.read_bytes() == b"real"
    assert not (tmp_path / "mini-qwen3" / "left-over.bin").exists()


def test_a_kill_while_making_leaves_the_old_set_and_no_litter(makers: Makers, tmp_path: Path) -> None:
    mini.make_all(tmp_path, 1, quiet)
    makers.fail = "hyperlora"
    with pytest.raises(KeyboardInterrupt):
        mini.make_all(tmp_path, 2, quiet)
    (tmp_path / ".mini-build-of-a-killed-run").mkdir()  # a SIGKILL runs no cleanup
    makers.fail = ""
    mini.make_all(tmp_path, 1, quiet)
    assert (tmp_path / "mini-sdxl" / "w.bin").read_bytes().startswith(b"sdxl 1")
    mini.make_all(tmp_path, 2, quiet)
    assert not list(tmp_path.glob(".mini-build-*"))


@pytest.mark.parametrize("then", [1, 2])
def test_a_kill_while_moving_is_mended(
    makers: Makers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: int
) -> None:
    mini.make_all(tmp_path, 1, quiet)
    replace, moved = mini.os.replace, []

    def dies_after_three(source: Path, target: Path) -> None:
        if Path(target).suffix == ".bin":
            if len(moved) == 3:
                raise KeyboardInterrupt
            moved.append(target)
        replace(source, target)

    monkeypatch.setattr(mini.os, "replace", dies_after_three)
    with pytest.raises(KeyboardInterrupt):
        mini.make_all(tmp_path, 2, quiet)
    monkeypatch.setattr(mini.os, "replace", replace)
    mini.make_all(tmp_path, then, quiet)  # seed 1 was listed before, but some files are of seed 2 now
    for path in tmp_path.rglob("w.bin"):
        assert f" {then} ".encode() in path.read_bytes()


@pytest.mark.slow
def test_the_real_miniatures_are_equal_twice_and_complete(tmp_path: Path) -> None:
    seconds = []
    for name in ("a", "b"):
        started = time.monotonic()
        mini.make_all(tmp_path / name, seed=3)
        seconds.append(time.monotonic() - started)
    first, second = (files.read_json(tmp_path / name / "mini.json") for name in ("a", "b"))
    assert first is not None
    assert second is not None
    differing = [k for k in first["files"] | second["files"] if first["files"].get(k) != second["files"].get(k)]
    assert differing == []

    settings = config.load("cpu-mini", values={"models": {"root": str(tmp_path / "a")}})
    named = {
        "faces.pack": settings.faces.pack,
        "faces.id_pack": settings.faces.id_pack,
        "matting.model": settings.matting.model,
        "prompts.model": settings.prompts.model,
        "prompts.vision_model": settings.prompts.vision_model,
        "first_frame.checkpoint": settings.first_frame.checkpoint,
        "first_frame.checkpoint_config": settings.first_frame.checkpoint_config,
        "first_frame.hyperlora": settings.first_frame.hyperlora,
        "first_frame.clip_vision": settings.first_frame.clip_vision,
        "video.model": settings.video.model,
        "evaluate.pack": settings.evaluate.pack,
        **{f"evaluate.{field}": getattr(settings.evaluate, field) for field in catalogue.fields_of(catalogue.NAMES)},
    }
    assert fetch.check({field: settings.models.path(name) for field, name in named.items()}) == []
    size = sum(facts["size"] for facts in first["files"].values())
    print(f"\n{len(first['files'])} files, {size / 1e6:.1f} MB, made in {seconds[0]:.1f} s and {seconds[1]:.1f} s")
    assert size < 300e6
