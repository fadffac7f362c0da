"""What run.json says, made fit to read. Nothing here trusts a key to be there or a value to be of its type."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

MODEL_FIELDS = ("engine", "method", "pack", "id_pack", "model", "checkpoint", "hyperlora", "clip_vision", "dtype")
"""Fields of a stage's section that say what it runs, in the order to show."""

NOTHING = "\N{EN DASH}"
"""Shown where there is no figure."""

_CREDENTIALS = re.compile(r"([a-z][a-z0-9+.-]*://)[^/@\s]+@", re.IGNORECASE)


@dataclass
class Timing:
    """What one stage has done in one session, or in all. `busy` is the sum of its workers' seconds at work, `first_row`
    the longest that a node was up before its first row began, s."""

    rows: int = 0
    failed: int = 0
    busy: float = 0.0
    workers: int = 0
    first_row: float = 0.0

    @property
    def per_row(self) -> float | None:
        """Worker seconds per row tried; None before the first."""
        tried = self.rows + self.failed
        return self.busy / tried if tried and self.busy else None


@dataclass(frozen=True)
class Session:
    """One start of the run. Times are texts for people; `seconds` is None while it runs, or where it was killed; `lost`
    says in words what went with nodes."""

    started: str
    seconds: float | None
    outcome: str
    host: str
    stages: dict[str, Timing] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)


def mapping(value: Any) -> Mapping[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def sessions(run: Mapping[str, Any]) -> list[Session]:
    """The run's sessions, oldest first."""
    given = run.get("sessions")
    return [_session(mapping(one)) for one in given] if isinstance(given, list) else []


def _session(one: Mapping[str, Any]) -> Session:
    stages = {
        str(name): Timing(
            rows=int(number(mapping(timing).get("rows")) or 0),
            failed=int(number(mapping(timing).get("failed")) or 0),
            busy=number(mapping(timing).get("busy_seconds")) or 0.0,
            workers=int(number(mapping(timing).get("workers")) or 0),
            first_row=number(mapping(timing).get("first_row_seconds")) or 0.0,
        )
        for name, timing in mapping(one.get("stages")).items()
    }
    outcome = one.get("outcome") or ("" if one.get("ended") else "not ended")
    seconds = number(one.get("seconds"))
    lost = losses(mapping(one.get("lost")))
    return Session(moment(one.get("started")), seconds, str(outcome), str(one.get("host") or ""), stages, lost)


def losses(lost: Mapping[str, Any]) -> list[str]:
    """What was lost with nodes, in words; nothing of what was not."""
    words = {
        "notices": ("node was taken away after a notice", "nodes were taken away after a notice"),
        "batches": ("batch was begun again elsewhere", "batches were begun again elsewhere"),
        "executions": ("time the run went on from its checkpoints", "times the run went on from its checkpoints"),
    }
    counts = {kind: int(number(lost.get(kind)) or 0) for kind in words}
    return [f"{n} {words[kind][n != 1]}" for kind, n in counts.items() if n]


def totals(all_sessions: list[Session]) -> dict[str, Timing]:
    """Each stage's timings summed over sessions; of the workers and of what a first row took, the most."""
    result: dict[str, Timing] = {}
    for session in all_sessions:
        for name, timing in session.stages.items():
            total = result.setdefault(name, Timing())
            total.rows += timing.rows
            total.failed += timing.failed
            total.busy += timing.busy
            total.workers = max(total.workers, timing.workers)
            total.first_row = max(total.first_row, timing.first_row)
    return result


def models(run: Mapping[str, Any], stages: list[str]) -> dict[str, list[str]]:
    """What each stage runs: values of its section's model fields, those that its fingerprint was made from.

    A stage may leave models of its section unused, as evaluation does where terms are not accepted, or the section as
    a whole, as the stage that takes given videos does.
    """
    found = {}
    for name in stages:
        section = mapping(mapping(run.get("config")).get(name))
        inputs = mapping(mapping(mapping(run.get("stages")).get(name)).get("inputs"))
        used = mapping(inputs.get("models"))
        known = {*mapping(inputs.get("settings")), *used} if inputs else set(section)
        keys = [*(key for key in MODEL_FIELDS if key in known), *(key for key in used if key not in MODEL_FIELDS)]
        if values := list(dict.fromkeys(clean(section[key]) for key in keys if section.get(key))):
            found[name] = values
    return found


def settings(config: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Every setting as text: section to (field, value) pairs; those outside a section under `run`."""
    sections: dict[str, list[tuple[str, str]]] = {"run": []}
    for key, value in config.items():
        if isinstance(value, Mapping):
            sections[str(key)] = list(_flat(value))
        else:
            sections["run"].append((str(key), clean(value)))
    return {name: fields for name, fields in sections.items() if fields}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", clean(value)


def clean(value: Any) -> str:
    """A setting or message as text; credentials inside URIs (`s3://key:secret@bucket`) are left out."""
    if value is None or value in ({}, []):
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(clean(item) for item in value)
    return _CREDENTIALS.sub(r"\1…@", str(value))


def moment(value: Any) -> str:
    """An ISO time or a datetime as `2025-11-21 03:08 UTC`; nothing for None, any other text as it is."""
    if value is None:
        return ""
    try:
        time = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    except ValueError:
        return str(value)
    time = time.astimezone(UTC) if time.tzinfo else time
    return time.strftime("%Y-%m-%d %H:%M") + (" UTC" if time.tzinfo else "")


def duration(seconds: Any) -> str:
    """Seconds as people say them: `0.42 s`, `12.3 s`, `4 min 05 s`, `2 h 10 min`, `3 d 4 h`."""
    value = number(seconds)
    if value is None:
        return NOTHING
    if value < 59.95:
        return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def size(count: Any) -> str:
    """Bytes as `512 B`, `34 kB`, `1.2 MB` (powers of 1000)."""
    value = number(count)
    if value is None:
        return NOTHING
    units = ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    whole = units[0] == "B" or value >= 9.95
    return f"{value:.0f} {units[0]}" if whole else f"{value:.1f} {units[0]}"


def figure(value: Any) -> str:
    """A score as text: whole numbers whole, others with three decimals, truth values as yes and no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if number(value) is None:
        return NOTHING
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def count(value: int) -> str:
    """A count with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u202f")
