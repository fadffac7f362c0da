"""What the two language-model calls are asked, and the pure rules that mend, accept or replace their answers.

The calls are IPVG-STD's Temporal Prompt Polisher and Spatial Semantic Parser (arXiv 2507.04705). Nothing
here knows a model.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from ipvg_ray.models.chat_engine import Message

Call = Literal["polisher", "parser"]

MIN_CHARACTERS = 15
"""An answer with fewer characters than this after its target describes nothing."""

ENDING = "close-up"

_JOINERS = "\u200c\u200d"  # invisible too, but emoji families, Persian and Indic scripts are spelled with them
_MARKER = re.compile(r"<\|[^|<>\s]{1,40}\|>")
_THINK_TAG = re.compile(r"(</?think(?:ing)?>)", re.IGNORECASE)
_CLOSE_UP = re.compile(r"(?<![\w-])close[\s\-\u2010-\u2013]?up$", re.IGNORECASE)
_QUOTES = {'"': '"', "'": "'", "`": "`", "*": "*", "“": "”", "\u2018": "\u2019", "«": "»", "「": "」"}
_MAY_STAND_INSIDE = (
    "'`*\u2019"  # apostrophes and Markdown; any other closing mark inside means that the pair is not one
)


@dataclass(frozen=True)
class Checked:
    """An answer after the rules.

    Attributes:
        text: the answer as mended; worth using only where `invalid` is empty.
        mended: what was changed, in words; empty where nothing was.
        invalid: why the answer cannot be used; empty where it can.
    """

    text: str
    mended: tuple[str, ...]
    invalid: tuple[str, ...]


@cache
def template(call: Call) -> str:
    """The fixed instruction of a call, `templates/<call>.txt`."""
    return (resources.files("ipvg_ray.models") / "templates" / f"{call}.txt").read_text(encoding="utf-8").strip()


@cache
def templates_digest() -> str:
    """Hash of both instructions, for a fingerprint: other instructions give other answers."""
    return hashlib.sha256("\0".join((template("polisher"), template("parser"))).encode()).hexdigest()[:16]


def conversation(call: Call, text: str, target: str) -> list[Message]:
    """The messages of one call.

    All that is fixed stands first, the target (one of three) after it and the sample's own text last, so that an engine
    with prefix caching reads the instruction once. The instruction has the system's role: the user's text is data.
    """
    return [
        {"role": "system", "content": template(call)},
        {"role": "user", "content": f"Subject: {target}\nText: {plain(text)}"},
    ]


def plain(text: str) -> str:
    """`text` as one line: no control or other invisible characters, no chat markers or thinking tags, single spaces."""
    # Markers give way to a space, not to nothing, so that what stood around one cannot join into another.
    return _one_line(_THINK_TAG.sub(" ", _MARKER.sub(" ", _one_line(text))))


def check_polished(answer: str, target: str, *, finished: bool) -> Checked:
    """Mend and judge an answer of the Temporal Prompt Polisher.

    Mending the mended text again changes nothing.

    Args:
        answer: what the model wrote.
        target: how it must begin, such as `A man`.
        finished: False where the model was stopped by the token limit.
    """
    text, mended = _mend(answer, target)
    return Checked(text, mended, _faults(text, target, finished))


def check_spatial(answer: str, target: str, *, finished: bool, trigger_words: str) -> Checked:
    """Mend and judge an answer of the Spatial Semantic Parser: `<trigger words>, <target> …, close-up`.

    Mending the mended text again changes nothing. Arguments as for `check_polished`; `trigger_words` are the LoRA's,
    none where empty.
    """
    text, mended = _mend(answer, target)
    invalid = _faults(text, target, finished)
    closed = _with_ending(text)
    if closed != text:
        mended = (*mended, f"ended in {ENDING}")
    return Checked(_with_trigger(closed, trigger_words), mended, invalid)


def fallback_polished(text: str, target: str) -> str:
    """The call's input in place of an answer, the target in front: `A man. The chef leapt to the sink.`"""
    text = plain(text)
    return _beginning(text, target) or f"{target}. {text}".rstrip()


def fallback_spatial(text: str, target: str, trigger_words: str) -> str:
    """The call's input in place of an answer: `<trigger words>, A man, the chef leapt to the sink, close-up`."""
    text = plain(text)
    phrases = _beginning(text, target) or f"{target}, {_article_lowered(text)}"
    return _with_trigger(_with_ending(phrases), trigger_words)


