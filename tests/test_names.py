"""File names made from users' ids."""

import unicodedata
from pathlib import PurePosixPath, PureWindowsPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ipvg_ray.media.names import MAX_BYTES, safe_name

NASTY = st.text(st.sampled_from("a.%/\\~ 2Fé\0\n=-_"), max_size=8)
ANY = st.one_of(st.text(), NASTY, st.text(min_size=100, max_size=300))


@given(ANY)
@example("..")
@example("../../etc/passwd")
@example(".hidden")
@example("")
@example("\ud800")
def test_a_name_is_one_visible_path_component(text: str) -> None:
    name = safe_name(text)
    assert name
    assert not name.startswith(".")
    assert PurePosixPath("/run", name).parent == PurePosixPath("/run")
    assert PureWindowsPath("C:/run", name).name == name
    assert not set(name) & set('/\\:*?"<>| \0\n')
    assert len(name.encode()) <= MAX_BYTES


@given(ANY, ANY)
@example("a/b", "a%2Fb")
@example("", "%~")
@example("x" * 151, "x" * 152)
@example("/" * 60 + "a", "/" * 60 + "b")
def test_different_texts_get_different_names(a: str, b: str) -> None:
    assert (safe_name(a) == safe_name(b)) == (a == b)


@given(ANY)
@example("x" * 151)
def test_no_encoded_or_cut_name_stands_for_itself_too(text: str) -> None:
    name = safe_name(text)
    assert (safe_name(name) == name) == (name == text)


@given(st.text(st.sampled_from("aeA\u0301\u030a\u00c5\u212b\u00e9\u1100\u1161\uac00"), max_size=6))
def test_normalising_file_systems_see_the_same_name(text: str) -> None:
    name = safe_name(text)
    assert unicodedata.normalize("NFC", name) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("id001", "id001"),
        ("Ünal-2_b.c=d", "Ünal-2_b.c=d"),
        ("人物", "人物"),
        ("../evil", "%2E.%2Fevil"),
        ("..", "%2E."),
        ("a b", "a%20b"),
        ("", "%~"),
    ],
)
def test_names(text: str, name: str) -> None:
    assert safe_name(text) == name


def test_long_names_keep_their_beginning_and_split_no_code() -> None:
    name = safe_name("/" * 200)
    head, mark, digest = name.partition("%~")
    assert mark
    assert head == "%2F" * (len(head) // 3)
    assert len(digest) == 32
