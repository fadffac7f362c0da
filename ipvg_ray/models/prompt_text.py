"""Plain text handling of prompts and answers: what is removed from them, whatever they are for. Knows no model."""

from __future__ import annotations

import re
import unicodedata
from functools import cache

_JOINERS = "\u200c\u200d"  # invisible too, but emoji families, Persian and Indic scripts are spelled with them
_MARKER = re.compile(
    r"<\|[^|<>\s]{1,40}\|>"  # ChatML, Llama 3
    r"|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"  # Llama 2, Mistral, Gemma
)
_THINK_TAG = re.compile(r"(</?think(?:ing)?>)", re.IGNORECASE)
_QUOTES = {'"': '"', "'": "'", "`": "`", "*": "*", "“": "”", "\u2018": "\u2019", "«": "»", "「": "」"}
_MAY_STAND_INSIDE = (
    "'`*\u2019"  # apostrophes and Markdown; any other closing mark inside means that the pair is not one
)
_REMARK = re.compile(
    r"(?:[\W_]*(?:note|explanation|explanations|remark|comment|reasoning|changes(?: made)?|key (?:changes|elements)|"
    r"disclaimer)\b[^\w\n]*:"
    r"|[\W_]*(?:i|i've) (?:have )?(?:kept|added|made|rewritten|rewrote|ensured|removed|changed|focused|avoided)\b"
    r"|[\W_]*(?:this|the) (?:rewritten |revised |new |improved )?(?:prompt|version|description|list|rewrite|text) "
    r"(?:is|has|keeps|retains|maintains|preserves|begins|focuses|ensures|adds|includes|contains|follows|removes)\b"
    r"|[\W_]*(?:let me know|feel free|please let|would you like|hope this)\b"
    r"|\s*-{3,}\s*$|\s*={3,}\s*$)",
    re.IGNORECASE,
)
"""How a line begins in which a model talks about its answer instead of giving it."""
_INLINE_REMARK = re.compile(r"(?<=[.!?)\]])\s+\**(?:Note|Explanation|Remark)\**:.*$")
_BRACKETED_REMARK = re.compile(r"\s*[(\[](?:note|explanation|remark)\b[^()\[\]]*[)\]][\s.]*$", re.IGNORECASE)


def plain(text: str) -> str:
    """`text` as one line: no control or other invisible characters, no chat markers or thinking tags, single spaces."""
    # Markers give way to a space, not to nothing, so that what stood around one cannot join into another.
    return one_line(_THINK_TAG.sub(" ", _MARKER.sub(" ", one_line(text))))


def one_line(text: str) -> str:
    """`text` without invisible characters, all white space single spaces."""
    return " ".join("".join(" " if c.isspace() else c for c in text if is_visible(c)).split())


def is_visible(character: str) -> bool:
    """Whether a character belongs into a prompt: white space does, control and direction characters do not."""
    if character.isspace() or character in _JOINERS:
        return True
    code = ord(character)
    if code == 0xFFFD or code & 0xFFFE == 0xFFFE:  # what undecodable bytes became, and two noncharacters per plane
        return False
    # Control, surrogate and format characters; the last reorder text on the page or hide text in it.
    return unicodedata.category(character) not in ("Cc", "Cs", "Cf")


def mend(answer: str, target: str | None) -> tuple[str, tuple[str, ...]]:
    """What all calls' answers have in common, in the order in which one mend can uncover the next.

    Args:
        target: how the answer should begin; None where it may begin in any way.

    Returns:
        The text as one line, and what was changed, in words.
    """
    text, mended = answer, []
    steps = [
        ("control characters removed", lambda t: "".join(c for c in t if is_visible(c))),
        ("thinking removed", _without_thinking),  # before lines are read as remarks: thoughts hold such lines
        ("remark removed", lambda t: _without_remark_lines(t, target)),
        ("", one_line),
        ("remark removed", lambda t: _without_remarks(t, target)),
        ("chat markers removed", lambda t: one_line(_MARKER.sub(" ", t))),
        ("quotation marks removed", _unquoted),
    ]
    if target is not None:
        steps.append(("cut before the target", lambda t: _cut(t, target)))
        steps.append(("target respelled", lambda t: beginning(t, target) or t))
    for what, step in steps:
        after = step(text)
        if after != text and what and what not in mended:
            mended.append(what)
        text = after
    return text, tuple(mended)


def _without_remark_lines(answer: str, target: str | None) -> str:
    """`answer` up to the first later line that talks about it: `(Note: …)`, `I kept all details …`, `---`.

    The line with the target, or the first that has words, stays in any case: what stands before it is cut later.
    """
    lines = answer.split("\n")
    first = next((i for i, line in enumerate(lines) if any(c.isalnum() for c in line)), 0)
    if target is not None:
        first = next((i for i, line in enumerate(lines) if _target(target, re.IGNORECASE).search(line)), first)
    for i, line in enumerate(lines[first + 1 :], first + 1):
        if _REMARK.match(line):
            return "\n".join(lines[:i])
    return answer


def _without_remarks(text: str, target: str | None) -> str:
    """One line without the remarks at its end: `… smiles. Note: …`, `… smiles (explanation: …)`."""
    found = _target(target, re.IGNORECASE).search(text) if target is not None else None
    answer = found.start() if found else 0
    if match := _INLINE_REMARK.search(text, answer):
        text = text[: match.start()]
    while match := _BRACKETED_REMARK.search(text, answer):
        text = text[: match.start()]
    return text


def beginning(text: str, target: str) -> str | None:
    """`text` with the target spelled as given, or None where it does not begin with it in any case."""
    match = _target(target, re.IGNORECASE).match(text)
    return target + text[match.end() :] if match else None


def _without_thinking(text: str) -> str:
    """Drop thinking blocks, whole ones and those of which an answer holds only one end."""
    kept: list[str] = []
    inside = False
    if not _THINK_TAG.search(text):
        return text
    for part in _THINK_TAG.split(text):
        if not _THINK_TAG.fullmatch(part):
            kept += [] if inside else [part]
        elif part.startswith("</"):
            if not inside:  # the block began in the prompt: all so far was thinking
                kept.clear()
            inside = False
        else:
            inside = True
    return " ".join(kept)


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
    if beginning(text, target):
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


@cache
def _target(target: str, flags: int = 0) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-]){re.escape(target)}(?![\w-])", flags)  # "A man", not "A man-made" or "Panama man"
