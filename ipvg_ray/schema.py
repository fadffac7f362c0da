"""The tables of a run as Arrow schemas, read from the YAML files in `schemas/`.

Code, tests and docs read the same files, so a column has one definition. This module knows neither stages nor Ray.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""An encoded picture as `datasets` and pandas users expect it: its bytes, or where to read them."""

_SCALARS: dict[str, pa.DataType] = {
    "string": pa.string(),
    "binary": pa.binary(),
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "image": IMAGE,
    "timestamp[ms, UTC]": pa.timestamp("ms", tz="UTC"),
}


@dataclass(frozen=True)
class Table:
    """One table: its name, grain (`identity`, `sample` or `failure`), key columns, and columns in order."""

    name: str
    grain: str
    key: tuple[str, ...]
    doc: str
    columns: dict[str, pa.Field]

    @property
    def schema(self) -> pa.Schema:
        return pa.schema(list(self.columns.values()))


def schema_dir() -> Path:
    """Where the YAML files lie: inside an installed package, or beside it in a checkout."""
    packaged = Path(str(resources.files("ipvg_ray"))) / "schemas"
    return packaged if packaged.is_dir() else packaged.parent.parent / "schemas"


def arrow_type(name: str) -> pa.DataType:
    """Arrow type for a type name of the YAML files; `float32[512]` is a list of fixed length, `string[]` of any.

    Raises:
        ValueError: for a name that is not known.
    """
    if name in _SCALARS:
        return _SCALARS[name]
    if match := re.fullmatch(r"(\w+)\[(\d+)\]", name):
        return pa.list_(_SCALARS[match[1]], int(match[2]))
    if name.endswith("[]"):
        return pa.list_(arrow_type(name.removesuffix("[]")))
    raise ValueError(f"unknown column type {name!r}; known: {', '.join(_SCALARS)}, or one of them with [length] or []")


@lru_cache
def table(name: str) -> Table:
    """The table of that name.

    Raises:
        KeyError: where `schemas/` holds no such file; the message lists those it holds.
    """
    path = schema_dir() / f"{name}.yaml"
    if not path.is_file():
        raise KeyError(f"no schema {name!r}; there are {', '.join(tables())}")
    spec: dict[str, Any] = yaml.safe_load(path.read_text())
    columns = {
        column: pa.field(column, arrow_type(c["type"]), nullable=bool(c.get("nullable")), metadata={"doc": c["doc"]})
        for column, c in spec["columns"].items()
    }
    return Table(spec["table"], spec["grain"], tuple(spec["key"]), spec["doc"], columns)


def tables() -> list[str]:
    """Names of all tables, sorted."""
    return sorted(path.stem for path in schema_dir().glob("*.yaml"))
