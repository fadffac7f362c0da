"""The pure rules that mend, accept or replace what the language model answers. Nothing here knows a model.

The calls are IPVG-STD's Temporal Prompt Polisher and Spatial Semantic Parser (arXiv 2507.04705), and TPIGE's face-aware
prompt and appearance sentence (arXiv 2509.01362). Each has a check and a fallback. What can be mended is mended; what
cannot makes the answer invalid, with the reason in words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ipvg_ray.models.prompt_text import beginning, mend, plain

Language = Literal["en", "any"]
"""What answers are to be written in. `any` leaves the language unchecked, for templates that ask for another."""

MIN_CHARACTERS = 15
"""An answer with fewer characters than this after its target describes nothing."""

ENDING = "close-up"

MIN_PHRASES = 3
MAX_PHRASE_WORDS = 25
"""A still picture's prompt with fewer phrases, or longer ones, is running text."""

KEPT_WORDS = 0.9
"""Share of the prompt's words that a face-aware prompt must hold in their order; room for a changed article."""

_CLOSE_UP = re.compile(r"(?<![\w-])close[\s\-\u2010-\u2013]?up$", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]+[\"'”’)]*\s+")
_FEET = re.compile(
    r"\b(?:bare)?(?:foot|feet)\b(?!\s+(?:of|tall|high|long|away|above|below|deep|wide))|\bbarefoot(?:ed)?\b|"
    r"\b(?:footwear|shoes?|boots?|sneakers?|sandals?|slippers?|socks?|stockings?|loafers?|trainers|moccasins|"
    r"stilettos?|(?:high[- ])?heels?|flip-flops?|ankles?|toes?)\b",
    re.IGNORECASE,
)
_NUMBER_BEFORE = re.compile(r"(?:\d|\b(?:two|three|four|five|six|seven|eight|nine|ten|hundred|thousand|few)\s*)$", re.I)
_JOINT = re.compile(r"\s+(?:and|with|in|wearing|over|above|plus|or)\s+", re.IGNORECASE)
_HE = re.compile(r"\b(?:he|him|his|himself)\b", re.IGNORECASE)
_SHE = re.compile(r"\b(?:she|her|hers|herself)\b", re.IGNORECASE)
_MEN = re.compile(
    r"\b(?:m[ae]n|boys?|guys?|gentlem[ae]n|males?|fathers?|dads?|daddy|sons?|brothers?|husbands?|uncles?|nephews?|"
    r"grandfathers?|grandpas?|grandsons?|boyfriends?|grooms?|kings?|princes?|lads?|actors?|waiters?|mr|sir|"
    r"\w+m[ae]n)\b",
    re.IGNORECASE,
)
_WOMEN = re.compile(
    r"\b(?:wom[ae]n|girls?|lad(?:y|ies)|females?|mothers?|mums?|moms?|mommy|daughters?|sisters?|wi(?:fe|ves)|aunts?|"
    r"nieces?|grandmothers?|grandmas?|granddaughters?|girlfriends?|brides?|queens?|princess(?:es)?|actress(?:es)?|"
    r"waitress(?:es)?|mrs|ms|miss|madam|\w+wom[ae]n)\b",
    re.IGNORECASE,
)
_ENGLISH = re.compile(
    r"(?:a|an|and|are|as|at|be|behind|before|but|by|each|for|from|has|have|he|her|herself|his|himself|holds|in|inside|"
    r"into|is|it|its|of|off|on|one|onto|or|out|over|she|slightly|some|that|the|their|them|then|there|they|this|through|"
    r"to|towards?|under|up|wearing|wears|while|who|with|within|without|you|your)"
)
MIN_ENGLISH = 0.1
"""Share of such words below which running text of a dozen words or more is not English (English has about 0.4)."""


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


def check_polished(answer: str, target: str, *, finished: bool, language: Language = "en") -> Checked:
    """Mend and judge an answer of the Temporal Prompt Polisher.

    Mending the mended text again changes nothing.

    Args:
        answer: what the model wrote.
        target: how it must begin, such as `A man`.
        finished: False where the model was stopped by the token limit.
        language: what it was asked to be written in.
    """
    text, mended = mend(answer, target)
    return Checked(text, mended, _faults(text, target, finished, language))


