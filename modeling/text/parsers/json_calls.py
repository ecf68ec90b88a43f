"""Formats whose calls have JSON arguments: Hermes, Llama 3, Mistral and DeepSeek.

Each class says how the chat templates write its format.
"""

from modeling.text.parsers.reader import Steps
from modeling.text.parsers.structure import Syntax
from modeling.text.parsers.tool_parser import MAX_NAME_CHARS, NAME, ToolParser


class Hermes(ToolParser):
    """Hermes 2 Pro, Qwen 2.5 and Qwen 3: an object between two tags."""

    marks = ("<tool_call>",)
    ends = ("</tool_call>",)
    special_tokens = ("<tool_call>", "</tool_call>")
    syntax = Syntax(
        triggers=marks,
        call=('<tool_call>\n{"name": "%s", "arguments": ', "}\n</tool_call>"),
        between="\n",
    )

    def _calls(self, mark: str) -> Steps[None]:  # noqa: ARG002 - there is one
        yield from self._json_call()
        yield from self._expect("</tool_call>")
        self._end()


class Llama3(ToolParser):
    """Llama 3.1 to 3.3: an object, which is a call after ``<|python_tag|>`` and, if it names an
    offered tool, where a line begins."""

    marks = ("<|python_tag|>", "\n{")
    ends = ("<|python_tag|>",)
    first_mark = "{"
    needs_known_name = True
    special_tokens = ("<|python_tag|>",)
    syntax = Syntax(
        triggers=("<|python_tag|>", '{"name": "'),
        call=('{"name": "%s", "parameters": ', "}"),
        between="; ",
    )

    def _calls(self, mark: str) -> Steps[None]:
        is_open = mark == "{"
        while True:
            yield from self._json_call(is_open=is_open)
            self._end()
            yield from self._space()
            following = yield from self._literal(";", ",", "{")
            if not following:
                return
            is_open = following == "{"


class Mistral(ToolParser):
    """From version 11 of the tokenizer on, a name, perhaps an id, and the arguments for each call;
    before, one list of objects. Both are read."""

    marks = ("[TOOL_CALLS]",)
    ends = ("[TOOL_CALLS]",)
    special_tokens = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    syntax = Syntax(triggers=marks, call=("[TOOL_CALLS]%s[ARGS]", ""))

    def _calls(self, mark: str) -> Steps[None]:  # noqa: ARG002 - there is one
        yield from self._space()
        if (yield from self._literal("[")):
            following = ","
            while following == ",":
                yield from self._json_call()
                self._end()
                following = yield from self._expect(",", "]")
            return
        name, call_id = (yield from self._span(NAME, MAX_NAME_CHARS)), ""
        if (yield from self._literal("[CALL_ID]")):
            call_id = yield from self._span(NAME, MAX_NAME_CHARS)
        yield from self._literal("[ARGS]")
        yield from self._call(name, call_id)
        self._end()

    def _call_id(self, index: int) -> str:
        return super()._call_id(index)[-9:]  # the templates demand nine letters or digits


class MistralList(Mistral):
    """Models whose template writes the list."""

    syntax = Syntax(
        triggers=Mistral.marks,
        before="[TOOL_CALLS] [",
        call=('{"name": "%s", "arguments": ', "}"),
        between=", ",
        after="]",
    )


def _token(words: str) -> str:
    """Of DeepSeek's tokenizer: a fullwidth bar at its ends, U+2581 between its words."""
    return "<\uff5c" + words.replace(" ", "\u2581") + "\uff5c>"


class DeepSeek(ToolParser):
    """V3.1 writes name, separator and object; V3 and R1 the type of the tool, separator, name and
    the object in a code block. Both are read."""

    CALLS, END_OF_CALLS = _token("tool calls begin"), _token("tool calls end")
    CALL, SEPARATOR, END = _token("tool call begin"), _token("tool sep"), _token("tool call end")
    marks = (CALLS, CALL)
    ends = (END,)
    special_tokens = (CALLS, END_OF_CALLS, CALL, SEPARATOR, END)
    syntax = Syntax(
        triggers=(CALLS,), before=CALLS, call=(f"{CALL}%s{SEPARATOR}", END), after=END_OF_CALLS
    )

    def _calls(self, mark: str) -> Steps[None]:
        following = (yield from self._expect(self.CALL)) if mark == self.CALLS else mark
        while following == self.CALL:
            yield from self._space()
            name = yield from self._span(NAME, MAX_NAME_CHARS)
            yield from self._expect(self.SEPARATOR)
            yield from self._space()
            is_fenced = (yield from self._next()) != "{"
            if is_fenced:
                name = yield from self._span(NAME, MAX_NAME_CHARS)
                yield from self._expect("```json")
            yield from self._call(name)
            if is_fenced:
                yield from self._expect("```")
            yield from self._expect(self.END)
            self._end()
            following = yield from self._expect(self.CALL, self.END_OF_CALLS)


class DeepSeekFenced(DeepSeek):
    """V3 and R1."""

    syntax = Syntax(
        triggers=(DeepSeek.CALLS,),
        before=DeepSeek.CALLS,
        call=(
            f"{DeepSeek.CALL}function{DeepSeek.SEPARATOR}%s\n```json\n",
            f"\n```{DeepSeek.END}",
        ),
        between="\n",
        after=DeepSeek.END_OF_CALLS,
    )
