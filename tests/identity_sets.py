"""Pictures and small identity sets for tests; faces are not needed to read a set."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from ipvg_ray.config import DatasetConfig
from ipvg_ray.dataset.formats import open_set
from ipvg_ray.dataset.problems import Problem, Problems
from ipvg_ray.dataset.rows import RAW, Reading


def picture(number: int = 0, size: tuple[int, int] = (48, 40), kind: str = "PNG", **options: Any) -> bytes:
    """An encoded picture of (width, height); different numbers give different pictures."""
    values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format=kind, **options)
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    """Write a file, its folders too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    return put(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def vip(root: Path, identities: int = 3, prompts: int = 2) -> Path:
    """A folder of the VIP-200K layout, without raw/."""
    for i in range(1, identities + 1):
        put(root / f"id{i:03d}" / "image.png", picture(i))
        for k in range(1, prompts + 1):
            put(root / f"id{i:03d}" / f"prompt{k}.txt", f"person {i} does thing {k}\n")
    return root


def read(tmp_path: Path, **settings: Any) -> tuple[list[dict[str, Any]], list[Problem]]:
    """What the reader of `settings` hands on, and the problems it names."""
    config = DatasetConfig(**settings)
    place, reader = open_set(config)
    with Problems(tmp_path / "problems") as problems:
        batches = list(reader(place, Reading(config, problems)))
    assert all(batch.schema.equals(RAW) for batch in batches)
    return pa.Table.from_batches(batches, RAW).to_pylist(), problems.first