def check_spatial(
    answer: str, target: str, *, finished: bool, trigger_words: str, language: Language = "en"
) -> Checked:
    """Mend and judge an answer of the Spatial Semantic Parser: `<trigger words>, <target> …, close-up`.

    Mending the mended text again changes nothing. Arguments as for `check_polished`; `trigger_words` are the LoRA's,
    none where empty.
    """
    text, mended = mend(answer, target)
    for what, step in (("sentences parted into phrases", _phrased), ("feet and shoes removed", _without_feet)):
        after = step(text)
        mended, text = (mended if after == text else (*mended, what)), after
    invalid = _faults(text, target, finished, language)
    closed = _with_ending(text)
    if closed != text:
        mended = (*mended, f"ended in {ENDING}")
    if not invalid and (fault := _not_phrases(closed)):
        invalid = (fault,)
    return Checked(_with_trigger(closed, trigger_words), mended, invalid)


def check_face_aware(answer: str, prompt: str, *, finished: bool, language: Language = "en") -> Checked:
    """Mend and judge TPIGE's face-aware prompt: the prompt's own words in their order, and more between them."""
    text, mended = mend(answer, None)
    faults = list(_broken(text, finished))
    wanted, have = _words(plain(prompt)), _words(text)
    if text:
        kept = _common(wanted, have)
        if kept < KEPT_WORDS * len(wanted):
            faults.append(f"keeps {kept} of the prompt's {len(wanted)} words")
        elif len(have) - kept < 3:
            faults.append("adds no description of the face")
        # Judged where the prompt itself passes: its own words are kept whatever they are.
        if not _foreign(plain(prompt), language) and (fault := _foreign(text, language)):
            faults.append(fault)
    return Checked(text, mended, tuple(faults))


def check_appearance(answer: str, target: str, *, finished: bool, language: Language = "en") -> Checked:
    """Mend and judge TPIGE's one sentence on how the subject of the reference picture looks: `A man in a grey coat.`"""
    text, mended = mend(answer, target)
    first = _SENTENCE_END.split(text, maxsplit=1)[0].rstrip(" .!?…") + "." if text else text
    if first != text:
        mended = (*mended, "cut after the first sentence" if len(first) < len(text) else "full stop added")
    return Checked(first, mended, _faults(first, target, finished, language))


def fallback_polished(text: str, target: str) -> str:
    """The call's input in place of an answer, the target in front: `A man. The chef leapt to the sink.`"""
    text = plain(text)
    return beginning(text, target) or f"{target}. {text}".rstrip()


def fallback_spatial(text: str, target: str, trigger_words: str) -> str:
    """The call's input in place of an answer: `<trigger words>, A man, the chef leapt to the sink, close-up`."""
    text = plain(text)
    phrases = beginning(text, target) or f"{target}, {_article_lowered(text)}"
    return _with_trigger(_with_ending(phrases), trigger_words)


def spatial_from(sentence: str, trigger_words: str) -> str:
    """A sentence as the prompt of a still picture: `<trigger words>, A man in a grey coat, close-up`."""
    return _with_trigger(_with_ending(plain(sentence)), trigger_words)


# -- judging ----------------------------------------------------------------------------------------------------


def _faults(text: str, target: str, finished: bool, language: Language) -> tuple[str, ...]:
    judged = (_foreign(text.removeprefix(target), language), _contradicting(text, target))
    return (*_broken(text, finished, target), *(fault for fault in judged if fault))


def _broken(text: str, finished: bool, target: str = "") -> Iterator[str]:
    if not text:
        yield "empty"
    elif target and not beginning(text, target):
        yield f"does not begin with {target!r}"
    elif len(text) - len(target) < MIN_CHARACTERS:
        yield f"too short ({len(text)} characters)"
    if not finished:
        yield "cut at the token limit"


