"""What must hold of every finished run of `engine_driver`, whatever happened to it on the way."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from engine_driver import STAGES, Third

from ipvg_ray import tables
from ipvg_ray.media.names import safe_name
from ipvg_ray.storage import RunPath


def raw_keys(run_dir: RunPath, stage: str, key: str) -> list[str]:
    """Keys as the part files hold them, doubles included."""
    return [k for part in tables.parts(run_dir, stage) for k in tables.read_part(part, [key])[key].to_pylist()]


def check_complete(run_dir: RunPath, failed: dict[str, set[str]] | None = None) -> None:
    """Each row of each stage exactly once, in its table or in the failures; values right; files where they belong."""
    failed = failed or {}
    identities = raw_keys(run_dir, "identities", "identity_id")
    samples = tables.read_table(run_dir, "samples").to_pylist()
    dead: set[str] = set()
    found = tables.read_table(run_dir, "failures").to_pylist()
    for stage in STAGES:
        key = stage.table().key[0]
        everything = (
            identities
            if stage.grain == "identity"
            else [s["sample_id"] for s in samples if s["identity_id"] not in dead and s["sample_id"] not in dead]
        )
        gone = [f[key] for f in found if f["stage"] == stage.name]
        assert Counter(gone) == Counter(failed.get(stage.name, set()))
        dead |= set(gone)
        assert Counter(raw_keys(run_dir, stage.name, key)) == Counter(k for k in everything if k not in dead)
    width = dict(enumerate(identities))
    number = {identity: i for i, identity in width.items()}
    prompts = {s["sample_id"]: s for s in samples}
    for row in tables.read_table(run_dir, Third.table()).to_pylist():
        sample = prompts[row["sample_id"]]
        assert row["answer"].startswith(f"{sample['prompt']} {number[sample['identity_id']] + 1} ")
        place = run_dir / "files" / safe_name(sample["identity_id"]) / (safe_name(sample["prompt_id"]) + ".txt")
        assert (run_dir / row["uri"]) == place
        assert place.read_text() == row["answer"]


def check_nothing_redone(run_dir: RunPath, keys: dict[str, str] | None = None) -> int:
    """No row was begun in a session after the one whose part file holds it; returns how many begins there were.

    Args:
        keys: key column of each stage; of `engine_driver`'s if not given.
    """
    begins = 0
    for stage, key in (keys or {stage.name: stage.table().key[0] for stage in STAGES}).items():
        finished_in = {
            k: part.name.split("-")[1] + "-" + part.name.split("-")[2]
            for part in tables.parts(run_dir, stage)
            for k in tables.read_part(part, [key])[key].to_pylist()
        }
        for session in sorted(p.name for p in (run_dir / "_engine").iterdir() if (p / "journal").is_dir()):
            for file in (run_dir / "_engine" / session / "journal").glob(f"{stage}-*.jsonl"):
                for line in file.read_text().splitlines():
                    if not line.endswith("}"):
                        continue  # cut off by the kill
                    event = json.loads(line)
                    if event["event"] == "begin":
                        begins += len(event["keys"])
                        late = [k for k in event["keys"] if k in finished_in and finished_in[k] < session]
                        assert not late, f"{stage} computed {late} again in {session}"
    return begins


def events(run_dir: Path, stage: str) -> list[dict[str, Any]]:
    """What the workers' journals hold of a stage, in order of time."""
    lines = [line for file in run_dir.glob(f"_engine/*/journal/{stage}-*") for line in file.read_text().splitlines()]
    return sorted((json.loads(line) for line in lines), key=lambda event: event["t"])
