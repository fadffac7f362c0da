"""File names for texts that users chose: one name per text, safe on every common file system and object store."""

from __future__ import annotations

import hashlib
import unicodedata

MAX_BYTES = 150
"""Longest name in UTF-8 bytes; file systems allow 255, and a suffix and a temporary ending must fit behind it."""
_DIGEST_CHARS = 32
_MARK = "%~"
"""Stands between a cut name and its hash. No encoded text holds it: `%` is always followed by two hex digits."""


def safe_name(text: str) -> str:
    """The file name that stands for `text`; different texts give different names.

    Letters of any script, digits and `_ - . =` stand for themselves; every other character, and a dot in front, becomes
    `%` and two upper-case hex digits per UTF-8 byte. A name above 150 bytes is cut and ends in a hash of the whole text
    (BLAKE2b, 128 bits). The empty text is `%~`.

    The result is never empty, `.` or `..`, and holds no separator, space, control character or leading dot. It is in
    Unicode's form NFC, so a file system that normalises names keeps them apart; one that ignores case does not.
    """
    if not text:
        return _MARK
    ascii_only = unicodedata.normalize("NFC", text) != text
    pieces = [c if _is_plain(c, ascii_only) and (i or c != ".") else _encoded(c) for i, c in enumerate(text)]
    name = "".join(pieces)
    if len(name.encode()) <= MAX_BYTES:
        return name
    digest = hashlib.blake2b(_utf8(text), digest_size=_DIGEST_CHARS // 2).hexdigest()
    return _head(pieces, MAX_BYTES - len(_MARK) - _DIGEST_CHARS) + _MARK + digest


def _is_plain(character: str, ascii_only: bool) -> bool:
    if ascii_only and not character.isascii():
        return False
    return character.isalpha() or character.isdecimal() or character in "_-.="


def _encoded(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in _utf8(character))


def _head(pieces: list[str], limit: int) -> str:
    """As many whole pieces from the front as fit into `limit` UTF-8 bytes."""
    size = 0
    for i, piece in enumerate(pieces):
        size += len(piece.encode())
        if size > limit:
            return "".join(pieces[:i])
    return "".join(pieces)


def _utf8(text: str) -> bytes:
    """UTF-8, lone surrogates (undecodable bytes of file names) included."""
    return text.encode("utf-8", "surrogatepass")
