"""Several reference pictures of one identity, through every kind of input, into the frozen set."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from identity_sets import jsonl, picture, put, read

from ipvg_ray import tables
from ipvg_ray.config import DatasetConfig
from ipvg_ray.dataset.freeze import freeze
from ipvg_ray.dataset.picture_folder import references


def frozen(tmp_path: Path, **settings: Any) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Identities, and (kind, message) of the failures."""
    freeze(DatasetConfig(**settings), tmp_path / "out")
    failures = tables.read_table(tmp_path / "out", "failures").to_pylist()
    return tables.read_table(tmp_path / "out", "identities").to_pylist(), [(f["kind"], f["message"]) for f in failures]


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_which_files_of_a_folder_are_references() -> None:
    files = ["image10.png", "image.png", "image2.jpg", "image2.webp", "prompt1.txt", "Image3.PNG", "image.txt", "x.png"]
    assert references(files) == (["image.png", "image2.jpg", "Image3.PNG", "image10.png"], ["image2.webp"])
    assert references(["image3.png", "image1.png"])[0] == ["image1.png", "image3.png"]
    assert references([]) == ([], [])


def test_pictures_beside_the_first_of_a_vip_folder(tmp_path: Path) -> None:
    for number, name in enumerate(("image.png", "image2.png", "image10.jpg")):
        put(tmp_path / "set/a" / name, picture(number, kind="JPEG" if name.endswith("jpg") else "PNG"))
    put(tmp_path / "set/a/prompt1.txt", "x")
    put(tmp_path / "set/b/image.png", picture(5))
    put(tmp_path / "set/b/prompt1.txt", "y")
    (a, b), failures = frozen(tmp_path, path=str(tmp_path / "set"))
    assert not failures
    assert a["image_sha256"] == sha(picture(0))
    assert [Path(one["path"]).name for one in a["more_images"]] == ["image2.png", "image10.jpg"]
    assert a["more_images_sha256"] == [sha(picture(1)), sha(picture(2, kind="JPEG"))]
    assert b["more_images"] is None
    assert b["more_images_sha256"] is None


def test_pictures_in_an_identitys_folder_beside_keyed_prompts(tmp_path: Path) -> None:
    put(tmp_path / "set/eve/image1.png", picture(1))
    put(tmp_path / "set/eve/image2.png", picture(2))
    put(tmp_path / "set/prompts.json", json.dumps({"eve": {"1": "x", "2": "y"}}))
    rows, _ = read(tmp_path, path=str(tmp_path / "set/prompts.json"))
    assert [row["image"] for row in rows] == [str(tmp_path / "set/eve/image1.png")] * 2
    assert rows[0]["more"] == [str(tmp_path / "set/eve/image2.png")]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "paths", "bytes", "structs"])
def test_lists_of_pictures_in_tables(tmp_path: Path, kind: str) -> None:
    data = [picture(n) for n in range(4)]
    for n, one in enumerate(data):
        put(tmp_path / f"set/{n}.png", one)
    names = [["0.png", "1.png", "2.png"], ["3.png"]]
    if kind == "csv":
        lines = ["identity_id,image,prompt", '"a","[""0.png"", ""1.png"", ""2.png""]",x', "b,3.png,y"]
        path = put(tmp_path / "set/set.csv", "\n".join(lines))
    elif kind == "jsonl":
        rows = [{"identity_id": i, "image": n, "prompt": p} for i, n, p in zip("ab", names, "xy", strict=True)]
        path = jsonl(tmp_path / "set/set.jsonl", rows)
    else:
        cells: list[Any] = names
        if kind == "bytes":
            cells = [data[:3], data[3:]]
        elif kind == "structs":
            cells = [[{"bytes": one, "path": None} for one in data[:3]], [{"bytes": None, "path": "3.png"}]]
        path = tmp_path / "set/set.parquet"
        pq.write_table(pa.table({"identity_id": ["a", "b"], "image": cells, "prompt": ["x", "y"]}), path)
    (a, b), failures = frozen(tmp_path, path=str(path))
    assert not failures
    assert a["image_sha256"] == sha(data[0])
    assert a["more_images_sha256"] == [sha(data[1]), sha(data[2])]
    carried = kind in ("bytes", "structs")
    assert [one["bytes"] for one in a["more_images"]] == (data[1:3] if carried else [None, None])
    assert (b["image_sha256"], b["more_images"]) == (sha(data[3]), None)


