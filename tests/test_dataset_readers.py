"""Readers of identity sets: what they hand on, and how they name what they cannot read."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from identity_sets import jsonl, picture, put, read, vip

from ipvg_ray.dataset import json_stream
from ipvg_ray.dataset.formats import detect_format
from ipvg_ray.dataset.json_stream import JsonError, elements
from ipvg_ray.dataset.places import open_place
from ipvg_ray.dataset.problems import DatasetError

Rows = list[dict[str, Any]]


def brief(rows: Rows) -> list[tuple[Any, ...]]:
    return [
        (r["identity_id"], Path(r["image"]).name if r["image"] else None, r["prompt_id"], r["prompt"]) for r in rows
    ]


# -- VIP-200K ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", ["", "raw"])
def test_vip_layout_with_and_without_raw(tmp_path: Path, raw: str) -> None:
    vip(tmp_path / "set" / raw, identities=2, prompts=11)
    rows, problems = read(tmp_path, path=str(tmp_path / "set"))
    assert [r["prompt_id"] for r in rows[:11]] == [f"prompt{k}" for k in range(1, 12)]  # by number, not by letter
    assert brief(rows)[0] == ("id001", "image.png", "prompt1", "person 1 does thing 1")
    assert rows[0]["where"].endswith("id001/prompt1.txt")
    assert [r["identity_id"] for r in rows] == ["id001"] * 11 + ["id002"] * 11
    assert not problems


@pytest.mark.parametrize("name", ["image.jpg", "image.jpeg", "image.webp", "image.PNG"])
def test_vip_takes_all_kinds_of_pictures(tmp_path: Path, name: str) -> None:
    put(tmp_path / "set/a/prompt1.txt", "x")
    put(tmp_path / "set/a" / name, b"")
    assert brief(read(tmp_path, path=str(tmp_path / "set"))[0]) == [("a", name, "prompt1", "x")]


def test_vip_names_what_is_wrong_in_a_folder(tmp_path: Path) -> None:
    root = vip(tmp_path / "set", identities=1, prompts=1)
    put(root / "id001/image.jpg", picture(7, kind="JPEG"))
    put(root / "id001/prompt2.txt", "caf\u00e9".encode("latin-1"))
    put(root / "id001/prompt3.txt", b"\xef\xbb\xbfwith a mark\r\n")
    put(root / "nopicture/prompt1.txt", "x")
    put(root / "noprompt/image.png", picture(2))
    put(root / "idle.md", "not an identity")
    rows, problems = read(tmp_path, path=str(root), format="vip200k")
    assert [(p.kind, p.identity_id) for p in problems] == [("duplicate_identity", "id001")]
    assert problems[0].where is not None
    assert problems[0].where.endswith("image.jpg")
    found = {(r["identity_id"], r["prompt_id"]): (r["kind"], r["prompt"]) for r in rows}
    assert found[("id001", "prompt2")] == ("prompt_encoding", None)
    assert found[("id001", "prompt3")] == (None, "with a mark")
    assert found[("nopicture", "prompt1")][0] == "missing_image"
    assert found[("noprompt", None)] == (None, None)


def test_vip_limit_does_not_read_the_rest(tmp_path: Path) -> None:
    rows, _ = read(tmp_path, path=str(vip(tmp_path / "set", identities=5)), limit=2)
    assert {r["identity_id"] for r in rows} == {"id001", "id002"}


# -- a folder of pictures ------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for i, name in enumerate(["ann.png", "bob.jpg", "cy d.webp"]):
        put(tmp_path / "faces" / name, picture(i))
    put(tmp_path / "faces/notes.md", "x")
    return tmp_path / "faces"


def test_text_prompts_go_to_every_picture(tmp_path: Path, pictures: Path) -> None:
    prompts = put(tmp_path / "p.txt", "\ufeffone\r\n\r\ntwo\n")
    rows, _ = read(tmp_path, path=str(pictures), prompts=str(prompts))
    assert brief(rows)[:3] == [
        ("ann", "ann.png", "prompt1", "one"),
        ("ann", "ann.png", "prompt2", "two"),
        ("bob", "bob.jpg", "prompt1", "one"),
    ]
    assert len(rows) == 6


KEYED = {
    "p.csv": "identity_id,prompt,prompt_id\nbob,b1,\nann,a1,first\nbob,b2,\nzed,z,\n",
    "p.jsonl": '{"identity_id": "bob", "prompt": "b1"}\n{"identity_id": "ann", "prompt": "a1", "prompt_id": "first"}\n'
    '{"identity_id": "bob", "prompt": ["b2"]}\n{"identity_id": "zed", "prompt": "z"}\n',
    "p.json": '[{"identity_id": "bob", "prompt": ["b1", "b2"]}, {"identity_id": "ann", "prompt": "a1",'
    ' "prompt_id": "first"}, {"identity_id": "zed", "prompt": "z"}]',
}


@pytest.mark.parametrize("name", KEYED)
def test_prompts_keyed_by_identity(tmp_path: Path, pictures: Path, name: str) -> None:
    prompts = put(tmp_path / name, KEYED[name])
    rows, problems = read(tmp_path, path=str(pictures), prompts=str(prompts))
    assert sorted(brief(rows), key=str) == sorted(
        [
            ("bob", "bob.jpg", None, "b1"),
            ("bob", "bob.jpg", None, "b2"),
            ("ann", "ann.png", "first", "a1"),
            ("zed", None, None, "z"),
            ("cy d", "cy d.webp", None, None),  # a picture nobody has a prompt for
        ],
        key=str,
    )
    assert next(r["kind"] for r in rows if r["identity_id"] == "zed") == "missing_image"
    assert not problems


def test_keyed_json_object_and_own_prompts_file(tmp_path: Path, pictures: Path) -> None:
    put(pictures / "prompts.json", json.dumps({"ann": "a", "bob": {"2": "b2", "side": "b3"}, "cy d": []}))
    rows, _ = read(tmp_path, path=str(pictures))
    assert [(r["identity_id"], r["prompt_id"], r["prompt"]) for r in rows] == [
        ("ann", None, "a"),
        ("bob", "prompt2", "b2"),
        ("bob", "side", "b3"),
        ("cy d", None, None),
    ]


def test_a_folder_of_pictures_without_prompts_says_what_to_do(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(DatasetError, match=r"prompts\.txt"):
        read(tmp_path, path=str(pictures))
    with pytest.raises(DatasetError, match="there is no file"):
        read(tmp_path, path=str(pictures), prompts=str(tmp_path / "gone.txt"))


def test_two_pictures_of_one_name_are_named(tmp_path: Path, pictures: Path) -> None:
    put(pictures / "ann.webp", picture(9))
    put(pictures / "prompts.txt", "x")
    rows, problems = read(tmp_path, path=str(pictures))
    assert [r["image"] for r in rows if r["identity_id"] == "ann"] == [str(pictures / "ann.png")]
    assert [(p.kind, p.identity_id, p.where) for p in problems] == [
        ("duplicate_identity", "ann", str(pictures / "ann.webp"))
    ]


# -- tables --------------------------------------------------------------------------------------------------------


def test_csv(tmp_path: Path) -> None:
    text = '\ufeffperson,pic,prompt,prompt_id\nann,a.png,"says ""hi"",\ntwice",\nbob,sub/../b.png,b,x\nann,a.png,a2,\n'
    file = put(tmp_path / "set.csv", text)
    rows, problems = read(tmp_path, path=str(file), columns={"identity_id": "person", "image": "pic"})
    assert [(r["identity_id"], r["image"], r["prompt"], r["prompt_id"], r["where"]) for r in rows] == [
        ("ann", str(tmp_path / "a.png"), 'says "hi",\ntwice', None, f"{file}:2"),
        ("bob", str(tmp_path / "b.png"), "b", "x", f"{file}:4"),
        ("ann", str(tmp_path / "a.png"), "a2", None, f"{file}:5"),
    ]
    assert not problems


def test_csv_names_rows_it_cannot_read(tmp_path: Path) -> None:
    text = b"identity_id,image,prompt\na,a.png\nb,b.png,caf\xe9\nc,,x\n\nd,d.png,ok\ne,e.png," + b"y" * 200_000 + b"\n"
    file = put(tmp_path / "set.csv", text)
    rows, problems = read(tmp_path, path=str(file))
    assert [(r["identity_id"], r["kind"]) for r in rows] == [("b", "prompt_encoding"), ("d", None)]
    assert [(p.kind, p.where) for p in problems] == [("unreadable_row", f"{file}:{n}") for n in (2, 4, 7)]


def test_csv_without_a_column_says_which_and_what_there_is(tmp_path: Path) -> None:
    file = put(tmp_path / "set.csv", "id,image,prompt\n")
    with pytest.raises(DatasetError, match=r"no column 'identity_id'; it has 'id', 'image', 'prompt'"):
        read(tmp_path, path=str(file))
    utf16 = put(tmp_path / "utf16.csv", "identity_id,image,prompt\n".encode("utf-16"))
    with pytest.raises(DatasetError, match="is UTF-16"):
        read(tmp_path, path=str(utf16))


def test_jsonl(tmp_path: Path) -> None:
    file = jsonl(
        tmp_path / "set.jsonl",
        [
            {"identity_id": 7, "image": "/abs/a.png", "prompt": "one"},
            {
                "identity_id": "b",
                "image": {"bytes": None, "path": "b.png"},
                "prompt": ["x", "y"],
                "prompt_id": ["p", "q"],
            },
            {"identity_id": "c", "image": "s3://bucket/c d.png", "prompt": {"1": "z"}},
            {"identity_id": "d", "image": "d.png", "prompt": []},
        ],
    )
    rows, problems = read(tmp_path, path=str(file))
    assert [(r["identity_id"], r["image"], r["prompt_id"], r["prompt"]) for r in rows] == [
        ("7", "/abs/a.png", None, "one"),
        ("b", str(tmp_path / "b.png"), "p", "x"),
        ("b", str(tmp_path / "b.png"), "q", "y"),
        ("c", "s3://bucket/c%20d.png", "prompt1", "z"),
        ("d", str(tmp_path / "d.png"), None, None),
    ]
    assert not problems


@pytest.mark.parametrize(
    "line",
    [
        "{not json",
        "[1, 2]",
        '{"identity_id": "a", "prompt": "x"}',
        '{"image": "a.png", "prompt": "x"}',
        '{"identity_id": "a", "image": 3.5, "prompt": "x"}',
        '{"identity_id": "a", "image": "http://x/a.png", "prompt": "x"}',
        "[" * 100_000,
    ],
)
def test_a_bad_json_line_is_named_and_the_rest_goes_on(tmp_path: Path, line: str) -> None:
    file = put(tmp_path / "set.jsonl", line + '\n{"identity_id": "z", "image": "z.png", "prompt": "fine"}\n')
    rows, problems = read(tmp_path, path=str(file))
    assert [r["prompt"] for r in rows] == ["fine"]
    assert [(p.kind, p.where) for p in problems] == [("unreadable_row", f"{file}:1")]


@pytest.mark.parametrize("prompt", [None, 5, [["x"]], {"1": None}, ["fine", 3]])
def test_a_bad_prompt_keeps_its_row(tmp_path: Path, prompt: Any) -> None:
    file = jsonl(tmp_path / "set.jsonl", [{"identity_id": "a", "image": "a.png", "prompt": prompt}])
    rows, problems = read(tmp_path, path=str(file))
    assert rows[-1]["kind"] == "unreadable_row"
    assert rows[-1]["prompt"] is None
    assert not problems


def test_lone_surrogates_are_an_encoding_problem(tmp_path: Path) -> None:
    lines = [
        '{"identity_id": "a", "image": "a", "prompt": "\\ud800"}',
        '{"identity_id": "\\ud800", "image": "a", "prompt": ""}',
    ]
    rows, problems = read(tmp_path, path=str(put(tmp_path / "set.jsonl", "\n".join(lines))))
    assert [r["kind"] for r in rows] == ["prompt_encoding"]
    assert [p.kind for p in problems] == ["bad_id"]


PARQUET = {
    "paths": (pa.array(["a.png", "a.png", "b.png"]), ["a.png", "a.png", "b.png"], None),
    "dictionary": (pa.array(["a.png", "a.png", "b.png"]).dictionary_encode(), ["a.png", "a.png", "b.png"], None),
    "bytes": (pa.array([b"A", b"A", b"B"]), None, [b"A", b"A", b"B"]),
    "structs": (
        pa.array([{"bytes": b"A", "path": "x"}, {"bytes": b"A", "path": None}, {"bytes": None, "path": "b.png"}]),
        ["sha", "sha", "b.png"],
        [b"A", b"A", None],
    ),
}


@pytest.mark.parametrize("kind", PARQUET)
def test_parquet_pictures(tmp_path: Path, kind: str) -> None:
    images, names, data = PARQUET[kind]
    file = tmp_path / "set.parquet"
    pq.write_table(pa.table({"identity_id": ["a", "a", "b"], "image": images, "prompt": ["1", "2", "3"]}), file)
    rows, problems = read(tmp_path, path=str(file))
    assert not problems
    assert [r["image_bytes"] for r in rows] == (data or [None] * 3)
    for row, name in zip(rows, names or ["sha"] * 3, strict=True):
        assert row["image"].startswith("sha256:") if name == "sha" else row["image"] == str(tmp_path / name)
    assert rows[0]["image"] == rows[1]["image"] != rows[2]["image"]
    assert [r["where"] for r in rows] == [f"{file}:row {n}" for n in (1, 2, 3)]


def test_parquet_lists_renames_and_bad_rows(tmp_path: Path) -> None:
    table = pa.table(
        {
            "who": pa.array([1, 2, None, 4, 5, 6, 7]),
            "image": ["1.png", "2.png", "3.png", None, "", "6.png", "7.png"],
            "prompt": [["x", "y"], [], ["a"], ["b"], ["c"], None, ["d", None]],
            "prompt_id": [["p", "q"], [], ["r"], ["s"], ["t"], None, ["u", ""]],
        }
    )
    folder = tmp_path / "set"
    folder.mkdir()
    pq.write_table(table, folder / "part-0.parquet", row_group_size=2)
    pq.write_table(table.slice(0, 1), folder / "part-1.parquet")
    rows, problems = read(tmp_path, path=str(folder), columns={"identity_id": "who"})
    assert [(r["identity_id"], r["prompt_id"], r["prompt"], r["kind"]) for r in rows] == [
        ("1", "p", "x", None),
        ("1", "q", "y", None),
        ("2", None, None, None),
        ("6", None, None, "unreadable_row"),
        ("7", "u", "d", None),
        ("7", None, None, "unreadable_row"),
        ("1", "p", "x", None),
        ("1", "q", "y", None),
    ]
    assert [(p.kind, p.where) for p in problems] == [
        ("unreadable_row", f"{folder}/part-0.parquet:row {n}") for n in (3, 4, 5)
    ]


def test_parquet_lists_of_other_lengths_are_named(tmp_path: Path) -> None:
    file = tmp_path / "set.parquet"
    table = {"identity_id": ["a", "b"], "image": ["a", "b"], "prompt": [["x", "y"], ["z"]], "prompt_id": [["p"], ["q"]]}
    pq.write_table(pa.table(table), file)
    rows, problems = read(tmp_path, path=str(file))
    assert [(r["identity_id"], r["prompt_id"], r["prompt"]) for r in rows] == [("b", "q", "z")]
    assert [p.where for p in problems] == [f"{file}:row 1"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"identity_id": ["a"], "image": ["b"]}, "no column 'prompt'"),
        ({"identity_id": [1.5], "image": ["b"], "prompt": ["c"]}, "'identity_id' is double"),
        ({"identity_id": ["a"], "image": [{"url": "x"}], "prompt": ["c"]}, "fields bytes and path"),
        ({"identity_id": ["a"], "image": ["b"], "prompt": [["c"]], "prompt_id": ["d"]}, "must hold lists too"),
    ],
)
def test_parquet_of_wrong_columns_is_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "set.parquet")
    with pytest.raises(DatasetError, match=message):
        read(tmp_path, path=str(tmp_path / "set.parquet"))
    put(tmp_path / "torn.parquet", b"PAR1 not really")
    with pytest.raises(DatasetError, match="cannot read"):
        read(tmp_path, path=str(tmp_path / "torn.parquet"))


# -- JSON of the challenge and of TPIGE ----------------------------------------------------------------------------


def test_eval_json(tmp_path: Path) -> None:
    items = [
        {"img": "images/id001.webp", "prompt": "a"},
        {"img": "images/id002.webp", "prompt": "b"},
        {"prompt": "c"},
        5,
    ]
    file = put(tmp_path / "set/eval.json", json.dumps(items, indent=1))
    for path in (file, file.parent):
        rows, problems = read(tmp_path, path=str(path))
        assert [(r["identity_id"], r["image"], r["prompt"]) for r in rows] == [
            ("id001", str(tmp_path / "set/images/id001.webp"), "a"),
            ("id002", str(tmp_path / "set/images/id002.webp"), "b"),
        ]
        assert [(p.kind, p.where) for p in problems] == [("unreadable_row", f"{file}:{n}") for n in (10, 13)]
    assert read(tmp_path, path=str(file), images=str(tmp_path / "pics"))[0][0]["image"] == str(
        tmp_path / "pics/images/id001.webp"
    )


def test_tpige_json(tmp_path: Path) -> None:
    put(tmp_path / "pics/id001/image.webp", b"")
    put(tmp_path / "pics/id002.png", b"")
    put(tmp_path / "secret.png", b"")
    put(tmp_path / "secret/image.png", b"")
    content = {"id001": {"1": "a", "3": "b"}, "id002": {"1": "c"}, "../secret": {"1": "d"}, "": {"1": "e"}}
    file = put(tmp_path / "prompts.json", json.dumps(content))
    rows, _ = read(tmp_path, path=str(file), images=str(tmp_path / "pics"))
    assert [(r["identity_id"], r["image"], r["prompt_id"], r["kind"]) for r in rows] == [
        ("id001", str(tmp_path / "pics/id001/image.webp"), "prompt1", None),
        ("id001", str(tmp_path / "pics/id001/image.webp"), "prompt3", None),
        ("id002", str(tmp_path / "pics/id002.png"), "prompt1", None),
        ("../secret", None, "prompt1", "missing_image"),  # an id is a name in the folder, never a path out of it
        ("", None, "prompt1", "missing_image"),
    ]
    assert str(tmp_path / "pics") in rows[3]["message"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda c: st.lists(c, max_size=3), max_leaves=5
)


@given(
    st.lists(JSON_VALUES, max_size=5) | st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=5),
    st.booleans(),
    st.sampled_from([1, 2, 7, 1 << 16]),
)
@example([123456, 7], False, 1)  # a number may end where the chunk ends, or go on
def test_json_elements_are_those_of_json(value: Any, pretty: bool, chunk: int) -> None:
    text = json.dumps(value, indent=2 if pretty else None)
    with mock.patch.object(json_stream, "_CHUNK", chunk):
        found = [(key, element) for _, key, element in elements(io.BytesIO(text.encode()))]
    assert found == (list(value.items()) if isinstance(value, dict) else [(None, v) for v in value])


@pytest.mark.parametrize(
    ("text", "line"), [("", 1), ("3", 1), ("[1\n2]", 2), ('[1,\n"x', 2), ('{"a" 1}', 1), ("[1", 1)]
)
def test_json_faults_have_a_line(text: str, line: int) -> None:
    with pytest.raises(JsonError) as caught:
        list(elements(io.BytesIO(text.encode())))
    assert caught.value.line == line


def test_json_is_read_element_by_element() -> None:
    text = ("[" + ",\n".join(json.dumps({"n": n, "text": "x" * 500}) for n in range(20_000)) + "]").encode()
    tracemalloc.start()
    count = sum(1 for _ in elements(io.BytesIO(text)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 3_000_000  # of 10 MB of text


# -- formats -------------------------------------------------------------------------------------------------------


def test_detect_format(tmp_path: Path) -> None:
    for name in ("a.csv", "a.jsonl", "a.ndjson", "a.parquet"):
        assert detect_format(str(tmp_path / name)) == {"ndjson": "jsonl"}.get(name[2:], name[2:])
    assert detect_format(str(put(tmp_path / "a.json", "\ufeff [{"))) == "eval_json"
    assert detect_format(str(put(tmp_path / "b.json", '{"id": {}}'))) == "tpige_json"
    assert detect_format(str(vip(tmp_path / "vip"))) == "vip200k"
    assert detect_format(str(vip(tmp_path / "deep/raw").parent)) == "vip200k"
    assert detect_format(str(put(tmp_path / "faces/x.webp", b"").parent)) == "images"
    assert detect_format(str(put(tmp_path / "parts/p.parquet", b"").parent)) == "parquet"
    assert detect_format(str(put(tmp_path / "eval/eval.json", "[]").parent)) == "eval_json"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "gone", "there is no file or folder"),
        (lambda root: put(root / "a.xlsx", ""), "by its ending"),
        (lambda root: put(root / "a.json", '"text"'), "begins with"),
        (lambda root: put(root / "empty/sub/x.txt", "").parent.parent, "saw sub/"),
        (lambda root: "ftp://host/a.csv", "use a local path, or a URI of s3"),
        (lambda root: "s3://key:secret@bucket/a.csv", "carries credentials"),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read(tmp_path, path=str(make(tmp_path)))


def test_a_format_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="wants a file"):
        read(tmp_path, path=str(tmp_path), format="csv")
    with pytest.raises(DatasetError, match=r"dataset\.path"):
        read(tmp_path)


def test_places_join_uris() -> None:
    place = open_place("s3://bucket/a%20b/set.csv?region=eu-west-1&endpoint_override=127.0.0.1:9")
    assert place.path == "bucket/a b/set.csv"
    joined = place.parent.resolve("../pics/\u00e9.png")
    assert joined.path == "bucket/pics/\u00e9.png"
    assert open_place(joined.uri) == joined
    assert open_place("file:///data/a%20b").path == "/data/a b"
    assert place.parent.resolve("/abs.png").uri == "/abs.png"
