"""Single files and archives, from a server of our own on the loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from file_server import DATA, SHA, Server, archive, quiet, serving

from ipvg_ray import files
from ipvg_ray.models import download as dl
from ipvg_ray.models import fetch


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def get(url: str, target: Path, **options: Any) -> dl.Downloaded:
    return dl.download(url, target, report=quiet, wait=0.0, timeout=5.0, **options)


def test_a_whole_file_is_fetched_and_described(server: Server, tmp_path: Path) -> None:
    found = get(server.url, tmp_path / "m.bin", size=len(DATA), sha256=SHA)
    assert found == dl.Downloaded(len(DATA), SHA)
    assert (tmp_path / "m.bin").read_bytes() == DATA
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.bin"]


def test_a_cut_connection_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.cut, server.cuts = 300_000, 2
    get(server.url, tmp_path / "m.bin", sha256=SHA)
    assert [asked for asked, _ in server.requests] == [None, "bytes=300000-", "bytes=600000-"]
    assert sum(sent for _, sent in server.requests) == len(DATA)


def test_a_later_call_goes_on_too(server: Server, tmp_path: Path) -> None:
    server.cut, server.cuts = 300_000, 1
    with pytest.raises(fetch.NetworkError, match="300,000 bytes are kept"):
        get(server.url, tmp_path / "m.bin", tries=1)
    assert not (tmp_path / "m.bin").exists()
    get(server.url, tmp_path / "m.bin")
    assert (tmp_path / "m.bin").read_bytes() == DATA
    assert server.requests[-1] == ("bytes=300000-", len(DATA) - 300_000)


def test_a_file_that_changed_meanwhile_is_begun_anew(server: Server, tmp_path: Path) -> None:
    server.cut, server.cuts = 300_000, 1
    with pytest.raises(fetch.NetworkError):
        get(server.url, tmp_path / "m.bin", tries=1)
    server.content, server.etag = DATA[::-1], '"v2"'
    get(server.url, tmp_path / "m.bin")
    assert (tmp_path / "m.bin").read_bytes() == DATA[::-1]


def test_without_validator_and_checksum_nothing_is_joined(server: Server, tmp_path: Path) -> None:
    server.etag, server.cut, server.cuts = None, 300_000, 1
    get(server.url, tmp_path / "m.bin")
    assert [asked for asked, _ in server.requests] == [None, None]
    assert (tmp_path / "m.bin").read_bytes() == DATA


def test_a_server_without_ranges_still_gives_the_file(server: Server, tmp_path: Path) -> None:
    server.ranges, server.cut, server.cuts = False, 300_000, 1
    get(server.url, tmp_path / "m.bin", sha256=SHA)
    assert (tmp_path / "m.bin").read_bytes() == DATA


def test_a_file_cut_after_its_last_byte_is_whole(server: Server, tmp_path: Path) -> None:
    (tmp_path / "m.bin.part").write_bytes(DATA)
    get(server.url, tmp_path / "m.bin", sha256=SHA)
    assert (tmp_path / "m.bin").read_bytes() == DATA
    assert server.requests == []


def test_the_first_digits_of_a_checksum_are_checked(server: Server, tmp_path: Path) -> None:
    assert get(server.url, tmp_path / "m.bin", sha256=SHA[:8]).sha256 == SHA


@pytest.mark.parametrize("wrong", [{"sha256": "0" * 64}, {"sha256": SHA[1:9]}, {"size": 5}])
def test_a_wrong_file_is_thrown_away(server: Server, tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(fetch.ChecksumError, match="thrown away"):
        get(server.url, tmp_path / "m.bin", **wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_there_is_not_tried_again(server: Server, tmp_path: Path) -> None:
    with pytest.raises(fetch.FetchError, match="404"):
        get(server.url.replace("model.bin", "gone"), tmp_path / "m.bin")


def test_without_network_the_message_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(fetch.NetworkError, match="run the same command again"):
        get("http://127.0.0.1:9/x", tmp_path / "m.bin", tries=2)


# --- archives


@pytest.mark.parametrize(
    "content",
    [
        archive(("ok.onnx", b"1"), ("../out.onnx", b"2")),
        archive(("ok.onnx", b"1"), ("/abs.onnx", b"2")),
        archive(("ok.onnx", b"1"), ("a\\..\\..\\out.onnx", b"2")),
        archive(("ok.onnx", b"1"), link="pointer"),
    ],
)
def test_an_archive_that_leaves_its_folder_is_refused_whole(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(dl.UnsafeArchiveError, match="outside its folder"):
        dl.unzip(tmp_path / "a.zip", tmp_path / "in" / "deep")
    assert [p.name for p in tmp_path.rglob("*")] == ["a.zip"]


def test_the_folder_of_the_same_name_is_taken_off(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(archive(("pack/", b""), ("pack/x.onnx", b"1"), ("pack/s/y.onnx", b"2")))
    dl.unzip(tmp_path / "a.zip", tmp_path / "in", strip="pack")
    assert [p.relative_to(tmp_path).as_posix() for p in files.files_below(tmp_path / "in")] == [
        "in/s/y.onnx",
        "in/x.onnx",
    ]
    with pytest.raises(fetch.FetchError, match="outside of the folder"):
        dl.unzip(tmp_path / "a.zip", tmp_path / "in2", strip="other")