def test_a_picture_that_is_carried_twice_is_kept_once(tmp_path: Path) -> None:
    data = [picture(n) for n in range(2)]
    table = pa.table({"identity_id": ["a", "a"], "image": [data, data], "prompt": ["x", "y"]})
    pq.write_table(table, tmp_path / "set.parquet")
    (a,), failures = frozen(tmp_path, path=str(tmp_path / "set.parquet"))
    assert not failures
    assert [one["bytes"] for one in a["more_images"]] == data[1:]


def test_a_bad_further_picture_is_left_out_and_named(tmp_path: Path) -> None:
    for n in range(2):
        put(tmp_path / f"set/{n}.png", picture(n))
    put(tmp_path / "set/words.png", "no picture")
    rows = [{"identity_id": "a", "image": ["0.png", "words.png", "gone.png", "1.png"], "prompt": "x"}]
    (a,), failures = frozen(tmp_path, path=str(jsonl(tmp_path / "set/set.jsonl", rows)))
    assert a["more_images_sha256"] == [sha(picture(1))]
    assert [kind for kind, _ in failures] == ["broken_image", "missing_image"]
    assert all(message.startswith("a further picture is left out: ") for _, message in failures)


def test_pictures_beyond_the_most_are_left_out(tmp_path: Path) -> None:
    for n in range(3):
        put(tmp_path / f"set/{n}.png", picture(n))
    rows = [{"identity_id": "a", "image": ["0.png", "1.png", "2.png"], "prompt": "x"}]
    path = str(jsonl(tmp_path / "set/set.jsonl", rows))
    (a,), failures = frozen(tmp_path / "two", path=path, max_references=2)
    assert len(a["more_images"]) == 1
    assert [kind for kind, _ in failures] == ["too_many_images"]
    (a,), failures = frozen(tmp_path / "one", path=path, max_references=1)
    assert a["more_images"] is None
    assert not failures, "who asks for one picture wants no report of the others"


def test_a_file_name_with_a_bracket_is_no_list(tmp_path: Path) -> None:
    rows = [{"identity_id": "a", "image": "[1] a.png", "prompt": "x"}]
    found, problems = read(tmp_path, path=str(jsonl(tmp_path / "set.jsonl", rows)))
    assert [row["image"] for row in found] == [str(tmp_path / "[1] a.png")]
    assert not problems


@pytest.mark.parametrize("image", ['["a.png",]', "[]", '[""]', "[7.5]"])
def test_a_list_that_cannot_be_read_is_named(tmp_path: Path, image: str) -> None:
    rows = [{"identity_id": "a", "image": image, "prompt": "x"}, {"identity_id": "b", "image": "b.png", "prompt": "y"}]
    found, problems = read(tmp_path, path=str(jsonl(tmp_path / "set.jsonl", rows)))
    assert [row["identity_id"] for row in found] == ["b"]
    assert [(p.kind, p.identity_id) for p in problems] == [("unreadable_row", "")]


@pytest.mark.parametrize("cell", [[], None, ["a.png", None], [""]])
def test_a_parquet_list_without_a_picture_is_named(tmp_path: Path, cell: Any) -> None:
    images = pa.array([cell, ["b.png", "c.png"]], pa.list_(pa.string()))
    table = pa.table({"identity_id": ["a", "b"], "image": images, "prompt": ["x", "y"]})
    pq.write_table(table, tmp_path / "set.parquet")
    rows, problems = read(tmp_path, path=str(tmp_path / "set.parquet"))
    assert [(row["identity_id"], row["image"], row["more"]) for row in rows] == [
        ("b", str(tmp_path / "b.png"), [str(tmp_path / "c.png")])
    ]
    assert [(p.kind, p.identity_id) for p in problems] == [("unreadable_row", "a")]
