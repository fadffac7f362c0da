"""The instructions that the language model is given: text files, which a user can read and replace."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal, get_args

from ipvg_ray.errors import UserError
from ipvg_ray.models.chat_engine import Message
from ipvg_ray.models.prompt_text import plain

Call = Literal["polisher", "parser", "face_aware", "appearance"]
"""The calls of the methods; each one's instruction is the file `<call>.txt`."""

CALLS: tuple[Call, ...] = get_args(Call)
MAX_BYTES = 64 * 1024
"""More than any instruction: a larger file is a mistake."""


class TemplateError(UserError):
    """A file of instructions that cannot be used; the message names it."""


def load_templates(calls: Sequence[Call], folder: Path | None) -> dict[Call, str]:
    """The instructions of some calls.

    Args:
        folder: holds a user's own, by the same names; those it does not hold are the built-in ones.

    Raises:
        TemplateError: where the folder does not exist or holds none of these files, or one is empty or unreadable.
    """
    texts = {call: _built_in(call) for call in calls}
    if folder is None:
        return texts
    own = {call: folder / f"{call}.txt" for call in calls if (folder / f"{call}.txt").exists()}
    if not own:
        names = ", ".join(f"{call}.txt" for call in calls)
        raise TemplateError(
            f"prompts.templates: {folder} holds none of {names}; copy one from `ipvg_ray/models/templates`"
        )
    return texts | {call: _read(file) for call, file in own.items()}


def digest(templates: Mapping[Call, str]) -> str:
    """Hash of instructions, for a fingerprint: other instructions give other answers."""
    text = "\0".join(f"{call}\0{templates[call]}" for call in sorted(templates))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def conversation(template: str, text: str, target: str) -> list[Message]:
    """The messages of one call.

    All that is fixed stands first, the target (one of three) after it and the sample's own text last, so that an engine
    with prefix caching reads the instruction once. The instruction has the system's role: the user's text is data.
    """
    return [
        {"role": "system", "content": template},
        {"role": "user", "content": f"Subject: {target}\nText: {plain(text)}"},
    ]


def _built_in(call: Call) -> str:
    return (resources.files("ipvg_ray.models") / "templates" / f"{call}.txt").read_text(encoding="utf-8").strip()


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise TemplateError(f"{file} is larger than {MAX_BYTES} bytes; is it an instruction?")
        text = file.read_text(encoding="utf-8-sig").strip()  # some editors put a mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"cannot read the instruction {file} as UTF-8 text: {error}") from error
    if not text:
        raise TemplateError(f"the instruction {file} is empty; write one, or remove the file to use the built-in one")
    return text
