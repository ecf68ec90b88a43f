"""What the formats of tool calls share: where calls begin, and what becomes of a broken one.

1. Text is content up to a mark with which a call may begin. White space before the mark is markup.
2. From the mark on, text is held. If the format's ``_calls`` finds no call, it is given back as
   content, and reading goes on after it.
3. Once the name is known and the arguments begin, the call is emitted, and its arguments follow as
   they come.
4. If it breaks after that, a stream can take nothing back: the call's arguments stay broken, with
   all text up to the format's end mark in them, as OpenAI's may be. With ``buffer_calls``, for
   answers that are not streamed, a call is emitted when it is whole, and a broken one is content.
5. If the answer ends inside the arguments, the call is emitted as far as it came.
"""

import hashlib
import json
import re
from abc import abstractmethod
from collections.abc import Sequence
from enum import Enum, auto
from io import StringIO
from typing import ClassVar

from modeling.text.parsers.deltas import Arguments, Delta, Tool, ToolCall
from modeling.text.parsers.reader import (
    MAX_BLANK_CHARS,
    Ended,
    Malformed,
    Marks,
    Reader,
    Sink,
    Steps,
)
from modeling.text.parsers.structure import Syntax

MAX_NAME_CHARS = 256
MAX_HELD_CHARS = 1 << 18  # of one value that cannot be emitted before it is whole

NAME = re.compile(r"[\w.:/-]+")
_FIELDS = ("name", "arguments", "parameters", "type", "id")


class _Stage(Enum):
    """Of the call that is being read."""

    NO_CALL = auto()
    ARGUMENTS = auto()
    CLOSING = auto()  # the arguments are whole, what ends the call is not


