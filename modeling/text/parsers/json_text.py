"""JSON text followed as it comes, to know where a value ends and where it stops being JSON.

Nothing is decoded: the text is passed on. Only control characters inside a string, which models
write and JSON forbids, are escaped on the way.
"""

import re

MAX_DEPTH = 200
MAX_WORD_CHARS = 1000  # of a number; Python reads integers of at most 4300 digits

_SPACE = re.compile(r"[ \t\n\r]+")
_IN_STRING = re.compile(r'[^"\\]+|"|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_ESCAPE_SO_FAR = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_WORD = re.compile(r"[-+.a-zA-Z0-9]+")
_IS_WORD = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_CONTROL = {code: f"\\u{code:04x}" for code in range(32)} | {9: "\\t", 10: "\\n", 13: "\\r"}
_CLOSING = {"{": "}", "[": "]"}


class JsonText:
    """One JSON value whose text comes in pieces."""

    def __init__(self) -> None:
        self.is_done = False
        self.is_broken = False
        self._closing: list[str] = []  # of the objects and arrays that are open, innermost last
        self._expects = "value"  # or "item", "member", "key", "colon", "comma": see _open_or_close
        self._in_string = False

    def feed(self, text: str, start: int, end: int) -> tuple[int, str]:
        """Follows ``text[start:end]`` as far as it decides.

        Returns:
            Where it stopped, and the value's text up to there. It stops at ``end``, before a token
            that ``end`` cuts (to be fed again with more), after the value (``is_done``), or before
            the first character that is no JSON (``is_broken``).
        """
        passed: list[str] = []
        at = start
        while at < end and not self.is_done:
            step = self._string_step if self._in_string else self._step
            stop = step(text, at, end)
            if stop == at:
                break
            piece = text[at:stop]
            passed.append(piece if piece.isprintable() else self._printable(piece))
            at = stop
        return at, "".join(passed)

    def _printable(self, piece: str) -> str:
        return piece.translate(_CONTROL) if self._in_string else piece

    def _string_step(self, text: str, at: int, end: int) -> int:
        match = _IN_STRING.match(text, at, end)
        if match is None:
            self.is_broken = _ESCAPE_SO_FAR.fullmatch(text, at, end) is None
            return at
        if text[at] == '"':
            self._in_string = False
            if self._expects == "key":
                self._expects = "colon"
            else:
                self._value_ended()
        return match.end()

    def _step(self, text: str, at: int, end: int) -> int:
        if space := _SPACE.match(text, at, end):
            return space.end()
        word = _WORD.match(text, at, end)
        if word is None:
            self.is_broken = not self._open_or_close(text[at])
            return at if self.is_broken else at + 1
        if word.end() == end and end - at <= MAX_WORD_CHARS:
            return at
        if self._expects not in ("value", "item") or not _IS_WORD.fullmatch(word[0]):
            self.is_broken = True
            return at
        self._value_ended()
        return word.end()

    def _open_or_close(self, character: str) -> bool:
        """Whether the character may stand here: ``item`` and ``member`` are a value and a key, or
        the end of what was just opened."""
        expects = self._expects
        if character in _CLOSING and expects in ("value", "item"):
            self._closing.append(_CLOSING[character])
            self._expects = "member" if character == "{" else "item"
            return len(self._closing) <= MAX_DEPTH
        if character == '"' and expects not in ("colon", "comma"):
            self._in_string = True
            self._expects = "key" if expects in ("key", "member") else "value"
        elif character == ":" and expects == "colon":
            self._expects = "value"
        elif character == "," and expects == "comma":
            self._expects = "key" if self._closing[-1] == "}" else "value"
        elif self._closing[-1:] == [character] and expects in ("comma", "item", "member"):
            self._closing.pop()
            self._value_ended()
        else:
            return False
        return True

    def _value_ended(self) -> None:
        self.is_done = not self._closing
        self._expects = "comma"
