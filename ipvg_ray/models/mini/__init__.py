"""Miniature models: random weights in the real architectures and the real on-disk formats, for machines without GPUs.

What they draw is noise; that every stage runs the code it runs with the real models is their whole use.
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ipvg_ray import files

VERSION = 5
"""Raise it when any maker below, or an architecture it builds, gives other bytes for the same seed."""

MAKERS = ("insightface_pack", "hrnet", "qwen3", "qwen3_vl", "clip_vision", "sdxl", "hyperlora", "wan_vace", "metrics")
"""Modules with `make(root, seed)`, in the order in which they run: HyperLoRA is cut to the SDXL before it."""

_BUILD = ".mini-build-"


def make_all(root: Path, seed: int = 0, report: Callable[[str], object] = print) -> None:
    """Make every miniature below `root`, at the places that profile `cpu-mini` names.

    Does nothing where they are there already, made by this version from this seed. They are built in a folder beside
    and moved into place at the end, so a kill leaves either no miniature or a set that the next call makes anew;
    other models below `root` are not touched. `mini.json` lists every file with its size and SHA-256.

    Args:
        seed: of all weights; equal seeds give equal bytes.
        report: gets a line per model.
    """
    root = root.expanduser()
    with files.file_lock(root / ".mini-lock"):
        before = files.read_json(root / "mini.json") or {}
        if _is_made(before, root, seed):
            report(f"the miniature models in {root} are made already")
            return
        for leftover in root.glob(f"{_BUILD}*"):
            shutil.rmtree(leftover)
        build = Path(tempfile.mkdtemp(prefix=_BUILD, dir=root))
        try:
            _run_makers(build, seed, report)
            _move_into_place(build, root, seed, before)
        finally:
            shutil.rmtree(build, ignore_errors=True)


def _is_made(listed: dict[str, object], root: Path, seed: int) -> bool:
    content = listed.get("files")
    right = listed.get("version") == VERSION and listed.get("seed") == seed and listed.get("complete") is True
    return right and isinstance(content, dict) and not files.differing(content, root)


def _run_makers(build: Path, seed: int, report: Callable[[str], object]) -> None:
    for name in MAKERS:
        started, held = time.monotonic(), _bytes_below(build)
        importlib.import_module(f"{__name__}.{name}").make(build, seed)
        size = _bytes_below(build) - held
        report(f"{name:<16} {size / 1e6:7.1f} MB {time.monotonic() - started:6.1f} s")


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in files.files_below(folder))


def _move_into_place(build: Path, root: Path, seed: int, before: dict[str, object]) -> None:
    """Move file by file, since folders such as `insightface/models` may hold real models too."""
    content = files.listing(files.files_below(build), build)
    old = before.get("files")
    known = {*content, *(old if isinstance(old, dict) else ())}
    # Until all files are moved the list says so, whatever it said of the ones they replace.
    state = {"version": VERSION, "seed": seed, "complete": False, "files": dict.fromkeys(sorted(known))}
    files.write_json(root / "mini.json", state)
    for name in content:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (build / name).chmod(0o644)  # safetensors writes for the owner alone; workers may be other users
        os.replace(build / name, root / name)
    for name in known - set(content):
        (root / name).unlink(missing_ok=True)
    files.write_json(root / "mini.json", {**state, "complete": True, "files": content})
