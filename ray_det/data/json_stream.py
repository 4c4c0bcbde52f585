"""A large JSON document value by value: one member or element is in memory at a time, never the tree of the whole.

The values are the standard library's; so are the messages of what is not JSON, with their line and column.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from json import JSONDecodeError, JSONDecoder
from typing import Any

CHUNK_BYTES = 1 << 20
"""Decoded to text at once: far above a usual record, far below a large file."""
_NUMBER_TAIL = 3
"""Characters after a number that may belong to it: `1` may go on as `1e+5`."""
_SPACES = " \t\n\r"
_SPACE = re.compile(f"[{_SPACES}]*")


class JsonStream:
    """A position in a document. Ask `peek`, then take the value whole, or member by member, or element by element.

    Raises (every method):
        ValueError: not JSON, or not text.
        RecursionError: nested too deep.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._encoding = json.detect_encoding(content)
        self._decoder = codecs.getincrementaldecoder(self._encoding)("surrogatepass")
        self._text, self._at = "", 0  # the part that is decoded, and where in it to go on
        self._decoded = 0  # bytes
        self._before, self._lines, self._column = 0, 0, 0  # characters, line ends, and columns ahead of the part
        self._scan = JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            if self._text[self._at : self._at + 1] in _SPACES:  # the empty text is in it too
                self._at = _SPACE.match(self._text, self._at).end()  # pyright: ignore[reportOptionalMemberAccess]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        while True:
            try:
                found, end = self._scan(self._text, self._at)
            except JSONDecodeError as error:  # of a value that goes on, perhaps
                if self._more():
                    continue
                raise self._error(error.msg, error.pos) from None
            if end + _NUMBER_TAIL > len(self._text) and self._more():
                continue
            self._at = end
            return found

    def members(self) -> Iterator[str]:
        """Keys of the object that comes next. Whoever iterates takes the value after each key."""
        for _ in self._items("{", "}"):
            if self.peek() != '"':
                raise self._error("Expecting property name enclosed in double quotes")
            key = self.value()
            if self.peek() != ":":
                raise self._error("Expecting ':' delimiter")
            self._at += 1
            yield key

    def elements(self) -> Iterator[Any]:
        """Elements of the array that comes next, each whole."""
        for _ in self._items("[", "]"):
            yield self.value()

    def end(self) -> None:
        """Nothing may follow."""
        if self.peek():
            raise self._error("Extra data")

    def _items(self, opening: str, closing: str) -> Iterator[None]:
        """Once per item, between the brackets and the commas."""
        if self.peek() != opening:
            raise AssertionError(f"no {opening} comes next")
        self._at += 1
        if self.peek() == closing:
            self._at += 1
            return
        while True:
            yield
            after = self.peek()
            if after == closing:
                self._at += 1
                return
            if after != ",":
                raise self._error("Expecting ',' delimiter")
            self._at += 1

    def _more(self) -> bool:
        """Decode more, at least as much as is still unread: a long value is tried again only a few times."""
        if self._decoded == len(self._content):
            return False
        read = self._text[: self._at]
        self._before += len(read)
        self._lines += read.count("\n")
        self._column = len(read) - read.rfind("\n") - 1 + (0 if "\n" in read else self._column)
        stop = min(self._decoded + max(CHUNK_BYTES, len(self._text) - self._at), len(self._content))
        try:
            text = self._decoder.decode(self._content[self._decoded : stop], final=stop == len(self._content))
        except UnicodeDecodeError:
            self._content.decode(self._encoding, "surrogatepass")  # the same error, with its place in the file
            raise
        self._text, self._at, self._decoded = self._text[self._at :] + text, 0, stop
        return True

    def _error(self, message: str, at: int | None = None) -> ValueError:
        at = self._at if at is None else at
        read = self._text[:at]
        line = self._lines + read.count("\n") + 1
        column = at - read.rfind("\n") + (0 if "\n" in read else self._column)
        return ValueError(f"{message}: line {line} column {column} (char {self._before + at})")
