"""Tools that a caller offers to the model, and calls of them in a conversation.

How a model writes calls is its format's (modeling/text/parsers). Here the fields are checked, and
what they ask for becomes a grammar where it must be certain: a call that is forced, and calls of
tools that are ``strict``.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.errors import invalid_value, unsupported
from coordinator.text.tokenizing import TextTools
from modeling.text.call_grammar import of_forced_calls, of_free_calls
from modeling.text.grammar import Spell
from modeling.text.parsers.deltas import Tool

MAX_TOOLS = 512
NAME = re.compile(r"[a-zA-Z0-9_.:/-]{1,128}")
_CHOICES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class Offer:
    """The tools of a request.

    ``choice`` is "none", "auto", "required", or "one" of a single tool; ``shown`` is what the
    template is given.
    """

    tools: tuple[Tool, ...]
    shown: tuple[Mapping[str, Any], ...]
    choice: str
    is_strict: bool  # a call follows its schema, also where the model may choose to make none
    is_parallel: bool

    @property
    def is_forced(self) -> bool:
        return self.choice in ("required", "one")

    def grammar(self, text_tools: TextTools, spell: Spell) -> str | None:
        """What the answer is held to; None if the model is free.

        Raises:
            RequestError: the model's format cannot promise it.
        """
        structure = text_tools.format.structure(self.tools)
        assert structure is not None, "tools are refused without a format"
        is_one = self.choice == "one" or not self.is_parallel
        if self.is_forced:
            return of_forced_calls(structure, spell, is_one=is_one)
        if self.choice != "auto" or not (self.is_strict or not self.is_parallel):
            return None
        grammar = of_free_calls(structure, spell, is_one=is_one)
        if grammar is None:
            raise unsupported(
                "tools",
                "this model's format of calls cannot be held to strict: true or to "
                "parallel_tool_calls: false while tool_choice is auto",
            )
        return grammar


def read_offer(
    text_tools: TextTools,
    tools: Any,  # noqa: ANN401 - these two are a caller's JSON values
    choice: Any,  # noqa: ANN401
    parallel: bool | None,
) -> Offer | None:
    """The tools of a request; None if there are none.

    Raises:
        RequestError: a field is wrong, or the model does not know tools.
    """
    if tools is not None and not isinstance(tools, list):
        raise invalid_value("tools", "tools must be a list", "invalid_type")
    if not tools:
        if choice not in (None, "none", "auto"):
            raise invalid_value("tool_choice", "tool_choice needs tools")
        return None
    if len(tools) > MAX_TOOLS:
        raise invalid_value("tools", f"{len(tools)} tools, at most {MAX_TOOLS} are served")
    _check_known(text_tools)
    read = [_tool(number, tool) for number, tool in enumerate(tools)]
    names = [tool.name for tool in read]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise invalid_value("tools", f"two tools are named {twice}")
    chosen, kind = _choice(choice, read)
    functions = [tool["function"] for tool in tools]
    return Offer(
        tools=tuple(chosen),
        shown=tuple({"type": "function", "function": _shown(f)} for f in functions),
        choice=kind,
        is_strict=any(f.get("strict") is True for f in functions),
        is_parallel=parallel is not False,
    )


def _check_known(text_tools: TextTools) -> None:
    template = text_tools.chat_template
    if "tools" not in template.variables:
        raise unsupported("tools", "this model's chat template does not show tools")
    if text_tools.format.structure(()) is None:
        raise unsupported(
            "tools",
            "it is not known how this model writes calls: start the server with "
            "--tool-call-parser NAME",
        )


def _tool(number: int, given: Any) -> Tool:  # noqa: ANN401 - a caller's JSON value
    where = f"tools[{number}]"
    if not isinstance(given, dict) or not isinstance(given.get("function"), dict):
        raise invalid_value("tools", f"{where} must be an object with a function", "invalid_type")
    if given.get("type") != "function":
        raise unsupported("tools", f"{where}.type must be function")
    function = given["function"]
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise invalid_value(
            "tools", f"{where}.function.name must have 1 to 128 letters, digits, _, -, ., : or /"
        )
    if parameters is not None and not isinstance(parameters, dict):
        raise invalid_value(
            "tools", f"{where}.function.parameters must be an object", "invalid_type"
        )
    if not isinstance(function.get("description") or "", str):
        raise invalid_value(
            "tools", f"{where}.function.description must be a string", "invalid_type"
        )
    return Tool(name, parameters or {"type": "object", "properties": {}})


def _shown(function: Mapping[str, Any]) -> dict[str, Any]:
    """What templates of transformers expect of a function."""
    return {
        "name": function["name"],
        "description": function.get("description") or "",
        "parameters": function.get("parameters") or {"type": "object", "properties": {}},
    }


def _choice(given: Any, tools: Sequence[Tool]) -> tuple[Sequence[Tool], str]:  # noqa: ANN401
    if given is None:
        return tools, "auto"
    if isinstance(given, str):
        if given not in _CHOICES:
            raise invalid_value("tool_choice", f"tool_choice must be one of {', '.join(_CHOICES)}")
        return tools, given
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "allowed_tools":
        return _allowed(given.get("allowed_tools"), tools)
    function = given.get("function") if kind == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise invalid_value("tool_choice", "tool_choice names no function", "invalid_type")
    return [_named(name, tools)], "one"


def _allowed(given: Any, tools: Sequence[Tool]) -> tuple[Sequence[Tool], str]:  # noqa: ANN401
    """OpenAI's ``allowed_tools``: some of the tools, which the template shows all the same."""
    mode = given.get("mode") if isinstance(given, dict) else None
    entries = given.get("tools") if isinstance(given, dict) else None
    if mode not in ("auto", "required") or not isinstance(entries, list) or not entries:
        raise invalid_value("tool_choice", "allowed_tools needs a mode and a list of tools")
    names = []
    for entry in entries:
        function = entry.get("function") if isinstance(entry, dict) else None
        names.append(str(function.get("name")) if isinstance(function, dict) else "")
    return [_named(name, tools) for name in dict.fromkeys(names)], mode


def _named(name: str, tools: Sequence[Tool]) -> Tool:
    for tool in tools:
        if tool.name == name:
            return tool
    raise invalid_value("tool_choice", f"tool_choice names {name[:64]!r}, no tool has it")


def read_calls(where: str, given: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - a caller's JSON value
    """The calls of an assistant's message as templates take them: arguments are an object.

    Raises:
        RequestError: with param ``messages``.
    """
    if not isinstance(given, list):
        raise invalid_value("messages", f"{where}.tool_calls must be a list", "invalid_type")
    return [_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(given)]


def _call(where: str, given: Any) -> dict[str, Any]:  # noqa: ANN401 - a caller's JSON value
    function = given.get("function") if isinstance(given, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid_value("messages", f"{where} must have a function with a name", "invalid_type")
    arguments = function.get("arguments")
    try:
        parsed = json.loads(arguments or "{}") if isinstance(arguments, str | None) else arguments
    except (ValueError, RecursionError) as error:
        raise invalid_value(
            "messages", f"{where}.function.arguments is not JSON: {error}"
        ) from error
    if not isinstance(parsed, dict):
        raise invalid_value(
            "messages", f"{where}.function.arguments must be an object", "invalid_type"
        )
    call = {"type": "function", "function": {"name": function["name"], "arguments": parsed}}
    call_id = given.get("id")
    if call_id is not None and not (isinstance(call_id, str) and len(call_id) <= 256):
        raise invalid_value("messages", f"{where}.id must be a short string", "invalid_type")
    return {"id": call_id, **call} if call_id else call
