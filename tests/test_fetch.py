"""Pulling models: from a server of our own on the loopback, and from a Hub that is played."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from file_server import DATA, Server, archive, quiet, serving

from ipvg_ray import files
from ipvg_ray.models import download as dl
from ipvg_ray.models import fetch, registry
from ipvg_ray.models.registry.rows import APACHE, HYPERLORA, HubSource, Licence, Model, UrlSource


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


# --- models from URLs


def register(monkeypatch: pytest.MonkeyPatch, name: str, source: UrlSource | HubSource, **more: Any) -> Model:
    licence: Licence = more.get("licence", APACHE)
    model = Model(name, (), "test", source, 1000, licence, more.get("needs", ()), "here")
    monkeypatch.setattr(registry, "MODELS", (*registry.MODELS, model))
    return model


def test_a_zipped_model_is_pulled_once(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.content = archive(("pack/x.onnx", b"one"), ("pack/y.onnx", b"two"))
    source = UrlSource(server.url, len(server.content), hashlib.sha256(server.content).hexdigest(), "zip", "pack")
    register(monkeypatch, "packs/pack", source, needs=("x.onnx",))

    items = fetch.plan_pull(["packs/pack", "packs/pack"], tmp_path)
    assert [(i.state, i.size, i.exact) for i in items] == [("missing", len(server.content), True)]
    assert f"sha256 {source.sha256}" in fetch.describe(items)
    assert fetch.check({"faces.pack": tmp_path / "packs/pack"})[0].reason == "nothing is there"

    assert fetch.pull(items, tmp_path, report=quiet) == [tmp_path / "packs" / "pack"]
    assert (tmp_path / "packs/pack/y.onnx").read_bytes() == b"two"
    assert fetch.check({"faces.pack": tmp_path / "packs/pack"}, verify=True) == []
    again = fetch.plan_pull(["packs/pack"], tmp_path)
    assert [i.state for i in again] == ["present"]
    fetch.pull(again, tmp_path, report=quiet)
    assert len(server.requests) == 1
    assert not any((tmp_path / ".pull").glob("packs*"))


def test_a_damaged_model_is_noticed_and_pulled_anew(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, "model.bin", UrlSource(server.url))
    place = tmp_path / "model.bin"
    fetch.pull(fetch.plan_pull(["model.bin"], tmp_path), tmp_path, report=quiet)
    place.write_bytes(b"x" + DATA[1:])
    assert fetch.check({"f": place}) == []  # the size is right: only a full check sees it
    assert "changed" in fetch.check({"f": place}, verify=True)[0].reason
    place.write_bytes(b"x")
    assert "changed" in fetch.check({"f": place})[0].reason
    items = fetch.plan_pull(["model.bin"], tmp_path)
    assert items[0].state == "incomplete"
    fetch.pull(items, tmp_path, report=quiet)
    assert place.read_bytes() == DATA


def test_a_cut_pull_leaves_nothing_that_looks_like_a_model(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, "model.bin", UrlSource(server.url))
    monkeypatch.setattr(fetch, "download", lambda *a, **k: dl.download(*a, **{**k, "tries": 1}))
    server.cut, server.cuts = 300_000, 1
    with pytest.raises(fetch.NetworkError):
        fetch.pull(fetch.plan_pull(["model.bin"], tmp_path), tmp_path, report=quiet)
    assert not (tmp_path / "model.bin").exists()
    items = fetch.plan_pull(["model.bin"], tmp_path)
    assert items[0].state == "missing"
    assert items[0].held > 0
    fetch.pull(items, tmp_path, report=quiet)
    assert sum(sent for _, sent in server.requests) == len(DATA)


def test_non_commercial_terms_must_be_accepted_before_anything_is_fetched(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, "free.bin", UrlSource(server.url))
    register(monkeypatch, "nc.bin", UrlSource(server.url), licence=HYPERLORA)
    items = fetch.plan_pull(["free.bin", "nc.bin"], tmp_path)
    with pytest.raises(fetch.LicenceError, match=r"nc\.bin: CC-BY-NC-4\.0[\s\S]*--accept-licence"):
        fetch.pull(items, tmp_path, report=quiet)
    assert server.requests == []
    fetch.pull(items, tmp_path, accept_licence=True, report=quiet)
    assert (tmp_path / "nc.bin").exists()


def test_a_disk_that_is_too_small_is_said_before(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, "huge.bin", UrlSource(server.url, size=10**18))
    with pytest.raises(fetch.FetchError, match="GB free"):
        fetch.pull(fetch.plan_pull(["huge.bin"], tmp_path), tmp_path, report=quiet)
    assert server.requests == []


# --- models from the Hub


class FakeHub:
    """A repository at one commit, and a client that copies its files, leaving out those in `lost`."""

    def __init__(self, content: dict[str, bytes]) -> None:
        self.content = content
        self.lost: set[str] = set()
        self.error: Exception | None = None
        self.calls: list[dict[str, Any]] = []

    def model_info(self, repo: str, **options: Any) -> Any:
        assert options["files_metadata"] is True
        if self.error:
            raise self.error
        siblings = [self._sibling(name, data) for name, data in self.content.items()]
        return types.SimpleNamespace(sha="c0ffee" * 6, siblings=siblings)

    def _sibling(self, name: str, data: bytes) -> Any:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        lfs = {"sha256": hashlib.sha256(data).hexdigest()} if name.endswith(".safetensors") else None
        return types.SimpleNamespace(rfilename=name, size=len(data), blob_id=blob, lfs=lfs)

    def snapshot(self, repo: str, *, revision: str, local_dir: Path, allow_patterns: list[str]) -> str:
        from huggingface_hub.utils import filter_repo_objects

        self.calls.append({"repo": repo, "revision": revision})
        (local_dir / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
        for name in filter_repo_objects(self.content, allow_patterns=allow_patterns):
            if name not in self.lost:
                (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
                (local_dir / name).write_bytes(self.content[name])
        return str(local_dir)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    import huggingface_hub

    made = FakeHub(
        {
            "config.json": b"{}",
            "a/one.safetensors": b"1" * 1000,
            "a/two.safetensors": b"2" * 500,
            "a/one.safetensors.index.json": b'{"weight_map": {"x": "one.safetensors", "y": "two.safetensors"}}',
            "unwanted.bin": b"3" * 9999,
        }
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot)
    return made


WHOLE = HubSource("owner/name", ("config.json", "a/*"))


def test_a_repository_is_pulled_at_one_commit(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, "repo", WHOLE, needs=("config.json",))
    items = fetch.plan_pull(["repo"], tmp_path, api=hub)
    assert items[0].size == sum(len(v) for k, v in hub.content.items() if k != "unwanted.bin")
    assert "2 sha256, 2 git" in items[0].checksums
    fetch.pull(items, tmp_path, report=quiet, api=hub)
    names = [p.relative_to(tmp_path / "repo").as_posix() for p in files.files_below(tmp_path / "repo")]
    assert names == ["a/one.safetensors", "a/one.safetensors.index.json", "a/two.safetensors", "config.json"]
    assert hub.calls == [{"repo": "owner/name", "revision": "c0ffee" * 6}]
    assert fetch.check({"f": tmp_path / "repo"}, verify=True) == []


@pytest.mark.parametrize(
    ("subpath", "allow", "name"), [("a", "a/*", "folder"), ("a/one.safetensors", "a/one.safetensors", "one.st")]
)
def test_part_of_a_repository_can_be_a_model(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subpath: str, allow: str, name: str
) -> None:
    register(monkeypatch, name, HubSource("owner/name", (allow,), subpath=subpath))
    fetch.pull(fetch.plan_pull([name], tmp_path, api=hub), tmp_path, report=quiet, api=hub)
    made = tmp_path / name
    assert (made if made.is_file() else made / "one.safetensors").read_bytes() == b"1" * 1000
    assert fetch.check({"f": made}, verify=True) == []
    assert fetch.plan_pull([name], tmp_path, api=hub)[0].state == "present"


def test_an_unfinished_snapshot_is_not_taken_for_a_whole_one(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, "repo", WHOLE)
    hub.lost = {"a/two.safetensors"}
    with pytest.raises(fetch.NetworkError, match=r"a/two\.safetensors did not come"):
        fetch.pull(fetch.plan_pull(["repo"], tmp_path, api=hub), tmp_path, report=quiet, api=hub)
    assert not (tmp_path / "repo").exists()
    items = fetch.plan_pull(["repo"], tmp_path, api=hub)
    assert (items[0].state, items[0].held > 1000) == ("missing", True)
    hub.lost = set()
    fetch.pull(items, tmp_path, report=quiet, api=hub)
    assert fetch.check({"f": tmp_path / "repo"}, verify=True) == []


@pytest.mark.parametrize("name", ["a/one.safetensors", "config.json"])
def test_a_file_that_is_not_the_announced_one_is_refused(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    register(monkeypatch, "repo", WHOLE)
    items = fetch.plan_pull(["repo"], tmp_path, api=hub)
    hub.content[name] = b"?" * len(hub.content[name])
    with pytest.raises(fetch.ChecksumError, match=name):
        fetch.pull(items, tmp_path, report=quiet, api=hub)
    assert not (tmp_path / "repo").exists()
    assert not (tmp_path / ".pull" / "repo" / name).exists()


def test_the_plan_is_made_without_a_network_and_the_pull_says_so(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, "repo", WHOLE)
    hub.error = ConnectionError("no route")
    items = fetch.plan_pull(["repo"], tmp_path, api=hub)
    assert (items[0].state, items[0].exact, items[0].size) == ("missing", False, 1000)
    assert "cannot be reached: no route" in fetch.describe(items)
    with pytest.raises(fetch.NetworkError, match="cannot be reached"):
        fetch.pull(items, tmp_path, report=quiet, api=hub)


# --- what is there


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: (p / "config.json").unlink(), "lacks config.json"),
        (lambda p: (p / "a" / "two.safetensors").unlink(), "lacks two.safetensors"),
    ],
)
def test_a_model_placed_by_hand_is_looked_through(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None], reason: str
) -> None:
    register(monkeypatch, "repo", WHOLE, needs=("config.json",))
    hub.snapshot("x", revision="", local_dir=tmp_path / "repo", allow_patterns=["*"])
    items = fetch.plan_pull(["repo"], tmp_path, api=hub)
    assert items[0].state == "present"
    assert "placed by hand" in items[0].note
    spoil(tmp_path / "repo")
    missing = fetch.check({"video.model": tmp_path / "repo"})
    assert [m.reason for m in missing] == [reason]
    assert "models pull" in str(missing[0])
    with pytest.raises(fetch.FetchError, match="was not pulled by this program"):
        fetch.pull(fetch.plan_pull(["repo"], tmp_path, api=hub), tmp_path, report=quiet, api=hub)
    assert hub.calls[1:] == []


def test_what_is_not_in_the_table_only_has_to_exist(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    paths = {"a.model": tmp_path / "mine", "b.model": tmp_path / "other", "c.model": tmp_path / "mini-qwen3"}
    missing = fetch.check(paths)
    assert [(m.field, m.mend) for m in missing] == [
        ("b.model", "name a file or folder that exists"),
        ("c.model", "make it with `ipvg-ray models make-mini`"),
    ]