def _one_line(text: str) -> str:
    return " ".join("".join(" " if c.isspace() else c for c in text if _is_visible(c)).split())


def _is_visible(character: str) -> bool:
    if character.isspace() or character in _JOINERS:
        return True
    code = ord(character)
    if code == 0xFFFD or code & 0xFFFE == 0xFFFE:  # what undecodable bytes became, and two noncharacters per plane
        return False
    # Control, surrogate and format characters; the last reorder text on the page or hide text in it.
    return unicodedata.category(character) not in ("Cc", "Cs", "Cf")


def _mend(answer: str, target: str) -> tuple[str, tuple[str, ...]]:
    """What both calls' answers have in common, in the order in which one mend can uncover the next."""
    mended = []
    if not all(_is_visible(c) for c in answer):
        mended.append("control characters removed")
    text = _one_line(answer)
    for what, step in (
        ("thinking removed", _without_thinking),
        ("chat markers removed", lambda t: _one_line(_MARKER.sub(" ", t))),
        ("quotation marks removed", _unquoted),
        ("cut before the target", lambda t: _cut(t, target)),
        ("target respelled", lambda t: _beginning(t, target) or t),
    ):
        after = step(text)
        if after != text:
            mended.append(what)
        text = after
    return text, tuple(mended)


def _faults(text: str, target: str, finished: bool) -> tuple[str, ...]:
    faults = []
    if not text:
        faults.append("empty")
    elif not _beginning(text, target):
        faults.append(f"does not begin with {target!r}")
    elif len(text) - len(target) < MIN_CHARACTERS:
        faults.append(f"too short ({len(text)} characters)")
    if not finished:
        faults.append("cut at the token limit")
    return tuple(faults)


def _without_thinking(text: str) -> str:
    """Drop thinking blocks, whole ones and those of which an answer holds only one end."""
    kept: list[str] = []
    inside = False
    for part in _THINK_TAG.split(text):
        if not _THINK_TAG.fullmatch(part):
            kept += [] if inside else [part]
        elif part.startswith("</"):
            if not inside:  # the block began in the prompt: all so far was thinking
                kept.clear()
            inside = False
        else:
            inside = True
    return _one_line(" ".join(kept))


def _unquoted(text: str) -> str:
    """Drop pairs of quotation marks (and Markdown's) around the whole text."""
    while len(text) > 1 and (closing := _QUOTES.get(text[0])) == text[-1]:
        inner = text[1:-1]
        if closing in inner and closing not in _MAY_STAND_INSIDE:
            break
        text = inner.strip()
    return text


def _cut(text: str, target: str) -> str:
    """Drop what stands before the target's first appearance, exactly spelled ones first, and the quotation mark that
    the cut may have left without its other half."""
    if _beginning(text, target):
        return text
    match = _target(target).search(text) or _target(target, re.IGNORECASE).search(text)
    return _without_stray_mark(text[match.start() :]) if match else text


def _without_stray_mark(text: str) -> str:
    while text and text[-1] in '"”»」`*':
        opening = next(o for o, c in _QUOTES.items() if c == text[-1])
        closed = text.count(opening) % 2 == 0 if opening == text[-1] else text.count(opening) >= text.count(text[-1])
        if closed:
            break
        text = text[:-1].rstrip()
    return text


def _beginning(text: str, target: str) -> str | None:
    """`text` with the target spelled as given, or None where it does not begin with it in any case."""
    match = _target(target, re.IGNORECASE).match(text)
    return target + text[match.end() :] if match else None


@cache
def _target(target: str, flags: int = 0) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-]){re.escape(target)}(?![\w-])", flags)  # "A man", not "A man-made" or "Panama man"


def _with_ending(text: str) -> str:
    text = text.rstrip(" .,;:!?…")
    if match := _CLOSE_UP.search(text):
        return text[: match.start()] + ENDING
    return f"{text}, {ENDING}"


def _with_trigger(text: str, trigger_words: str) -> str:
    trigger = trigger_words.strip(" ,")
    return f"{trigger}, {text}" if trigger else text


def _article_lowered(text: str) -> str:
    return re.sub(r"^(?:The|An?)(?=\s)", lambda match: match[0].lower(), text)
