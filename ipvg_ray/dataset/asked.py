"""What was asked for, where videos of others are scored: pictures and prompts as the evaluations hand them out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ipvg_ray.dataset.problems import DatasetError

_PROMPT_FILE = re.compile(r"(.+)_(?:prompt)?(\d+)\.txt")


def asked(refs: str, prompts: str | None, work: Path) -> dict[str, Any]:
    """The `dataset` section of the configuration for pictures and prompts given apart.

    Args:
        refs: folder of the reference pictures, or an identity set in a form that holds the prompts too.
        prompts: None where they are in `refs`; else a folder of `<id>_<k>.txt` or `<id>_prompt<k>.txt` (TPIGE), a JSON
            object `{id: {"1": text}}`, the challenge's `eval.json` of 2026, or any prompts file of the format `images`.
        work: folder for a file that brings what was given into one form.

    Raises:
        DatasetError: where the prompts cannot be read.
    """
    if prompts is None:
        return {"path": _whole(refs)}
    place = Path(prompts)
    if place.is_dir():
        return {"path": str(_gathered(place, work)), "format": "tpige_json", "images": _whole(refs)}
    if place.suffix == ".json":
        content = _json(place)
        if isinstance(content, list):
            return {"path": str(_numbered(content, work)), "format": "jsonl", "images": _whole(refs)}
        return {"path": _whole(prompts), "format": "tpige_json", "images": _whole(refs)}
    return {"path": _whole(refs), "format": "images", "prompts": _whole(prompts)}


def _whole(path: str) -> str:
    return path if "://" in path else str(Path(path).resolve())


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot read the prompts in {file}: {error}") from error


def _gathered(folder: Path, work: Path) -> Path:
    """One JSON file of a folder of prompt files."""
    found: dict[str, dict[str, str]] = {}
    for file in sorted(folder.glob("*.txt")):
        if match := _PROMPT_FILE.fullmatch(file.name):
            found.setdefault(match[1], {})[match[2]] = file.read_text(encoding="utf-8-sig").strip()
    if not found:
        raise DatasetError(f"{folder} holds no <id>_<k>.txt or <id>_prompt<k>.txt")
    return _written(work / "asked.json", json.dumps(found, ensure_ascii=False, indent=1))


def _numbered(content: list[Any], work: Path) -> Path:
    """`eval.json` as lines in which each prompt's name is its place, counted from 1, as the videos' names are."""
    lines = []
    for number, entry in enumerate(content, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("img"), str) or "prompt" not in entry:
            raise DatasetError(f"entry {number} of eval.json is not an object with img and prompt")
        row = {
            "identity_id": Path(entry["img"]).stem,
            "image": Path(entry["img"]).name,
            "prompt": entry["prompt"],
            "prompt_id": str(number),
        }
        lines.append(json.dumps(row, ensure_ascii=False))
    return _written(work / "asked.jsonl", "\n".join(lines) + "\n")


def _written(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file.resolve()
