"""The schemas: readable, complete, and the only definition of a table."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ipvg_ray import schema, tables
from ipvg_ray.config import load
from ipvg_ray.pipeline.plan import make_steps
from ipvg_ray.stages import NAMES, make_stages


def test_every_table_reads_and_is_documented() -> None:
    assert set(schema.tables()) == {"identities", "samples", "failures", *NAMES}
    for name in schema.tables():
        table = schema.table(name)
        assert table.name == name
        assert table.doc.endswith(".")
        for field in table.columns.values():
            assert field.metadata[b"doc"].endswith(b"."), f"{name}.{field.name}"


def test_types() -> None:
    assert schema.arrow_type("float32[512]") == pa.list_(pa.float32(), 512)
    assert schema.table("faces").columns["gender"].nullable
    assert not schema.table("faces").columns["embedding"].nullable
    with pytest.raises(ValueError, match="unknown column type 'text'"):
        schema.arrow_type("text")
    with pytest.raises(KeyError, match="there are evaluate, faces"):
        schema.table("none")


@pytest.mark.parametrize("until", NAMES)
def test_the_stages_fit_together(until: str) -> None:
    steps = make_steps(make_stages(load("cpu-mini"), until))
    assert steps[-1].name == until
    for step in steps:
        assert step.stage.name == step.table.name
        assert step.stage.grain == step.table.grain


def test_reading_gives_each_key_once_and_the_schema_when_empty(tmp_path: Path) -> None:
    run = tmp_path
    empty = tables.read_table(run, "prompts", ["video_prompt"])
    assert empty.schema.names == ["identity_id", "sample_id", "video_prompt"]
    row = {"identity_id": "a", "sample_id": "a/1", "video_prompt": "x", "image_prompt": "y", "prompt_status": "ok"}
    table = pa.Table.from_pylist([{**row, "seed": 1, "seconds": 0.5}], schema=tables.stored_schema("prompts"))
    (run / "prompts").mkdir()
    for name in ("part-a.parquet", "part-b.parquet", ".part-c.parquet"):
        pq.write_table(table, run / "prompts" / name)
    assert tables.read_table(run, "prompts").num_rows == 1
    assert tables.read_table(run, "prompts", ["image_prompt"])["image_prompt"].to_pylist() == ["y"]


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(tables.NotARunError, match="is not a run directory"):
        tables.read_run(tmp_path)
