"""Keep secrets out of what a run writes: refuse them in configurations, and cut them out of error messages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

_NAME = re.compile(
    r"(secret|passw(or)?d|passwd|credential|api_?key|access_?key|auth_?token|bearer|_token$|^token$|_headers$)", re.I
)
_HARMLESS = re.compile(r"(_env|_file|_id)$", re.I)
"""Names of a place where a secret is found are none themselves (`api_key_env`), nor are public halves."""
_QUERY = re.compile(r"[?&](api_?key|key|token|access_token|sig|signature|x-amz-signature|password)=", re.I)
_KEYS = re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|\bhf_[A-Za-z0-9]{20,}\b|\bsk-[A-Za-z0-9_-]{20,}\b|PRIVATE KEY-----")
_SHORTEST = 8
"""Characters from which on an environment variable's value is taken for a secret; shorter ones stand in every text."""


def found_in(tree: Any, place: str = "") -> Iterator[str]:
    """Fields of a nested configuration that hold a secret, or look as if they did; never what they hold."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            where = f"{place}.{key}" if place else str(key)
            named = isinstance(value, str) and value and _NAME.search(str(key)) and not _HARMLESS.search(str(key))
            if named:
                yield where
            else:
                yield from found_in(value, where)
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from found_in(value, f"{place}[{number}]")
    elif isinstance(tree, str) and _looks_secret(tree):
        yield place


def _looks_secret(text: str) -> bool:
    if _KEYS.search(text):
        return True
    if "://" not in text:
        return False
    try:
        return "@" in urlsplit(text).netloc or bool(_QUERY.search(text))
    except ValueError:
        return False


def redact(text: str) -> str:
    """The text without the values of environment variables whose names say that they hold secrets, and without keys of
    known forms; each is replaced by the variable's name or by `[key]`."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _NAME.search(name) and not _HARMLESS.search(name):
            text = text.replace(value, f"[{name}]")
    return _KEYS.sub("[key]", text)
