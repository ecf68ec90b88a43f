"""Calls written as a list of Python calls: ``[f(a=1), g()]``, of Llama 3.2, Llama 4 and others."""

import ast
import json
import re
from io import StringIO

from modeling.text.parsers.reader import Malformed, Marks, Steps
from modeling.text.parsers.schema_types import python_tree, python_value
from modeling.text.parsers.structure import Syntax
from modeling.text.parsers.tool_parser import MAX_NAME_CHARS, ToolParser

MAX_SOURCE_CHARS = 1 << 16  # of a list: its syntax tree is a hundred times as large

_DOTTED = re.compile(r"[\w.]+")
_BRACKETS = Marks(*"()[]{}'\"")
_STRING_ENDS = {quote: Marks(quote, "\\") for quote in ("'", '"', "'''", '"""')}


class Pythonic(ToolParser):
    """A list of calls where a line begins, if it names only offered tools.

    No call is emitted before the list is whole. The list is parsed, never evaluated.
    """

    marks = ("\n[",)
    ends = ("\n[",)
    first_mark = "["
    needs_known_name = True
    syntax = Syntax(
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
        yield from self._space()
        name = yield from self._span(_DOTTED, MAX_NAME_CHARS)
        yield from self._expect("(")
        if self._tools and name not in self._tools:
            raise Malformed  # at once: it may be a link in a long text
        source = StringIO()
        yield from self._to_closing_bracket(source)
        try:
            tree = python_tree(f"[{name}({source.getvalue()}")
            calls = [_call(node) for node in getattr(tree, "elts", ())]
        except (ValueError, RecursionError):
            raise Malformed from None
        if not all(name in self._tools for name, _ in calls if self._tools):
            raise Malformed
        for name, arguments in calls:
            self._begin(name)
            self._arguments(arguments)
            self._end()

    def _to_closing_bracket(self, source: StringIO) -> Steps[None]:
        depth = 2  # the list and the call
        while depth:
            found = yield from self._source_until(_BRACKETS, source)
            if found in _STRING_ENDS:
                yield from self._python_string(found, source)
            else:
                depth += 1 if found in "([{" else -1

    def _python_string(self, quote: str, source: StringIO) -> Steps[None]:
        more = yield from self._literal(quote * 2)
        source.write(more)
        found = ""
        while found != quote + more:
            found = yield from self._source_until(_STRING_ENDS[quote + more], source)
            if found == "\\":
                yield from self._next()
                source.write(self._take(self._at + 1))

    def _source_until(self, marks: Marks, source: StringIO) -> Steps[str]:
        left = MAX_SOURCE_CHARS - source.tell()
        if left <= 0:
            raise Malformed
        found = yield from self._until(marks, source.write, left)
        source.write(found)
        return found


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
