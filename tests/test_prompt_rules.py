"""The rules that mend, refuse and replace what the language model answers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvg_ray.models import prompt_rules as rules

TARGETS = ("A man", "A woman", "A person")
TRIGGER = "fcsks fxhks fhyks"
GOOD = "A man in a grey coat smiles and lifts a cup of tea."

fragments = st.sampled_from(
    [
        *(*TARGETS, "a man", "Panama man", "<think>", "</think>", "<|im_end|>", "<|", "|>", '"', "'", "”", "“", "*"),
        *(
            "`",
            "close-up",
            "Close up",
            ", ",
            ".",
            "\n",
            "\x00",
            "\u202e",
            "\ud800",
            "👩‍🚀",
            "一个男人",
            TRIGGER,
            GOOD,
            " ",
        ),
    ]
)
texts = st.lists(fragments | st.text(max_size=8), max_size=12).map("".join)
targets = st.sampled_from(TARGETS)


def _polished(answer: str, target: str = "A man", *, finished: bool = True) -> rules.Checked:
    return rules.check_polished(answer, target, finished=finished)


def _spatial(answer: str, target: str = "A man", trigger: str = TRIGGER, *, finished: bool = True) -> rules.Checked:
    return rules.check_spatial(answer, target, finished=finished, trigger_words=trigger)


def test_a_good_answer_is_left_alone() -> None:
    assert _polished(GOOD) == rules.Checked(GOOD, (), ())


@pytest.mark.parametrize(
    ("answer", "mend"),
    [
        (f"Here is the text: {GOOD}", "cut before the target"),
        (f'Here is the text: "{GOOD}"', "cut before the target"),
        (f"In Panama man is old. {GOOD}", "cut before the target"),
        (f"A man-made lake. {GOOD}", "cut before the target"),
        (f"To a man: {GOOD}", "cut before the target"),  # the exact spelling counts before another case
        (f"<think>\nWhat now?\n</think>\n\n{GOOD}", "thinking removed"),
        (f"What now? A man it is.</think>{GOOD}", "thinking removed"),
        (f"{GOOD}<think>Is A man right?", "thinking removed"),
        (f"<THINKING>a</THINKING>{GOOD}", "thinking removed"),
        (f"{GOOD}<|im_end|>", "chat markers removed"),
        (f'"{GOOD}"', "quotation marks removed"),
        (f"“'{GOOD}'”", "quotation marks removed"),
        (f"**{GOOD}**", "quotation marks removed"),
        (f"\ufeff{GOOD[:5]}\x00\u202e{GOOD[5:]}\ufffd", "control characters removed"),
        (f"a man{GOOD[5:]}", "target respelled"),
        (f"In Panama a man{GOOD[5:]}", "target respelled"),
    ],
)
def test_what_can_be_mended_is(answer: str, mend: str) -> None:
    checked = _polished(answer)
    assert checked.text == GOOD
    assert mend in checked.mended
    assert not checked.invalid


def test_quotation_marks_that_are_part_of_the_text_stay() -> None:
    for text in ('A man says "come in" and opens the door.', "A man's hat falls, and he shouts 'hey'"):
        assert _polished(text).text == text
    assert _polished('He says: A man says "come in" to me').text == 'A man says "come in" to me'


@pytest.mark.parametrize(
    ("answer", "finished", "reason"),
    [
        ("", True, "empty"),
        ("<think>never ends, A man", True, "empty"),
        ("\x00 \u200b\n", True, "empty"),
        ("The chef cooks a very good soup.", True, "does not begin with 'A man'"),
        ("A mandarin duck swims on a lake.", True, "does not begin with 'A man'"),
        ("A man.", True, "too short (6 characters)"),
        (GOOD, False, "cut at the token limit"),
    ],
)
def test_what_cannot_be_mended_is_refused(answer: str, finished: bool, reason: str) -> None:
    assert _polished(answer, finished=finished).invalid == (reason,)
    assert reason in _spatial(answer, finished=finished).invalid


@pytest.mark.parametrize("ending", ["", ".", ", close-up", ", Close up.", ", closeup!", ", close\u2011up", " close-up"])
def test_the_spatial_prompt_has_trigger_words_and_ending(ending: str) -> None:
    checked = _spatial(f"Sure! A man, grey coat, soft light{ending}")
    assert checked.text.replace("light close-up", "light, close-up") == (
        f"{TRIGGER}, A man, grey coat, soft light, close-up"
    )
    assert not checked.invalid


def test_trigger_words_can_be_left_out() -> None:
    assert _spatial("A man, grey coat, soft light", trigger="").text == "A man, grey coat, soft light, close-up"


def test_fallbacks_read_as_sentence_and_as_phrases() -> None:
    prompt = "The chef leapt\nfrom the stove."
    assert rules.fallback_polished(prompt, "A woman") == "A woman. The chef leapt from the stove."
    assert rules.fallback_spatial(prompt, "A woman", TRIGGER) == (
        f"{TRIGGER}, A woman, the chef leapt from the stove, close-up"
    )
    assert rules.fallback_polished("a man sings <|im_end|>", "A man") == "A man sings"
    assert rules.fallback_polished("He sings <think>loudly", "A man") == "A man. He sings loudly"
    assert rules.fallback_spatial("😀😀", "A man", "") == "A man, 😀😀, close-up"


def test_plain_keeps_scripts_and_joined_emoji() -> None:
    for text in ("👩\u200d🚀 می\u200cروم", "一个男人在跑步", "क्षत्रिय"):
        assert rules.plain(f" {text}\t\n") == text


def test_the_samples_text_comes_last_and_the_rest_is_fixed() -> None:
    for call in ("polisher", "parser"):
        first, second = (rules.conversation(call, f"text {i}", "A man") for i in "12")
        assert first[0] == second[0] == {"role": "system", "content": rules.template(call)}
        assert first[1]["content"] == "Subject: A man\nText: text 1"
    assert rules.template("polisher") != rules.template("parser")


def test_long_hostile_texts_take_no_quadratic_time() -> None:
    for piece in ("<think>", "</think>", "<|a|>", '"', "'", "<|", "a man ", "\u202e", "close-up "):
        text = piece * (30_000 // len(piece))
        _polished(text), _spatial(text), rules.fallback_polished(text, "A man"), rules.plain(text)


@given(texts, targets, st.booleans())
@settings(max_examples=400)
def test_mending_twice_is_mending_once(answer: str, target: str, finished: bool) -> None:
    for check in (_polished, _spatial):
        once = check(answer, target, finished=finished)
        again = check(once.text, target, finished=finished)
        if not once.invalid or once.text.startswith(target):
            assert again.text == once.text
        once.text.encode()  # storable: no lone surrogates
        if not once.invalid:
            assert not again.invalid
            assert once.text.removeprefix(f"{TRIGGER}, ").startswith(target)


@given(texts, targets)
@settings(max_examples=400)
def test_fallbacks_always_begin_with_the_target(text: str, target: str) -> None:
    video = rules.fallback_polished(text, target)
    assert video.startswith(target)
    assert rules.fallback_polished(video, target) == video
    image = rules.fallback_spatial(text, target, TRIGGER)
    assert image.startswith(f"{TRIGGER}, {target}")
    assert image.endswith("close-up")
    assert (video + image).isprintable() or any(c in video for c in "\u200c\u200d") or not text.isprintable()
