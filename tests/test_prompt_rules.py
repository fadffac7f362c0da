"""The rules that mend, refuse and replace what the language model answers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvg_ray.models import prompt_rules as rules
from ipvg_ray.models.prompt_patterns import pattern
from ipvg_ray.models.prompt_templates import CALLS, TemplateError, conversation, load_templates
from ipvg_ray.models.prompt_text import plain

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
    spatial = _spatial(answer, finished=finished).invalid
    assert [fault.split(" (")[0] for fault in spatial] == [reason.split(" (")[0]]


@pytest.mark.parametrize("ending", ["", ".", ", close-up", ", Close up.", ", closeup!", ", close\u2011up", " close-up"])
def test_the_spatial_prompt_has_trigger_words_and_ending(ending: str) -> None:
    checked = _spatial(f"Sure! A man, grey coat, soft light{ending}")
    assert checked.text.replace("light close-up", "light, close-up") == (
        f"{TRIGGER}, A man, grey coat, soft light, close-up"
    )
    assert not checked.invalid


def test_trigger_words_can_be_left_out() -> None:
    assert _spatial("A man, grey coat, soft light", trigger="").text == "A man, grey coat, soft light, close-up"


@pytest.mark.parametrize(
    "remark",
    [
        "\n\nNote: I kept all details.",
        "\n\n**Explanation:** The prompt begins with the subject.",
        "\n---\nThis version keeps the facts.",
        "\nI've added a smile.",
        "\n\nLet me know if you want more.",
        " (Note: the background was shortened.)",
        " Note: the background was shortened.",
    ],
)
def test_remarks_behind_the_answer_are_cut(remark: str) -> None:
    checked = _polished(GOOD + remark)
    assert checked.text == GOOD
    assert checked.mended == ("remark removed",)


@pytest.mark.parametrize("opening", ["**Rewritten prompt:**\n---\n", "Note: done as asked.\nExplanation: below.\n"])
def test_remarks_before_the_answer_do_not_take_it_with_them(opening: str) -> None:
    assert _polished(opening + GOOD).text == GOOD


def test_words_that_are_no_remark_stay() -> None:
    for text in (
        "A man reads a note: it is short. He smiles.",
        "A man looks up.\nThe list on the wall is long.",
        "<think>\nNote: think.\n</think>\nA man reads and smiles.",
    ):
        assert "remark removed" not in _polished(text).mended
        assert _polished(text).text.endswith((".", "smiles."))


@pytest.mark.parametrize(
    ("text", "target", "fault"),
    [
        ("A man lifts her cup and smiles.", "A man", "calls 'A man' 'her'"),
        ("A woman sits; himself in the mirror.", "A woman", "calls 'A woman' 'himself'"),
        ("A man cooks while he hums. She then smiles.", "A man", "calls 'A man' 'she'"),
        ("A man greets his daughter and takes her hand.", "A man", None),
        ("A woman listens to the salesman as he talks.", "A woman", None),
        ("A woman lifts her cup and smiles to herself.", "A woman", None),
        ("A person lifts his cup and smiles at last.", "A person", None),
    ],
)
def test_pronouns_must_not_contradict_the_target(text: str, target: str, fault: str | None) -> None:
    assert _polished(text, target).invalid == ((fault,) if fault else ())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("A man 穿灰色外套的男人在雨中微笑并走过街道", "is not written in Latin letters"),
        (
            "A man trägt einen grauen Mantel und lächelt freundlich während die Sonne langsam hinter dem Haus",
            "is not English",
        ),
        ("A man walks down the street in a café and says a few words to the guests.", None),
        ("A man, grey coat, red scarf, soft light, film grain, shallow focus, warm tones, brown eyes, close-up", None),
    ],
)
def test_answers_are_in_the_language_asked_for(text: str, fault: str | None) -> None:
    assert _polished(text).invalid == ((fault,) if fault else ())
    assert rules.check_polished(text, "A man", finished=True, language="any").invalid == ()


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("A man, grey coat, black shoes, soft light", "A man, grey coat, soft light"),
        ("A man, grey coat and leather boots, soft light", "A man, grey coat, soft light"),
        ("A man in high heels, grey coat, soft light", "A man, grey coat, soft light"),
        ("A man six feet tall, grey coat, soft light", "A man six feet tall, grey coat, soft light"),
        ("A man, grey coat, at the foot of a hill", "A man, grey coat, at the foot of a hill"),
        ("A man in a grey coat. He smiles; soft light.", "A man in a grey coat, he smiles, soft light"),
    ],
)
def test_the_spatial_prompt_is_phrases_without_feet(answer: str, wanted: str) -> None:
    checked = _spatial(answer)
    assert checked.text == f"{TRIGGER}, {wanted}, close-up"
    assert not checked.invalid


def test_running_text_is_no_spatial_prompt() -> None:
    long = "A man in a grey coat " + "walks along the river and " * 6 + ", soft light"
    assert _spatial(long).invalid == ("has a phrase of 36 words",)
    assert _spatial("A man who is smiling in a grey coat").invalid == ("has 2 phrases",)


PROMPT = "The chef leapt from the stove to the sink, and he sang."
FACE = "The chef, a man of about forty with a full beard and calm eyes, leapt from the stove to the sink, and he sang."


@pytest.mark.parametrize(
    ("answer", "faults"),
    [
        (FACE, ()),
        (f'"{FACE}"\n\nNote: words kept.', ()),
        ("A chef" + FACE[8:], ()),  # a changed article is let pass
        (PROMPT, ("adds no description of the face",)),
        ("A man of about forty with a full beard cooks and sings.", ("keeps 1 of the prompt's 12 words",)),
        ("", ("empty",)),
    ],
)
def test_a_face_aware_prompt_keeps_the_words_and_adds_some(answer: str, faults: tuple[str, ...]) -> None:
    checked = rules.check_face_aware(answer, PROMPT, finished=True)
    assert checked.invalid == faults
    if not faults:
        assert checked.text.endswith("sang.")
    chinese = rules.check_face_aware("一个男人，面带微笑，在跑步。", "一个男人在跑步", finished=True)
    assert "is not written in Latin letters" not in chinese.invalid  # its own words are kept, whatever they are


def test_the_appearance_is_one_sentence() -> None:
    checked = rules.check_appearance(
        "Sure: A man in a white apron, with a beard. He cooks in a kitchen.", "A man", finished=True
    )
    assert checked.text == "A man in a white apron, with a beard."
    assert not checked.invalid
    assert rules.spatial_from(checked.text, TRIGGER) == f"{TRIGGER}, A man in a white apron, with a beard, close-up"


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_pattern_enforces_passes_the_rules(target: str) -> None:
    spatial, polished = pattern("parser", target, "en"), pattern("polisher", target, "en")
    assert spatial is not None
    assert polished is not None
    for text in (f"{target}, grey coat, soft light, close-up", f"{target} in a café, smiling, close-up"):
        assert re.fullmatch(spatial, text)
        assert not _spatial(text, target).invalid
    for text in (f"{target}, grey coat", "Sure! A dog, grey coat, close-up", f"{target}, a coat\n, light, close-up"):
        assert not re.fullmatch(spatial, text)
    assert re.fullmatch(polished, f"{target} lifts a cup of tea, then smiles.")
    for text in (f"{target} lifts <b>a cup</b> of tea.", f"{target} lifts a\ncup of tea.", f"{target} smiles"):
        assert not re.fullmatch(polished, text)
    assert pattern("face_aware", target, "en") is None
    assert re.fullmatch(pattern("polisher", target, "any") or "", f"{target} 穿灰色外套的男人在雨中微笑并走过街道。")
    one = pattern("appearance", target, "en") or ""
    assert re.fullmatch(one, f"{target} in a grey coat, with a beard.")
    assert not re.fullmatch(one, f"{target} in a grey coat. He has a beard.")


def test_templates_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "parser.txt").write_text("\ufeffList what is seen.\n", encoding="utf-8")
    mixed = load_templates(["polisher", "parser"], tmp_path)
    assert mixed["polisher"] == load_templates(["polisher"], None)["polisher"]
    assert mixed["parser"] == "List what is seen."
    with pytest.raises(TemplateError, match=r"holds none of appearance\.txt"):
        load_templates(["appearance"], tmp_path)
    (tmp_path / "appearance.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(TemplateError, match=r"cannot read.*appearance\.txt as UTF-8"):
        load_templates(["appearance"], tmp_path)
    (tmp_path / "appearance.txt").write_text(" \n")
    with pytest.raises(TemplateError, match=r"appearance\.txt is empty"):
        load_templates(["appearance"], tmp_path)


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
        assert plain(f" {text}\t\n") == text


def test_the_samples_text_comes_last_and_the_rest_is_fixed() -> None:
    templates = load_templates(CALLS, None)
    assert len(set(templates.values())) == len(CALLS) == 4
    for template in templates.values():
        first, second = (conversation(template, f"text {i}", "A man") for i in "12")
        assert first[0] == second[0] == {"role": "system", "content": template}
        assert first[1]["content"] == "Subject: A man\nText: text 1"


def test_long_hostile_texts_take_no_quadratic_time() -> None:
    for piece in ("<think>", "</think>", "<|a|>", '"', "'", "<|", "a man ", "\u202e", "close-up "):
        text = piece * (30_000 // len(piece))
        _polished(text), _spatial(text), rules.fallback_polished(text, "A man"), plain(text)


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
