"""Sections of what a run reads: its identity set and its models."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from ipvg_ray.config.base import Section, nearest


class DatasetConfig(Section):
    """Where the identity set is and what is refused in it.

    `columns` renames the columns of CSV, JSONL and Parquet inputs: ours to theirs (`{identity_id: person}`). Of an
    identity's pictures the first `max_references` are used.
    """

    path: str | None = None
    format: Literal["auto", "vip200k", "images", "csv", "jsonl", "parquet", "eval_json", "tpige_json"] = "auto"
    prompts: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    images: str | None = None
    strict: bool = False
    limit: int | None = Field(None, ge=1)
    min_image_side: int = Field(32, ge=1)
    max_image_pixels: int = Field(100_000_000, ge=1)
    max_prompt_chars: int = Field(10_000, ge=1)
    max_references: int = Field(16, ge=1)

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, value: dict[str, str]) -> dict[str, str]:
        known = ("identity_id", "image", "prompt", "prompt_id")
        for key in value:
            if key not in known:
                raise ValueError(f"columns renames {key!r}, which is none of {', '.join(known)}{nearest(key, known)}")
        return value


class ModelsConfig(Section):
    """Where models lie. `root` holds them by name; `~` is the home folder.

    With `mirror`, a folder or s3:// prefix filled by `ipvg-ray models mirror`, each node takes its copy below `root`.
    """

    root: Path = Field(Path("~/.cache/ipvg_ray/models"), validate_default=True)
    mirror: str | None = None

    @field_validator("root")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()  # workers and later starts may have another working directory

    def path(self, name: str) -> Path:
        """`name` itself where it begins with `/`, `~` or `.`, else its place below `root`; always absolute."""
        given = Path(name).expanduser()
        if given.is_absolute() or name.startswith("."):
            return given.absolute()
        return self.root / name