def _contradicting(text: str, target: str) -> str | None:
    """A pronoun of the other gender that nobody named before it can be meant by."""
    for mine, pronouns, people in (("A man", _SHE, _WOMEN), ("A woman", _HE, _MEN)):
        if target != mine or not (match := pronouns.search(text)):
            continue
        # "A woman" itself holds no man; `\w+man` must not take it for one.
        named = any(not _WOMEN.fullmatch(m[0]) or people is _WOMEN for m in people.finditer(text, 0, match.start()))
        if not named:
            return f"calls {target!r} {match[0].lower()!r}"
    return None


def _foreign(text: str, language: Language) -> str | None:
    """Why a text is not in the language that was asked for."""
    if language == "any":
        return None
    letters = [c for c in text if c.isalpha()]
    latin = sum(c < "\u0250" for c in letters)
    if letters and latin < 0.9 * len(letters):
        return "is not written in Latin letters"
    words = _words(text)
    # Commas make a list of phrases, which needs few small words.
    if len(words) >= 12 and text.count(",") * 6 < len(words):
        share = sum(_ENGLISH.fullmatch(word) is not None for word in words) / len(words)
        if share < MIN_ENGLISH:
            return "is not English"
    return None


def _not_phrases(text: str) -> str | None:
    phrases = [phrase.split() for phrase in text.split(",") if phrase.strip()]
    if len(phrases) < MIN_PHRASES:
        return f"has {len(phrases)} phrases"
    longest = max(map(len, phrases))
    return f"has a phrase of {longest} words" if longest > MAX_PHRASE_WORDS else None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’]\w+)?", text.lower())


def _common(wanted: list[str], have: list[str]) -> int:
    """How many of the wanted words stand in the other text in their order: the longest common subsequence.

    Bit-parallel (Hyyrö, 2004): hostile texts of thousands of equal words take no quadratic time in practice.
    """
    places: dict[str, int] = {}
    for i, word in enumerate(wanted):
        places[word] = places.get(word, 0) | 1 << i
    everything = (1 << len(wanted)) - 1
    row = everything
    for word in have:
        matching = row & places.get(word, 0)
        row = ((row + matching) | (row - matching)) & everything
    return len(wanted) - row.bit_count()


# -- mending ----------------------------------------------------------------------------------------------------


def _phrased(text: str) -> str:
    """Sentences and semicolons as phrases: `A man sits. He smiles.` becomes `A man sits, he smiles`."""
    parts = [part.strip(" .,;:!?…") for part in _SENTENCE_END.split(text)]
    text = ", ".join(part if i == 0 else _article_lowered(part) for i, part in enumerate(parts) if part)
    return ", ".join(part for part in (p.strip() for p in re.split(r"[,;]", text)) if part)


def _without_feet(text: str) -> str:
    """Phrases without what they say of feet and shoes; a phrase that says nothing else goes."""
    phrases = [_phrase_without_feet(phrase) for phrase in text.split(", ")]
    return ", ".join(phrase for phrase in phrases if phrase)


def _phrase_without_feet(phrase: str) -> str:
    while match := next(_named_feet(phrase), None):
        joint = max((m.start() for m in _JOINT.finditer(phrase, 0, match.start())), default=None)
        phrase = "" if joint is None else phrase[:joint].rstrip()
    return phrase


def _named_feet(phrase: str) -> Iterator[re.Match[str]]:
    """Feet that are no measure of length."""
    for match in _FEET.finditer(phrase):
        if not (
            match[0].lower() in ("feet", "foot")
            and _NUMBER_BEFORE.search(phrase[max(0, match.start() - 12) : match.start()].rstrip("- "))
        ):
            yield match


def _with_ending(text: str) -> str:
    text = text.rstrip(" .,;:!?…")
    if match := _CLOSE_UP.search(text):
        return text[: match.start()] + ENDING
    return f"{text}, {ENDING}"


def _with_trigger(text: str, trigger_words: str) -> str:
    trigger = trigger_words.strip(" ,")
    return f"{trigger}, {text}" if trigger else text


def _article_lowered(text: str) -> str:
    return re.sub(r"^(?:The|An?|He|She|They|His|Her|Their|It|Its|In|On|At|With)(?=\s)", lambda m: m[0].lower(), text)