class ToolParser(Reader):
    """Reads content and calls.

    Args:
        tools: that the request offers.
        id_seed: makes the calls' ids.
        buffer_calls: emit a call when it is whole, so that a broken one is content.
    """

    marks: ClassVar[tuple[str, ...]]  # a call may begin
    ends: ClassVar[tuple[str, ...]]  # a broken call ends at one
    first_mark: ClassVar[str] = ""  # begins a call at the start of the answer only
    needs_known_name: ClassVar[bool] = False  # too little markup to believe in any other name
    special_tokens: ClassVar[tuple[str, ...]] = ()  # to be kept in the text
    syntax: ClassVar[Syntax]  # which this parser reads back

    def __init__(self, tools: Sequence[Tool], id_seed: str, *, buffer_calls: bool = False) -> None:
        super().__init__()
        self.num_calls = 0
        self._tools = {tool.name: tool for tool in tools}
        self._id_seed = id_seed
        self._buffer_calls = buffer_calls
        self._stage = _Stage.NO_CALL
        self._pending: list[Delta] = []  # of the call that is being read
        self._is_after_call = False  # since then, only white space has come:
        self._blank = ""

    @abstractmethod
    def _calls(self, mark: str) -> Steps[None]:
        """Reads the calls after a mark, each from :meth:`_begin` to :meth:`_end`."""

    def _run(self) -> Steps[None]:
        marks, ends = Marks(*self.marks, with_blank=True), Marks(*self.ends)
        try:
            mark = (yield from self._first()) if self.first_mark else ""
            while True:
                mark = mark or (yield from self._until(marks, self._content))
                mark = yield from self._section(mark, ends)
                mark = mark if mark in self.marks else ""
        except Ended:
            return

    def _first(self) -> Steps[str]:
        """The mark that only the start of the answer may be, with the space before it."""
        self._hold()
        try:
            yield from self._space()
            if (yield from self._literal(self.first_mark)):
                return self._held()
        except Malformed:
            pass
        except Ended:
            self._rest()
            self._give_back()
            raise
        self._give_back()
        return ""

    def _section(self, mark: str, ends: Marks) -> Steps[str]:
        """Reads the calls at a mark. Returns at which of ``ends`` a broken one ended."""
        self._hold(mark)
        try:
            yield from self._calls(mark.lstrip())
            after = self._held()
            self._content(after if after.isspace() else "")
            return ""
        except Malformed:
            if self._stage is _Stage.NO_CALL or self._buffer_calls:
                self.num_calls -= self._stage is not _Stage.NO_CALL
                self._pending.clear()
                self._give_back()
                return ""
            sink: Sink = self._arguments if self._stage is _Stage.ARGUMENTS else self._content
            sink(self._held())
            end = yield from self._until(ends, sink)
            self._is_after_call = True
            return end
        except Ended:
            # After a call, what is held and unread can only be markup, and so can what closes it.
            if self._stage is _Stage.NO_CALL and (held := self._held()).strip():
                self._content(held + self._rest())
            self._emit()
            raise
        finally:
            self._stage = _Stage.NO_CALL

    def _begin(self, name: str, call_id: str = "") -> None:
        """The name is known, and what follows are arguments."""
        is_known = not self.needs_known_name or not self._tools or name in self._tools
        if not is_known or not NAME.fullmatch(name):
            raise Malformed
        self._stage = _Stage.ARGUMENTS
        index = self.num_calls
        self.num_calls += 1
        self._pending.append(ToolCall(index, call_id or self._call_id(index), name))
        self._emit_if_streaming()

    def _arguments(self, text: str) -> None:
        self._pending.append(Arguments(self.num_calls - 1, text))
        self._emit_if_streaming()

    def _close(self) -> None:
        """The arguments are whole."""
        self._stage = _Stage.CLOSING
        self._emit_if_streaming()

    def _end(self) -> None:
        """The call is whole."""
        self._stage = _Stage.NO_CALL
        self._emit()
        self._is_after_call = True

    def _emit_if_streaming(self) -> None:
        if not self._buffer_calls:
            self._emit()

    def _emit(self) -> None:
        if self._pending:
            self._blank = ""
        self._deltas += self._pending
        self._pending.clear()
        self._hold()

    def _content(self, text: str) -> None:
        text, self._blank = self._blank + text, ""
        if self._is_after_call and not text.strip() and len(text) <= MAX_BLANK_CHARS:
            self._blank = text
        else:
            self._is_after_call = False
            super()._content(text)

    def _call_id(self, index: int) -> str:
        digest = hashlib.blake2b(f"{self._id_seed}:{index}".encode(), digest_size=12)
        return f"call_{digest.hexdigest()}"

    def _json_call(self, *, is_open: bool = False) -> Steps[None]:
        """Reads ``{"name": ..., "arguments": {...}}``, in any order, up to :meth:`_close`.

        Args:
            is_open: the brace was read already.
        """
        if not is_open:
            yield from self._expect("{")
        name, arguments, seen = "", "", set[str]()
        following = ","
        while following == ",":
            field = yield from self._string()
            field = "arguments" if field == "parameters" else field
            if field not in _FIELDS or field in seen:
                raise Malformed
            seen.add(field)
            yield from self._expect(":")
            if field != "arguments":
                text = yield from self._string()
                name = text if field == "name" else name
            elif name:
                yield from self._call(name)
            else:
                held = StringIO()
                yield from self._expect_brace()
                yield from self._json(held.write, MAX_HELD_CHARS)
                arguments = held.getvalue()
            following = yield from self._expect(",", "}")
        if self._stage is _Stage.NO_CALL:
            if self.needs_known_name and "arguments" not in seen:
                raise Malformed
            self._begin(name)
            self._arguments(arguments or "{}")
            self._close()

    def _string(self) -> Steps[str]:
        yield from self._space()
        if (yield from self._next()) != '"':
            raise Malformed
        text = StringIO()
        yield from self._json(text.write, MAX_NAME_CHARS)
        return str(json.loads(text.getvalue()))

    def _call(self, name: str, call_id: str = "") -> Steps[None]:
        """Emits a call whose arguments are the JSON object that follows."""
        yield from self._expect_brace()
        self._begin(name, call_id)
        yield from self._json(self._arguments)
        self._close()

    def _expect_brace(self) -> Steps[None]:
        yield from self._space()
        if (yield from self._next()) != "{":
            raise Malformed
