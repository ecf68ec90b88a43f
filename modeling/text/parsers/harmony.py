"""gpt-oss' harmony format: messages in channels, which are content, reasoning or tool calls.

::

    <|channel|>analysis<|message|>Look it up.<|end|><|start|>assistant<|channel|>commentary
    to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>

The prompt ends with ``<|start|>assistant``. The recipient may stand before the channel, too. If it
is no function, it is a built-in tool, which nobody here executes: its call is reasoning.
https://github.com/openai/harmony/blob/main/docs/format.md
"""

import re
from collections.abc import Sequence

from modeling.text.parsers.deltas import Tool
from modeling.text.parsers.reader import Ended, Malformed, Marks, Steps
from modeling.text.parsers.structure import Syntax
from modeling.text.parsers.tool_parser import NAME, ToolParser

MAX_HEADER_WORDS = 3  # beside channel and recipient: a role, the type of the content
MAX_WORD_CHARS = 256
START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_BOUNDS = (*_ENDS, START, CHANNEL)  # of a message's body; models forget its end
_CONTROL = (*_BOUNDS, MESSAGE, CONSTRAIN)
_CHANNEL_NAME = re.compile(r"\w+")
_WORD = re.compile(r"[^\s<]+")


class Harmony(ToolParser):
    """Reads everything that gpt-oss writes; needs no reasoning parser before it.

    ``<|channel|>`` and the like are control tokens of the model: they are never content, not even
    those of a broken message.
    """

    marks = (START, CHANNEL, MESSAGE)
    ends = _BOUNDS
    special_tokens = _CONTROL
    syntax = Syntax(
        triggers=(f"{CHANNEL}commentary to=functions.",),
        call=(f"{CHANNEL}commentary to=functions.%s {CONSTRAIN}json{MESSAGE}", "<|call|>"),
        between=f"{START}assistant",
    )

    def __init__(self, tools: Sequence[Tool], id_seed: str, *, buffer_calls: bool = False) -> None:
        super().__init__(tools, id_seed, buffer_calls=buffer_calls)
        self._stray = Marks(*_CONTROL, with_blank=True)
        self._bounds = Marks(*_BOUNDS)
        self._name = ""  # of the function whose call begins
        self._bound = ""  # that ended it
        self._between = {True: "", False: ""}  # two messages of reasoning, of content

    def _run(self) -> Steps[None]:
        mark = ""  # as after <|start|>, which the prompt ends with
        try:
            while True:
                if mark in ("", *self.marks):
                    mark = yield from self._message(mark)
                else:
                    mark = (yield from self._until(self._stray, self._content)).lstrip()
        except Ended:
            return

    def _message(self, mark: str) -> Steps[str]:
        """Reads a message from its header on. Returns the control token after it."""
        self._hold(mark)
        try:
            mark, channel, recipient = yield from self._header(mark)
        except Malformed:
            self._give_back()
            return (yield from self._until(self._stray, self._content)).lstrip()
        except Ended:
            header = self._held()
            if not any(token in header for token in _CONTROL):
                self._content(header + self._rest())
            raise
        if mark != MESSAGE:
            self._raw = None
            return mark
        self._name, self._bound = recipient.removeprefix("functions."), ""
        is_call = recipient.startswith("functions.") and bool(self._tools)
        if is_call and NAME.fullmatch(self._name):
            broken = yield from self._section(self._held(), self._bounds)
            found = self._bound or broken
            return found or (yield from self._until(self._stray, self._content)).lstrip()
        self._raw = None
        is_public = recipient in ("", "assistant", "all") or recipient.startswith("functions.")
        is_hidden = channel == "analysis" or not is_public
        sink = self._reasoning if is_hidden else self._content
        sink(self._between[is_hidden])
        self._between[is_hidden] = "\n"
        return (yield from self._until(self._bounds, sink))

    def _header(self, mark: str) -> Steps[tuple[str, str, str]]:
        """Reads to ``<|message|>``, or the end of a message that has none.

        Returns:
            That control token, the channel and the recipient.
        """
        channel = recipient = ""
        words: list[str] = []
        is_header = bool(mark)
        while mark not in (MESSAGE, *_ENDS):
            yield from self._space()
            if mark == START:  # another message: the one before had no text
                channel = recipient = ""
            elif mark == CHANNEL:
                name = yield from self._span(_CHANNEL_NAME, MAX_WORD_CHARS)
                channel = channel or name
                yield from self._space()
            if (yield from self._literal("to=")):
                recipient = yield from self._span(_WORD, MAX_WORD_CHARS)
                mark, is_header = "", True
                continue
            mark = yield from self._literal(*_CONTROL)
            if not mark:
                words.append((yield from self._span(_WORD, MAX_WORD_CHARS)))
                is_role = is_header or words == ["assistant"]
                if not is_role or len(words) > MAX_HEADER_WORDS:
                    raise Malformed
            is_header = True
        return mark, channel, recipient

    def _calls(self, mark: str) -> Steps[None]:  # noqa: ARG002 - the header was read
        self._begin(self._name)
        yield from self._expect_brace()
        yield from self._json(self._arguments)
        self._close()
        self._bound = yield from self._expect(*_BOUNDS)
        self._end()

    def _give_back(self) -> None:
        raw = self._held()
        for token in _CONTROL:
            raw = raw.replace(token, "")
        self._content(raw)
