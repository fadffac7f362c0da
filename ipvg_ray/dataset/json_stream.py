"""Read a JSON file element by element: what is held is one element, not the file."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import BinaryIO

MAX_ELEMENT = 64 << 20
"""Characters of one element; a broken file is given up after as many."""
_CHUNK = 1 << 16


class JsonError(ValueError):
    """Not JSON from here on; `line` (from 1) says where."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def elements(stream: BinaryIO) -> Iterator[tuple[int, str | None, object]]:
    """(line, key, value) of every element of the array (key None) or object that a UTF-8 file holds.

    Bytes that are not UTF-8 come out as lone surrogates.

    Raises:
        JsonError: where the file is not a JSON array or object, after the elements in front of the fault.
    """
    text = _Text(stream)
    opener = text.take()
    if opener not in ("[", "{"):
        raise JsonError(text.line, "the file holds neither a JSON array nor an object")
    closer = "]" if opener == "[" else "}"
    if text.peek() == closer:
        return
    while True:
        key: object = None
        text.peek()
        line = text.line
        if opener == "{":
            key = text.value()
            if not isinstance(key, str) or text.take() != ":":
                raise JsonError(line, "expected a quoted key and a colon")
        yield line, key if isinstance(key, str) else None, text.value()
        mark = text.take()
        if mark == closer:
            return
        if mark != ",":
            raise JsonError(
                text.line, f"expected , or {closer} after the element" if mark else "the file ends too early"
            )


class _Text:
    """A window on the decoded file that grows while an element does not fit."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._at = 0
        self._ended = False
        self.line = 1

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self._at < len(self._buffer):
                character = self._buffer[self._at]
                if character not in " \t\r\n":
                    return character
                self.line += character == "\n"
                self._at += 1
            if self._ended:
                return ""
            self._grow()

    def take(self) -> str:
        """As `peek`, and step behind it."""
        character = self.peek()
        self._at += len(character)
        return character

    def value(self) -> object:
        """The next value. Raises JsonError."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except (ValueError, RecursionError) as error:
                held = len(self._buffer) - self._at
                if self._ended or held > MAX_ELEMENT:
                    message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                    raise JsonError(self.line, message) from None
                self._grow()
                continue
            if end < len(self._buffer) or self._ended:  # at the edge, a number may go on in the next chunk
                self.line += self._buffer.count("\n", self._at, end)
                self._at = end
                return value
            self._grow()

    def _grow(self) -> None:
        """Read on: as much again as is held, so that a long element is parsed a few times, not many."""
        rest = self._buffer[self._at :]
        more = self._stream.read(max(_CHUNK, len(rest)))
        self._buffer, self._at, self._ended = rest + more, 0, not more
