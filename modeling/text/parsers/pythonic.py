"""Calls written as a list of Python calls: ``[f(a=1), g()]``, of Llama 3.2, Llama 4 and others."""

import ast
import json
import re

from modeling.text.parsers.reader import Malformed, Marks, Steps
from modeling.text.parsers.schema_types import python_tree, python_value
from modeling.text.parsers.structure import Writing
from modeling.text.parsers.tool_parser import MAX_HELD_CHARS, MAX_NAME_CHARS, ToolParser

_DOTTED = re.compile(r"[\w.]+")
_BRACKETS = Marks(*"()[]{}'\"")
_STRING_ENDS = {quote: Marks(quote, "\\") for quote in ("'", '"', "'''", '"""')}


class Pythonic(ToolParser):
    """A list is calls where a line begins, if it names only offered tools; none is told before it
    is whole. It is parsed, never evaluated."""

    marks = ("\n[",)
    ends = ("\n[",)
    opening = "["
    names_only_tools = True
    writing = Writing(
        triggers=("[",),
        before="[",
        call=("%s(", ")"),
        between=", ",
        after="]",
        argument=("%s=", ""),
        between_arguments=", ",
        has_text=False,
    )

    def _calls(self, mark: str) -> Steps[None]:  # noqa: ARG002 - it is "["
        source = _Source(["["])
        yield from self._space()
        name = yield from self._span(_DOTTED, MAX_NAME_CHARS)
        yield from self._expect("(")
        if self._tools and name not in self._tools:
            raise Malformed  # at once: it may be a link in a long text
        source.keep(f"{name}(")
        yield from self._to_closing_bracket(source)
        try:
            calls = [_call(node) for node in getattr(python_tree(source.text()), "elts", ())]
        except ValueError:
            raise Malformed from None
        if not all(name in self._tools for name, _ in calls if self._tools):
            raise Malformed
        for name, arguments in calls:
            self._begin(name)
            self._arguments(arguments)
            self._end()

    def _to_closing_bracket(self, source: "_Source") -> Steps[None]:
        depth = 2
        while depth:
            found = yield from self._until(_BRACKETS, source.keep, source.left)
            source.keep(found)
            if found in "'\"":
                yield from self._python_string(found, source)
            else:
                depth += 1 if found in "([{" else -1

    def _python_string(self, quote: str, source: "_Source") -> Steps[None]:
        more = yield from self._literal(quote * 2)
        source.keep(more)
        found = ""
        while found != quote + more:
            found = yield from self._until(_STRING_ENDS[quote + more], source.keep, source.left)
            source.keep(found)
            if found == "\\":
                yield from self._next()
                source.keep(self._take(self._at + 1))


class _Source:
    """Text that is collected, within a limit."""

    def __init__(self, parts: list[str]) -> None:
        self._parts = parts
        self.left = MAX_HELD_CHARS

    def keep(self, text: str) -> None:
        self._parts.append(text)
        self.left -= len(text)

    def text(self) -> str:
        return "".join(self._parts)


def _call(node: ast.expr) -> tuple[str, str]:
    """Name and JSON arguments of a call.

    Raises:
        ValueError: it is none, or has other than named literals as arguments.
    """
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with named arguments")
    arguments = {keyword.arg: python_value(keyword.value) for keyword in node.keywords}
    if None in arguments or len(arguments) < len(node.keywords):
        raise ValueError("arguments unpacked or named twice")
    return ast.unparse(node.func), json.dumps(arguments, ensure_ascii=False)
