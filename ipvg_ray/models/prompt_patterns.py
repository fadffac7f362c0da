"""What of the rules a regular expression can say, for engines that enforce one while they write (structured output).

An engine may stop at any point at which the expression is satisfied, and at no other: the target stands first by force,
a list of phrases ends in `close-up` by force, and line breaks, markup and other scripts cannot be written at all. What
no regular expression can say (pronouns, feet, whether it is sense) is left to `prompt_rules`, which checks all answers.
"""

from __future__ import annotations

import re

from ipvg_ray.models.prompt_rules import ENDING, MIN_CHARACTERS, MIN_PHRASES, Language
from ipvg_ray.models.prompt_templates import Call

_WORDS = {"en": r"A-Za-z0-9À-ɏ '\"()&%/\-–—’", "any": None}
_MARKS = ",.;:!?…"
_MAX_PHRASES = 40
_MAX_PHRASE = 80
"""Bounds that no sensible answer reaches; without them a model that does not end would fill the token limit."""


def pattern(call: Call, target: str, language: Language) -> str | None:
    """The expression that the whole answer to a call must match; None where there is nothing to enforce."""
    first = re.escape(target).replace("\\ ", " ")
    if call == "polisher":
        return f"{first}[ ,]{_of(language, _MARKS)}{{{MIN_CHARACTERS},}}"
    if call == "parser":
        phrase = _of(language, "")
        more = f"(, {phrase}{{2,{_MAX_PHRASE}}}){{{MIN_PHRASES - 2},{_MAX_PHRASES}}}"
        return f"{first}( {phrase}{{1,{_MAX_PHRASE}}})?{more}, {ENDING}"
    if call == "appearance":
        return f"{first}[ ,]{_of(language, ',')}{{{MIN_CHARACTERS},400}}\\."
    return None  # a face-aware prompt begins and goes on as the user's own words do


def _of(language: Language, marks: str) -> str:
    """One character of a text in a language: its letters and signs, and these punctuation marks."""
    words = _WORDS[language]
    if words is None:
        return f"[^\\n\\r<>|{{}}{''.join(m for m in _MARKS if m not in marks)}]"
    return f"[{words}{marks}]"
