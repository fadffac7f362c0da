"""Freezing an identity set: the tables a run stands on, and every refusal by name."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from identity_sets import jsonl, picture, put, vip
from PIL import Image

from ipvg_ray import tables
from ipvg_ray.config import DatasetConfig
from ipvg_ray.dataset.freeze import Summary, freeze
from ipvg_ray.dataset.problems import DatasetError
from ipvg_ray.media.images import FORMATS, image_bytes

Failures = list[tuple[str, str, str | None]]


def frozen(tmp_path: Path, **settings: Any) -> tuple[Summary, list[dict[str, Any]], list[dict[str, Any]], Failures]:
    """The summary, identities and samples of a set, and (kind, identity_id, sample_id) of its failures."""
    out = tmp_path / "out"
    summary = freeze(DatasetConfig(**settings), out, threads=3)
    for name in ("identities", "samples", "failures"):
        for part in tables.parts(out, name):
            assert pq.read_schema(part).equals(tables.stored_schema(name))
    failures = tables.read_table(out, "failures").to_pylist()
    assert all(f["stage"] == "dataset" and f["attempt"] == 1 and f["message"] and f["where"] for f in failures)
    assert summary.problems == len(failures) == sum(summary.kinds.values())
    assert sorted(p.name for p in out.iterdir() if p.name.startswith(".")) == []
    identities = tables.read_table(out, "identities").to_pylist()
    samples = tables.read_table(out, "samples").to_pylist()
    assert (summary.identities, summary.samples) == (len(identities), len(samples))
    assert list(dict.fromkeys(s["identity_id"] for s in samples)) == [i["identity_id"] for i in identities]
    return summary, identities, samples, [(f["kind"], f["identity_id"], f["sample_id"]) for f in failures]


def table_of(tmp_path: Path, rows: list[tuple[Any, ...]]) -> str:
    """A JSONL set of (identity_id, image, prompt[, prompt_id]) beside the pictures 0.png … 9.png."""
    for number in range(10):
        put(tmp_path / f"set/{number}.png", picture(number))
    names = ("identity_id", "image", "prompt", "prompt_id")
    return str(jsonl(tmp_path / "set/set.jsonl", [dict(zip(names, row, strict=False)) for row in rows]))


def test_tables_of_a_clean_set(tmp_path: Path) -> None:
    root = vip(tmp_path / "set", identities=3, prompts=2)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    put(root / "id002/image.png", picture(2, (50, 36), exif=turned))
    summary, identities, samples, failures = frozen(tmp_path, path=str(root))
    assert (summary.identities, summary.samples, failures) == (3, 6, [])
    assert samples[2] == {
        "sample_id": "id002/prompt1",
        "identity_id": "id002",
        "prompt_id": "prompt1",
        "prompt": "person 2 does thing 1",
    }
    file = root / "id002/image.png"
    assert identities[1] == {
        "identity_id": "id002",
        "image": {"bytes": None, "path": str(file)},
        "image_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "image_width": 36,
        "image_height": 50,
        "more_images": None,
        "more_images_sha256": None,
    }
    assert image_bytes(identities[1]["image"], identities[1]["image_sha256"]) == file.read_bytes()


@pytest.mark.parametrize("batch", [2, 8192])
def test_samples_of_an_identity_stand_together_in_input_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr("ipvg_ray.dataset.rows.BATCH_ROWS", batch)
    monkeypatch.setattr("ipvg_ray.dataset.spill._ROWS", batch)
    rows = [(i, f"{i}.png", f"{i} {n}") for n in range(3) for i in "312"]
    _, identities, samples, _ = frozen(tmp_path, path=table_of(tmp_path, rows))
    assert [i["identity_id"] for i in identities] == ["3", "1", "2"]
    assert [(s["sample_id"], s["prompt"]) for s in samples] == [
        (f"{i}/prompt{n + 1}", f"{i} {n}") for i in "312" for n in range(3)
    ]


def test_every_problem_has_a_name(tmp_path: Path) -> None:
    data = picture(1, (300, 300))
    put(tmp_path / "set/torn.png", data[: len(data) // 2])
    put(tmp_path / "set/one.png", picture(2, (1, 1)))
    put(tmp_path / "set/text.png", "not a picture")
    put(tmp_path / "set/none.png", b"")
    put(tmp_path / "set/huge.png", picture(3, (400, 300)))
    path = table_of(
        tmp_path,
        [
            ("torn", "torn.png", ["x", ""]),
            ("one", "one.png", "x"),
            ("text", "text.png", "x"),
            ("none", "none.png", "x"),
            ("huge", "huge.png", "x"),
            ("gone", "gone.png", "x"),
            ("mute", "0.png", []),
            ("a", "1.png", ["fine", " \n", "y" * 30_000, "fine too"]),
            ("b", "2.png", "x", "same"),
            ("b", "2.png", "z", "same"),
            ("b", "3.png", "other face"),
            ("b", "2.png", "x", "tab\t"),
            ("", "4.png", "x"),
            ("nl\n", "4.png", "x"),
            ("l" * 201, "4.png", "x"),
            ("empty", "5.png", ""),
        ],
    )
    put(Path(path), Path(path).read_text() + "{broken\n")
    summary, identities, samples, failures = frozen(tmp_path, path=path, max_image_pixels=100_000)
    assert [i["identity_id"] for i in identities] == ["a", "b"]
    assert [s["sample_id"] for s in samples] == ["a/prompt1", "a/prompt4", "b/same"]
    assert sorted(failures, key=str) == sorted(
        [
            ("broken_image", "torn", None),
            ("image_too_small", "one", None),
            ("broken_image", "text", None),
            ("broken_image", "none", None),
            ("image_too_large", "huge", None),
            ("missing_image", "gone", None),
            ("no_prompts", "mute", None),
            ("empty_prompt", "a", "a/prompt2"),
            ("prompt_too_long", "a", "a/prompt3"),
            ("duplicate_sample", "b", "b/same"),
            ("duplicate_identity", "b", "b/prompt3"),
            ("bad_id", "b", "b/tab\\t"),
            ("unreadable_row", "", None),
            ("bad_id", "nl\\n", None),
            ("bad_id", "l" * 99 + "…", None),
            ("empty_prompt", "empty", "empty/prompt1"),
            ("unreadable_row", "", None),
        ],
        key=str,
    )
    assert summary.kinds["bad_id"] == 3
    assert len(summary.first) == 17


def test_strange_ids_are_kept_as_they_are(tmp_path: Path) -> None:
    ids = ["../../escape", "a/b", "a b", "人物", "..", "C:\\x", "l" * 200]
    _, identities, samples, failures = frozen(tmp_path, path=table_of(tmp_path, [(i, "1.png", "x") for i in ids]))
    assert [i["identity_id"] for i in identities] == ids
    assert samples[0]["sample_id"] == "../../escape/prompt1"
    assert not failures
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "set"]


def test_sample_ids_are_unique_even_where_ids_hold_slashes(tmp_path: Path) -> None:
    rows = [("a", "1.png", "x", "b/c"), ("a/b", "2.png", "y", "c"), ("a/b", "2.png", "z", "d")]
    _, _, samples, failures = frozen(tmp_path, path=table_of(tmp_path, rows))
    assert [(s["sample_id"], s["prompt"]) for s in samples] == [("a/b/c", "x"), ("a/b/d", "z")]
    assert failures == [("duplicate_sample", "a/b", "a/b/c")]


def test_a_duplicate_of_a_refused_prompt_is_used(tmp_path: Path) -> None:
    rows = [("a", "1.png", "", "p"), ("a", "1.png", "good", "p"), ("a", "1.png", "late", "p")]
    _, _, samples, failures = frozen(tmp_path, path=table_of(tmp_path, rows))
    assert [s["prompt"] for s in samples] == ["good"]
    assert [kind for kind, _, _ in failures] == ["empty_prompt", "duplicate_sample"]


def test_pictures_that_came_as_bytes_stay_bytes(tmp_path: Path) -> None:
    a, b = picture(1), picture(2)
    table = pa.table({"identity_id": ["a", "b", "a", "a"], "image": [a, b, a, b], "prompt": ["1", "2", "3", "4"]})
    pq.write_table(table, tmp_path / "set.parquet")
    _, identities, samples, failures = frozen(tmp_path, path=str(tmp_path / "set.parquet"))
    assert [(i["image"]["bytes"], i["image"]["path"]) for i in identities] == [(a, None), (b, None)]
    assert [s["sample_id"] for s in samples] == ["a/prompt1", "a/prompt2", "b/prompt1"]
    assert failures == [("duplicate_identity", "a", "a/prompt3")]  # a with b's picture


def test_row_groups_of_carried_pictures_stay_small(tmp_path: Path) -> None:
    pictures = [picture(n, (900, 700), compress_level=0) for n in range(8)]  # 1.9 MB each
    table = pa.table({"identity_id": list("abcdefgh"), "image": pictures, "prompt": ["x"] * 8})
    pq.write_table(table, tmp_path / "set.parquet")
    _, identities, _, _ = frozen(tmp_path, path=str(tmp_path / "set.parquet"))
    assert [i["image"]["bytes"] for i in identities] == pictures
    metadata = pq.ParquetFile(tables.parts(tmp_path / "out", "identities")[0]).metadata
    assert metadata.num_row_groups == 2


def test_strict_writes_nothing_and_lists_the_problems(tmp_path: Path) -> None:
    path = table_of(tmp_path, [("a", "1.png", ["x", ""]), ("b", "gone.png", "x")])
    out = tmp_path / "deep" / "out"
    with pytest.raises(DatasetError) as caught:
        freeze(DatasetConfig(path=path, strict=True), out)
    assert "2 problems" in str(caught.value)
    assert "a/prompt2: empty_prompt" in str(caught.value)
    assert f"{path}:2: b: missing_image" in str(caught.value)
    assert not out.exists()
    out.mkdir(parents=True)
    with pytest.raises(DatasetError):
        freeze(DatasetConfig(path=path, strict=True), out)
    assert list(out.iterdir()) == []
    assert freeze(DatasetConfig(path=table_of(tmp_path, [("a", "1.png", "x")]), strict=True), out).samples == 1


def test_limit_takes_the_first_identities_with_all_their_rows(tmp_path: Path) -> None:
    rows = [(i, f"{i}.png", f"{i} {n}") for n in range(2) for i in "3124"]
    summary, identities, samples, failures = frozen(tmp_path, path=table_of(tmp_path, rows), limit=2)
    assert [i["identity_id"] for i in identities] == ["3", "1"]
    assert [s["prompt"] for s in samples] == ["3 0", "3 1", "1 0", "1 1"]
    assert not failures
    assert summary.problems == 0


def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path) -> None:
    path = table_of(tmp_path, [("a", "gone.png", "x"), ("b", "1.png", "")])
    with pytest.raises(DatasetError, match=r"(?s)no usable identity.*missing_image.*empty_prompt"):
        freeze(DatasetConfig(path=path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DatasetError, match="no usable identity"):
        freeze(DatasetConfig(path=str(put(tmp_path / "empty.jsonl", ""))), tmp_path / "out")


def test_tables_are_never_overwritten(tmp_path: Path) -> None:
    config = DatasetConfig(path=str(vip(tmp_path / "set")))
    freeze(config, tmp_path / "out")
    with pytest.raises(DatasetError, match="already holds identities"):
        freeze(config, tmp_path / "out")
    assert len(tables.read_table(tmp_path / "out", "samples")) == 6


def test_threads_do_not_change_the_tables(tmp_path: Path) -> None:
    root = vip(tmp_path / "set", identities=40, prompts=3)
    for number in (3, 17, 18):
        put(root / f"id{number:03d}/image.png", "broken")
    summaries = []
    for threads in (1, 7):
        out = tmp_path / f"out{threads}"
        summaries.append(freeze(DatasetConfig(path=str(root)), out, threads=threads))
    assert summaries[0] == summaries[1]
    for name in ("identities", "samples"):
        assert tables.read_table(tmp_path / "out1", name) == tables.read_table(tmp_path / "out7", name)


def test_a_bomb_is_too_large_and_messages_name_the_file(tmp_path: Path) -> None:
    bomb = bytearray(picture(1))
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    put(tmp_path / "set/bomb.png", bytes(bomb))
    put(tmp_path / "set/words.png", "no picture")
    path = table_of(tmp_path, [("bomb", "bomb.png", "x"), ("words", "words.png", "x"), ("ok", "1.png", "x")])
    summary, _, _, failures = frozen(tmp_path, path=path)
    assert failures == [("image_too_large", "bomb", None), ("broken_image", "words", None)]
    assert summary.first[0].message.startswith(str(tmp_path / "set/bomb.png"))
    assert (
        summary.first[1].message
        == f"{tmp_path}/set/words.png cannot be decoded (it is none of {', '.join(FORMATS)}); replace it"
    )


def test_every_pillow_failure_is_a_broken_image(tmp_path: Path) -> None:
    for number, kind in enumerate(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]):
        data = picture(1, (64, 64), kind=kind)
        put(tmp_path / f"set/{number}.bin", data[:50] + b"\xff" * 40 + data[90 : len(data) // 2])
    rows = [{"identity_id": str(n), "image": f"{n}.bin", "prompt": "x"} for n in range(6)]
    rows.append({"identity_id": "ok", "image": "ok.png", "prompt": "x"})
    put(tmp_path / "set/ok.png", picture(1))
    _, _, _, failures = frozen(tmp_path, path=str(jsonl(tmp_path / "set/s.jsonl", rows)))
    assert {kind for kind, _, _ in failures} <= {"broken_image", "image_too_large"}
    assert ("broken_image", "0", None) in failures


# -- size ----------------------------------------------------------------------------------------------------------

_MEASURE = """
import resource, sys
from pathlib import Path
from ipvg_ray.config import DatasetConfig
from ipvg_ray.dataset.freeze import freeze
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
summary = freeze(DatasetConfig(path=sys.argv[1]), Path(sys.argv[2]))
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(summary.identities, summary.samples, summary.problems, grown // 1024)
"""


def test_fifty_thousand_samples_in_any_order_in_bounded_memory(tmp_path: Path) -> None:
    for number in range(500):
        put(tmp_path / f"set/{number}.png", picture(number))
    text = "a person who walks slowly through a crowded market while the camera follows from the left side " * 8
    with (tmp_path / "set/set.jsonl").open("w") as file:
        for prompt in range(100):
            for number in range(500):  # the rows of an identity stand far apart
                row = {"identity_id": f"id{number}", "image": f"{number}.png", "prompt": f"{number} {prompt} {text}"}
                file.write(json.dumps(row) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "set/set.jsonl"), str(tmp_path / "out")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    identities, samples, problems, megabytes = map(int, done.stdout.split())
    assert (identities, samples, problems) == (500, 50_000, 0)
    assert megabytes < 250  # 40 MB of prompts; as Python objects the rows alone would be three times that
    written = tables.read_table(tmp_path / "out", "samples")
    wanted = [f"id{n}/prompt{k + 1}" for n in range(500) for k in range(100)]
    assert written["sample_id"].to_pylist() == wanted
    assert written["prompt"][101].as_py().startswith("1 1 ")


# -- sample data ---------------------------------------------------------------------------------------------------


@pytest.mark.shared
def test_the_sample_set(tmp_path: Path, shared: Path) -> None:
    summary, identities, samples, failures = frozen(tmp_path, path=str(shared / "data/vip200k"))
    assert (summary.identities, summary.samples, failures) == (5, 25, [])
    assert [s["sample_id"] for s in samples[:6]] == [*(f"id001/prompt{k}" for k in range(1, 6)), "id002/prompt1"]
    assert all(i["image_width"] == i["image_height"] >= 277 for i in identities)
    assert min(len(s["prompt"].split()) for s in samples) > 30


@pytest.mark.shared
def test_the_enhanced_prompts_with_made_up_pictures(tmp_path: Path, shared: Path) -> None:
    file = shared / "data/face_enhanced_prompts.json"
    given = json.loads(file.read_text())
    for number, identity_id in enumerate(given):
        name = f"{identity_id}/image.webp" if number % 2 else f"{identity_id}.png"
        put(tmp_path / "pics" / name, picture(number, kind="WEBP" if number % 2 else "PNG"))
    summary, _, samples, failures = frozen(tmp_path, path=str(file), images=str(tmp_path / "pics"))
    assert (summary.identities, summary.samples, failures) == (153, 764, [])
    assert [s["prompt"] for s in samples] == [text for prompts in given.values() for text in prompts.values()]
    assert samples[4]["sample_id"] == "id001/prompt5"
