"""How tool calls are written in a format, as data from which a grammar can be made.

All calls of an answer are ``before``, then calls with ``between`` them, then ``after``. Text that
contains a special token of the tokenizer stands for that token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modeling.text.parsers.deltas import Tool
from modeling.text.parsers.schema_types import property_types

_DEFINITIONS: tuple[str, ...] = ("$defs", "definitions")


@dataclass(frozen=True, slots=True)
class Syntax:
    """What a format writes around its parts; ``%s`` stands for the name of the part."""

    triggers: tuple[str, ...]  # a free answer that comes to one of these begins a call
    call: tuple[str, str]  # before and after the arguments
    before: str = ""
    between: str = ""
    after: str = ""
    argument: tuple[str, str] | None = None  # before and after a value; None: arguments are JSON
    between_arguments: str = ""
    has_text: bool = True  # a string is written as it is, not as JSON


@dataclass(frozen=True, slots=True)
class ArgumentForm:
    """How one argument is written where the arguments are no JSON object."""

    name: str
    begin: str
    schema: Mapping[str, Any]  # of the value
    is_text: bool  # a string is written as it is; any other value as JSON
    is_required: bool
    end: str


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a call of one tool is written: ``begin``, the arguments, ``end``.

    The arguments are a JSON object or, if ``arguments`` is not None, those of its forms that the
    call has, in this order, with the syntax's ``between_arguments``.
    """

    name: str
    begin: str
    schema: Mapping[str, Any]  # of the object of all arguments
    end: str
    arguments: tuple[ArgumentForm, ...] | None


@dataclass(frozen=True, slots=True)
class Structure:
    """How calls of some tools are written."""

    syntax: Syntax
    calls: tuple[CallForm, ...]


def structure_of(syntax: Syntax, tools: Sequence[Tool]) -> Structure:
    """The syntax of a format, made out for some tools."""
    return Structure(syntax, tuple(_call_form(syntax, tool) for tool in tools))


def _call_form(syntax: Syntax, tool: Tool) -> CallForm:
    begin, end = (text.replace("%s", tool.name) for text in syntax.call)
    schema: dict[str, Any] = {"type": "object", **tool.parameters}
    if syntax.argument is None:
        return CallForm(tool.name, begin, schema, end, None)
    definitions = {key: schema[key] for key in _DEFINITIONS if key in schema}
    before, after = syntax.argument
    arguments = tuple(
        ArgumentForm(
            name=name,
            begin=before.replace("%s", name),
            schema={**of_name, **definitions} if isinstance(of_name, Mapping) else {},
            is_text=syntax.has_text and "string" in property_types(schema, name),
            is_required=name in schema.get("required", ()),
            end=after,
        )
        for name, of_name in schema.get("properties", {}).items()
    )
    return CallForm(tool.name, begin, schema, end, arguments)
