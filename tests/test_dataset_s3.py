"""Identity sets in an object store: moto's S3 server on this machine stands in for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from identity_sets import picture, vip
from s3_server import s3_server

from ipvg_ray import tables
from ipvg_ray.config import DatasetConfig
from ipvg_ray.dataset import places
from ipvg_ray.dataset.formats import detect_format
from ipvg_ray.dataset.freeze import freeze
from ipvg_ray.dataset.problems import DatasetError
from ipvg_ray.media.images import image_bytes

pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[pafs.S3FileSystem]:
    with s3_server(monkeypatch, "faces") as endpoint:
        places._remote.cache_clear()
        # The constructor, unlike from_uri, does not look at AWS_ENDPOINT_URL.
        address = endpoint.removeprefix("http://")
        yield pafs.S3FileSystem(
            allow_bucket_creation=True, endpoint_override=address, scheme="http", region="us-east-1"
        )
    places._remote.cache_clear()


def upload(store: pafs.S3FileSystem, key: str, data: bytes) -> None:
    with store.open_output_stream(key) as stream:
        stream.write(data)


def test_a_vip_set_in_a_bucket(bucket: pafs.S3FileSystem, tmp_path: Path) -> None:
    root = vip(tmp_path / "set", identities=3, prompts=2)
    for file in root.rglob("*.*"):
        upload(bucket, f"faces/my set/raw/{file.relative_to(root)}", file.read_bytes())
    upload(bucket, "faces/my set/raw/id002/image.png", b"broken")
    path = "s3://faces/my%20set"
    assert detect_format(path) == "vip200k"
    summary = freeze(DatasetConfig(path=path), tmp_path / "out")
    assert (summary.identities, summary.samples, summary.kinds) == (2, 4, {"broken_image": 1})
    row = tables.read_table(tmp_path / "out", "identities").to_pylist()[0]
    assert row["image"]["path"] == "s3://faces/my%20set/raw/id001/image.png"
    assert image_bytes(row["image"], row["image_sha256"]) == picture(1)  # the stages read it by that URI


def test_tables_in_a_bucket(bucket: pafs.S3FileSystem, tmp_path: Path) -> None:
    for name in ("a", "b"):
        upload(bucket, f"faces/pics/{name}.png", picture(ord(name)))
    rows = [{"identity_id": n, "image": f"../pics/{n}.png", "prompt": "x"} for n in ("a", "b", "gone")]
    upload(bucket, "faces/t/set.jsonl", "\n".join(map(json.dumps, rows)).encode())
    upload(bucket, "faces/t/set.csv", b"identity_id,image,prompt\na,s3://faces/pics/a.png,y\n")
    upload(bucket, "faces/t/eval.json", json.dumps([{"img": "../pics/b.png", "prompt": "z"}]).encode())
    upload(bucket, "faces/pics/prompts.json", json.dumps({"a": "1", "b": {"1": "2"}}).encode())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows[:2]), sink)
    upload(bucket, "faces/t/set.parquet", sink.getvalue().to_pybytes())
    for number, (path, counts) in enumerate(
        {
            "t/set.jsonl": (2, 1),
            "t/set.csv": (1, 0),
            "t/eval.json": (1, 0),
            "pics": (2, 0),
            "t/set.parquet": (2, 0),
        }.items()
    ):
        summary = freeze(DatasetConfig(path=f"s3://faces/{path}"), tmp_path / str(number))
        assert (summary.identities, summary.problems) == counts, path


def test_what_is_not_in_the_bucket(bucket: pafs.S3FileSystem, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="there is no file or folder s3://faces/nothing"):
        freeze(DatasetConfig(path="s3://faces/nothing"), tmp_path / "out")
