"""Models come from a mirror to a node's disk: once, whole, and checked."""

from __future__ import annotations

import json
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_server import s3_server

from ipvg_ray import cli, files, mirror, storage
from ipvg_ray.errors import ChecksumError, FetchError
from ipvg_ray.pipeline.staging import node_age
from ipvg_ray.storage import RunPath, S3Path


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as environment, s3_server(environment) as endpoint:
        yield endpoint


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> RunPath:
    if request.param == "folder":
        return tmp_path / "mirror"
    request.getfixturevalue("server")
    return S3Path("runs", f"models-{uuid.uuid4().hex}")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    (root / "wan/transformer").mkdir(parents=True)
    (root / "wan/config.json").write_text("{}")
    (root / "wan/transformer/weights.safetensors").write_bytes(bytes(range(256)) * 30_000)
    (root / "single.safetensors").write_bytes(b"weights")
    return root


def quiet(line: str) -> None:
    pass


@pytest.mark.parametrize("name", ["wan", "single.safetensors", "wan/transformer"])
def test_what_is_taken_is_what_was_published(name: str, root: Path, place: RunPath, tmp_path: Path) -> None:
    assert mirror.publish(name, root, place, quiet)
    assert not mirror.publish(name, root, place, quiet), "it is there already"
    node = tmp_path / "node"
    assert mirror.take(name, node, place, quiet)
    assert not mirror.take(name, node, place, quiet), "this machine has it"
    for file in [root / name] if (root / name).is_file() else (root / name).rglob("*"):
        if file.is_file():
            assert (node / file.relative_to(root)).read_bytes() == file.read_bytes()
    assert not list((node / ".mirrored").glob("*.part"))


