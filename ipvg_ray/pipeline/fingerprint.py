"""What a stage's results depend on, as one hash per stage, and what changed where two hashes differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipvg_ray.pipeline.stage import Stage

_WHOLE = 4 << 20
"""Model files up to this many bytes are hashed whole; of larger ones as many, in stripes spread evenly from the first
byte to the last: hashing 80 GB of weights at every start would cost minutes."""
_STRIPES = 16


@dataclass(frozen=True)
class Fingerprint:
    """`digest` is the hash of `inputs`, the plain values it was made from, kept in run.json to explain a difference."""

    digest: str
    inputs: dict[str, Any]


def fingerprints(stages: Sequence[Stage], seed: int, dataset: str) -> dict[str, Fingerprint]:
    """One fingerprint per stage, each over its own inputs and its upstream's fingerprint.

    Args:
        seed: the run's seed.
        dataset: digest of the frozen identity set, upstream of the first stage.
    """
    result: dict[str, Fingerprint] = {}
    upstream = dataset
    for stage in stages:
        inputs = {
            "version": stage.version,
            "seed": seed,
            "settings": stage.fingerprint_settings(),
            "models": {field: model_digest(path) for field, path in sorted(stage.models().items())},
            "upstream": upstream,
        }
        upstream = digest_of(inputs)
        result[stage.name] = Fingerprint(upstream, inputs)
    return result


def digest_of(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, 16 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_digest(path: Path) -> str:
    """Hash of a model file or folder: relative names, sizes and contents (large files: stripes). Moving it keeps it.

    Files that begin with a dot are left out: download tools keep their notes there.
    """
    digest = hashlib.sha256()
    for file in _files(path):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path) if path.is_dir() else file.suffix}:{size}:".encode())
        with file.open("rb") as stream:
            if size <= _WHOLE:
                digest.update(stream.read())
            else:
                stripe = _WHOLE // _STRIPES
                for number in range(_STRIPES):
                    stream.seek((size - stripe) * number // (_STRIPES - 1))
                    digest.update(stream.read(stripe))
    return digest.hexdigest()[:16]


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for file in sorted(path.rglob("*")):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts):
            yield file


def differences(stage: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The fields in which two fingerprints' inputs differ, as `stage.field: old → new`, upstream left out."""
    lines = []
    for key in ("version", "seed", "settings", "models"):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            for field in sorted({*before, *after}):
                if before.get(field) != after.get(field):
                    note = " (the files differ)" if key == "models" else ""
                    lines.append(f"{stage}.{field}: {before.get(field)!r} → {after.get(field)!r}{note}")
        elif before != after:
            note = "" if key == "seed" else " (this version of ipvg-ray makes it otherwise)"
            lines.append(f"{key if key == 'seed' else f'{stage}.{key}'}: {before!r} → {after!r}{note}")
    return lines
