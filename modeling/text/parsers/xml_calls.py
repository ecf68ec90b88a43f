"""Formats whose arguments are written one by one and without types: Qwen3-Coder and GLM-4.5.

Strings are emitted as they come; values of other types, by the tool's schema, when they are whole.
"""

import json
import re
from io import StringIO
from typing import ClassVar

from modeling.text.parsers.reader import Ended, Marks, Steps
from modeling.text.parsers.schema_types import as_json, property_types
from modeling.text.parsers.structure import Syntax
from modeling.text.parsers.tool_parser import MAX_HELD_CHARS, MAX_NAME_CHARS, NAME, ToolParser

_KEY = re.compile(r"[^<>\n]+")


class _UntypedArguments(ToolParser):
    value_ends: ClassVar[Marks]

    def _begin_object(self, name: str) -> None:
        self._begin(name)
        self._arguments("{")
        tool = self._tools.get(name)
        self._schema = tool.parameters if tool else {}
        self._separator = ""

    def _argument(self, key: str) -> Steps[None]:
        """Reads a value, after its beginning, up to and with its end."""
        self._arguments(f"{self._separator}{json.dumps(key, ensure_ascii=False)}: ")
        self._separator = ", "
        types = property_types(self._schema, key)
        if types == {"string"}:
            self._arguments('"')
            yield from self._until(self.value_ends, self._string_body)
            self._arguments('"')
            return
        held = StringIO()
        try:
            yield from self._until(self.value_ends, held.write, MAX_HELD_CHARS)
        except Ended:
            self._arguments(held.getvalue())
            raise
        self._arguments(as_json(held.getvalue(), types))

    def _string_body(self, text: str) -> None:
        self._arguments(json.dumps(text, ensure_ascii=False)[1:-1])


class Qwen3Coder(_UntypedArguments):
    """Tags with names in them. Models leave out the outermost."""

    marks = ("<tool_call>", "<function=")
    ends = ("</tool_call>",)
    value_ends = Marks("\n</parameter>", "</parameter>")
    special_tokens = ("<tool_call>", "</tool_call>")
    syntax = Syntax(
        triggers=marks,
        call=("<tool_call>\n<function=%s>\n", "</function>\n</tool_call>"),
        between="\n",
        argument=("<parameter=%s>\n", "\n</parameter>\n"),
    )

    def _calls(self, mark: str) -> Steps[None]:
        if mark == "<tool_call>":
            yield from self._expect("<function=")
        name = yield from self._span(NAME, MAX_NAME_CHARS)
        yield from self._expect(">")
        self._begin_object(name)
        while (yield from self._expect("<parameter=", "</function>")) == "<parameter=":
            key = yield from self._span(_KEY, MAX_NAME_CHARS)
            yield from self._expect(">")
            yield from self._literal("\n")
            yield from self._argument(key)
        self._arguments("}")
        self._close()
        if mark == "<tool_call>":
            yield from self._expect("</tool_call>")
        self._end()


class Glm45(_UntypedArguments):
    """Tags around names and values; from GLM-4.7 on without line breaks between them."""

    marks = ("<tool_call>",)
    ends = ("</tool_call>",)
    value_ends = Marks("</arg_value>")
    special_tokens = (
        *("<tool_call>", "</tool_call>"),
        *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    )
    syntax = Syntax(
        triggers=marks,
        call=("<tool_call>%s\n", "</tool_call>"),
        between="\n",
        argument=("<arg_key>%s</arg_key>\n<arg_value>", "</arg_value>\n"),
    )

    def _calls(self, mark: str) -> Steps[None]:  # noqa: ARG002 - there is one
        yield from self._space()
        name = yield from self._span(NAME, MAX_NAME_CHARS)
        following = yield from self._expect("<arg_key>", "</tool_call>")
        self._begin_object(name)
        while following == "<arg_key>":
            key = yield from self._span(_KEY, MAX_NAME_CHARS)
            yield from self._expect("</arg_key>")
            yield from self._expect("<arg_value>")
            yield from self._argument(key)
            following = yield from self._expect("<arg_key>", "</tool_call>")
        self._arguments("}")
        self._end()
