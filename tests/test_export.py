"""Exports in the original layout."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from identity_sets import picture

from ipvg_ray import tables
from ipvg_ray.dataset.export import ExportError, export
from ipvg_ray.errors import UserError
from ipvg_ray.media.images import decode, encode


def write(run: Path, table: str, rows: list[dict[str, Any]], part: str = "part-0") -> None:
    """A part of a table; columns that the rows leave out get a value of no meaning."""
    schema = tables.stored_schema(table)
    blank: dict[pa.DataType, Any] = {pa.string(): "", pa.int64(): 0, pa.int32(): 0, pa.float32(): 0.0}
    full = [{f.name: row.get(f.name, blank.get(f.type)) for f in schema} for row in rows]
    (run / table).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(full, schema), run / table / f"{part}.parquet")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three samples: one finished, one of a strange name, one that has not come to its first frame."""
    run = tmp_path / "run"
    keys = [("id001", "prompt1"), ("../../up", "a/b"), ("id001", "prompt2")]
    rows = [{"identity_id": i, "prompt_id": p, "sample_id": f"{i}/{p}"} for i, p in keys]
    write(run, "samples", [{**row, "prompt": f'raw "{n}",\nline'} for n, row in enumerate(rows)])
    write(
        run,
        "prompts",
        [
            {**row, "video_prompt": f"A man {n}", "image_prompt": f"fcsks, {n}"}
            for n, row in reversed(list(enumerate(rows)))
        ],
    )
    flat = np.full((16, 24, 3), 90, np.uint8)
    write(run, "first_frame", [{**rows[1], "first_frame": encode(flat)}], "part-1")
    write(run, "first_frame", [{**rows[0], "first_frame": {"bytes": picture(1, kind="JPEG"), "path": None}}], "part-2")
    uris = ["videos/id001/prompt1.mp4", "videos/%2E.%2F..%2Fup/a%2Fb.mp4"]
    for number, uri in enumerate(uris):
        (run / uri).parent.mkdir(parents=True)
        (run / uri).write_bytes(f"video {number}".encode())
    write(run, "video", [{**row, "video_uri": uri} for row, uri in zip(rows, uris, strict=False)])
    (run / "run.json").write_text(json.dumps({"version": 1}))
    return run


def files(out: Path) -> list[str]:
    return sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())


def test_the_original_layout(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    assert export(run, out) == 2
    assert files(out) == [
        "%2E.%2F..%2Fup/a%2Fb.mp4",
        "data_raw.csv",
        "data_refined.csv",
        "i2v/%2E.%2F..%2Fup/a%2Fb.jpg",
        "i2v/%2E.%2F..%2Fup/a%2Fb.txt",
        "i2v/id001/prompt1.jpg",
        "i2v/id001/prompt1.txt",
        "i2v/id001/prompt2.txt",
        "id001/prompt1.mp4",
        "t2i/%2E.%2F..%2Fup/a%2Fb.txt",
        "t2i/id001/prompt1.txt",
        "t2i/id001/prompt2.txt",
    ]
    assert (out / "id001/prompt1.mp4").read_bytes() == b"video 0"
    assert (out / "i2v/id001/prompt2.txt").read_text() == "A man 2"
    assert (out / "t2i/id001/prompt2.txt").read_text() == "fcsks, 2"
    assert (out / "i2v/id001/prompt1.jpg").read_bytes() == picture(1, kind="JPEG")  # no second loss
    made = (out / "i2v/%2E.%2F..%2Fup/a%2Fb.jpg").read_bytes()
    assert made.startswith(b"\xff\xd8\xff")
    assert np.abs(decode(made).astype(int) - 90).max() <= 1


def test_the_lists_follow_the_samples_and_name_existing_files(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    for name, texts in (("raw", ['raw "0",\nline', 'raw "1",\nline']), ("refined", ["A man 0", "A man 1"])):
        with (tmp_path / f"out/data_{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["prompt"] for row in rows] == texts
        assert [row["image_path"] for row in rows] == ["i2v/id001/prompt1.jpg", "i2v/%2E.%2F..%2Fup/a%2Fb.jpg"]
        assert all((tmp_path / "out" / row["image_path"]).is_file() for row in rows)


def test_exporting_again_replaces(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    before = files(tmp_path / "out")
    (run / "videos/id001/prompt1.mp4").write_bytes(b"newer")
    assert export(run, tmp_path / "out") == 2
    assert (tmp_path / "out/id001/prompt1.mp4").read_bytes() == b"newer"
    assert files(tmp_path / "out") == before


def test_what_is_missing_is_named(run: Path, tmp_path: Path) -> None:
    (run / "videos/id001/prompt1.mp4").unlink()
    with pytest.raises(ExportError, match=r"prompt1\.mp4 is gone"):
        export(run, tmp_path / "out")
    with pytest.raises(UserError, match="not a run directory"):
        export(tmp_path, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_run_that_has_only_begun(run: Path, tmp_path: Path) -> None:
    for table in ("prompts", "first_frame", "video"):
        for part in tables.parts(run, table):
            part.unlink()
    assert export(run, tmp_path / "out") == 0
    assert files(tmp_path / "out") == ["data_raw.csv", "data_refined.csv"]
