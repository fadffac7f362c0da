"""What was asked for, where videos of others are scored: pictures and prompts as the evaluations hand them out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ipvg_ray import tables
from ipvg_ray.config import DatasetConfig
from ipvg_ray.dataset.formats import open_set
from ipvg_ray.dataset.problems import DatasetError
from ipvg_ray.dataset.row_files import read_eval_json

_PROMPT_FILE = re.compile(r"(.+)_(?:prompt)?(\d+)\.txt")


def asked(refs: str, prompts: str | None, work: Path, *, numbered: bool = True) -> dict[str, Any]:
    """The `dataset` section of the configuration for pictures and prompts given apart.

    Args:
        refs: folder of the reference pictures, or an identity set in a form that holds the prompts too.
        prompts: None where they are in `refs`; else a folder of `<id>_<k>.txt` or `<id>_prompt<k>.txt` (TPIGE), a JSON
            object `{id: {"1": text}}`, the challenge's `eval.json` of 2026, or any prompts file of the format `images`.
        work: folder for a file that brings what was given into one form.
        numbered: whether the videos are named by their places in `eval.json`.

    Raises:
        DatasetError: where the prompts cannot be read.
    """
    if prompts is None:
        return (_numbered_set(refs, work) if numbered else None) or {"path": _whole(refs)}
    place = Path(prompts)
    if place.is_dir():
        return {"path": str(_gathered(place, work)), "format": "tpige_json", "images": _whole(refs)}
    if place.suffix == ".json":
        content = _json(place)
        if isinstance(content, list):
            lines = _rows_of(content, lambda img: Path(img).name, numbered)
            return {"path": str(_written_rows(lines, work)), "format": "jsonl", "images": _whole(refs)}
        return {"path": _whole(prompts), "format": "tpige_json", "images": _whole(refs)}
    return {"path": _whole(refs), "format": "images", "prompts": _whole(prompts)}


def _whole(path: str) -> str:
    return path if "://" in path else str(Path(path).resolve())


def _json(file: Path) -> Any:
    try:
        return _parsed(file.read_text(encoding="utf-8-sig"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"cannot read the prompts in {file}: {error}") from error


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DatasetError(f"cannot read the prompts in {name}: {error}") from error


def _gathered(folder: Path, work: Path) -> Path:
    """One JSON file of a folder of prompt files."""
    found: dict[str, dict[str, str]] = {}
    for file in sorted(folder.glob("*.txt")):
        if match := _PROMPT_FILE.fullmatch(file.name):
            found.setdefault(match[1], {})[match[2]] = file.read_text(encoding="utf-8-sig").strip()
    if not found:
        raise DatasetError(f"{folder} holds no <id>_<k>.txt or <id>_prompt<k>.txt")
    return _written(work / "asked.json", json.dumps(found, ensure_ascii=False, indent=1))


def require_own_numbers(folder: Path) -> None:
    """Refuse a frozen identity set of which two samples' videos would be one file of the layout of 2026.

    Raises:
        DatasetError: names the two.
    """
    owners: dict[str, str] = {}
    for row in tables.read_table(folder, "samples", ["prompt_id"]).to_pylist():
        number = row["prompt_id"].removeprefix("prompt")
        if number in owners:
            raise DatasetError(
                f"{owners[number]} and {row['sample_id']} would both be scored on {number}.mp4: in the layout 2026 "
                "each sample needs a number of its own; give its eval.json as --refs or --prompts, or name another "
                "--layout"
            )
        owners[number] = row["sample_id"]


def _numbered_set(refs: str, work: Path) -> dict[str, Any] | None:
    """The `dataset` section where `refs` is an `eval.json`, or a folder that holds one; None for other sets."""
    if "://" in refs and not refs.endswith(".json"):
        return None  # to look into a remote folder before the set is read is not worth a connection
    try:
        place, read = open_set(DatasetConfig(path=_whole(refs)))
    except DatasetError:  # told by whoever reads the set
        return None
    if read is not read_eval_json:
        return None
    with place.open() as stream:
        content = _parsed(stream.read().decode("utf-8-sig", "replace"), place.uri)
    if not isinstance(content, list):
        raise DatasetError(f"{place.uri} is not a list of {{img, prompt}}")
    rows = _rows_of(content, lambda img: img, numbered=True)
    return {"path": str(_written_rows(rows, work)), "format": "jsonl", "images": place.parent.uri}


def _rows_of(content: list[Any], image: Callable[[str], str], numbered: bool) -> list[dict[str, Any]]:
    """Rows of `eval.json`; numbered, each prompt's name is its place, counted from 1, as the videos' names are.

    Args:
        image: makes of an entry's `img` what the row says of its picture.
    """
    rows = []
    for number, entry in enumerate(content, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("img"), str) or "prompt" not in entry:
            raise DatasetError(f"entry {number} of eval.json is not an object with img and prompt")
        row = {"identity_id": Path(entry["img"]).stem, "image": image(entry["img"]), "prompt": entry["prompt"]}
        rows.append({**row, "prompt_id": str(number)} if numbered else row)
    return rows


def _written_rows(rows: list[dict[str, Any]], work: Path) -> Path:
    return _written(work / "asked.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")


def _written(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file.resolve()