def test_many_workers_of_a_node_fetch_once(root: Path, place: RunPath, tmp_path: Path) -> None:
    mirror.publish("wan", root, place, quiet)
    fetched: list[bool] = []
    threads = [
        threading.Thread(target=lambda: fetched.append(mirror.take("wan", tmp_path / "node", place, quiet)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(fetched) == [False] * 5 + [True]


def test_a_new_version_replaces_the_old_one(root: Path, place: RunPath, tmp_path: Path) -> None:
    mirror.publish("wan", root, place, quiet)
    mirror.take("wan", tmp_path / "node", place, quiet)
    (root / "wan/config.json").write_text('{"new": 1}')
    assert mirror.publish("wan", root, place, quiet)
    assert mirror.take("wan", tmp_path / "node", place, quiet)
    assert (tmp_path / "node/wan/config.json").read_text() == '{"new": 1}'


def test_what_came_before_a_cut_is_kept(
    root: Path, place: RunPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.publish("wan", root, place, quiet)
    copied: list[str] = []

    def cut(source: RunPath, target: RunPath) -> None:
        if source.name == "config.json" and "cut" not in copied:
            copied.append("cut")
            raise storage.StorageError("the network is gone")
        copied.append(source.name)
        whole(source, target)

    whole = mirror._copy
    monkeypatch.setattr(mirror, "_copy", cut)
    with pytest.raises(storage.StorageError):
        mirror.take("wan", tmp_path / "node", place, quiet)
    assert not (tmp_path / "node/wan").exists()
    mirror.take("wan", tmp_path / "node", place, quiet)
    assert copied.count("weights.safetensors") == 1


def test_a_damaged_mirror_is_named(root: Path, place: RunPath, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="does not have wan; put it there with `ipvg-ray models mirror`"):
        mirror.take("wan", tmp_path / "node", place, quiet)
    mirror.publish("wan", root, place, quiet)
    damaged = place / "wan" / "config.json"
    damaged.unlink()
    with pytest.raises(FetchError, match="is listed in the mirror and is not there"):
        mirror.take("wan", tmp_path / "node", place, quiet)
    damaged.write_text("[]")
    with pytest.raises(ChecksumError, match=r"config.json has another SHA-256"):
        mirror.take("wan", tmp_path / "node", place, quiet)
    assert not (tmp_path / "node/wan").exists()
    with pytest.raises(FetchError, match="ipvg-ray models pull"):
        mirror.publish("none", root, place, quiet)


@pytest.mark.parametrize("path", ["../outside", "a/../../outside", "{tmp_path}/outside"])
def test_a_listing_that_leads_out_of_the_model_is_refused(path: str, root: Path, tmp_path: Path) -> None:
    place = tmp_path / "mirror"
    mirror.publish("single.safetensors", root, place, quiet)
    listing = place / ".listings/single.safetensors.json"
    facts = json.loads(listing.read_text())
    part = path.format(tmp_path=tmp_path)
    listing.write_text(json.dumps(facts | {"files": {part: facts["files"]["."]}}))
    with pytest.raises(FetchError, match=r"outside' for single\.safetensors, which lies outside of the model"):
        mirror.take("single.safetensors", tmp_path / "node", place, quiet)
    assert not list(tmp_path.rglob("outside"))


@pytest.mark.parametrize("link", [False, True])
def test_a_copy_that_did_not_come_from_the_mirror_is_its_owner_s(link: bool, root: Path, tmp_path: Path) -> None:
    place, node, own = tmp_path / "mirror", tmp_path / "node", tmp_path / "own"
    mirror.publish("wan", root, place, quiet)
    shutil.copytree(root / "wan", own / "wan")
    node.mkdir()
    (node / "wan").symlink_to(own / "wan") if link else (own / "wan").rename(node / "wan")
    assert not mirror.take("wan", node, place, quiet), "it is the same model"
    (node / "wan/config.json").write_text('{"tuned": 1}')
    with pytest.raises(FetchError, match=r"wan did not come from the mirror .*; move it away"):
        mirror.take("wan", node, place, quiet)
    assert (node / "wan/config.json").read_text() == '{"tuned": 1}'


def test_a_copy_that_was_cut_off_while_it_moved_in_is_replaced(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, node = tmp_path / "mirror", tmp_path / "node"
    mirror.publish("wan", root, place, quiet)
    whole = files.write_json

    def cut(path: Path, value: Any) -> None:
        if value:
            raise KeyboardInterrupt
        whole(path, value)

    monkeypatch.setattr(files, "write_json", cut)
    with pytest.raises(KeyboardInterrupt):
        mirror.take("wan", node, place, quiet)
    monkeypatch.undo()
    (node / "wan/config.json").unlink()
    assert mirror.take("wan", node, place, quiet)
    assert (node / "wan/config.json").read_text() == "{}"


def test_the_models_of_a_profile_are_mirrored_and_taken(
    mini_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ipvg_ray import config
    from ipvg_ray.pipeline.staging import take_models
    from ipvg_ray.stages import make_stages

    place, node = tmp_path / "mirror", tmp_path / "node"
    assert cli.main(["models", "mirror", str(place), "--profile", "cpu-mini", "-s", f"models.root={mini_models}"]) == 0
    assert "mini-wan-vace: mirrored" in capsys.readouterr().out
    stages = make_stages(config.load("cpu-mini", overrides=[f"models.root={node}", f"models.mirror={place}"]))
    taken = take_models(stages)
    assert "mini-wan-vace" in taken
    assert take_models(stages) == []
    assert all(path.exists() for stage in stages for path in stage.models().values())
    assert len(stages[-1].usable()[0]) == len(stages[-1].config.evaluate.metrics), "those of the metrics came along"
    assert json.loads((node / ".mirrored/mini-wan-vace.json").read_text())["model"] == "mini-wan-vace"


def test_models_that_a_stage_can_do_without_may_lack_in_the_mirror(mini_models: Path, tmp_path: Path) -> None:
    from ipvg_ray import config
    from ipvg_ray.pipeline.staging import take_models
    from ipvg_ray.stages.evaluate import EvaluateStage

    place = tmp_path / "mirror"
    section = config.load("cpu-mini").evaluate
    for name in (section.pack, section.amt):
        mirror.publish(name, mini_models, place, quiet)
    places = [f"models.root={tmp_path / 'node'}", f"models.mirror={place}"]
    stage = EvaluateStage(config.load("cpu-mini", overrides=places))
    assert take_models([stage]) == [section.amt, section.pack]
    assert stage.usable()[0] == ["motion_smoothness"]


def test_the_age_of_a_node_is_told() -> None:
    assert 0 < node_age() < 10**7
