"""What the parsers' tests share: tools, reading a text in pieces, syntax calls by a structure."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from modeling.text.parsers.deltas import Delta, Tool, merged
from modeling.text.parsers.formats import OutputFormat
from modeling.text.parsers.structure import CallForm, Structure

WEATHER = Tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": "boolean"},
            "where": {"type": "object"},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
        "required": ["city"],
    },
)
TIME = Tool("get_time")
TOOLS = (WEATHER, TIME)
BAR, UNDER = "\uff5c", "\u2581"


def deepseek(text: str) -> str:
    """With DeepSeek's own characters for the bars and the spaces inside ``<|...|>``."""
    for words in (
        "tool calls begin",
        "tool calls end",
        "tool call begin",
        "tool call end",
        "tool sep",
    ):
        text = text.replace(f"<|{words}|>", f"<{BAR}{words.replace(' ', UNDER)}{BAR}>")
    return text


def read(  # all that an answer's reading depends on
    text: str,
    tool_call_parser: str = "none",
    reasoning_parser: str = "none",
    *,
    prompt: str = "",
    cuts: Sequence[int] = (),
    tools: Sequence[Tool] = TOOLS,
    buffer_calls: bool = False,
) -> list[Delta]:
    """The deltas of an answer that comes in pieces, cut at some places."""
    parser = OutputFormat(tool_call_parser, reasoning_parser).parser(
        prompt=prompt, tools=tools, id_seed="request", buffer_calls=buffer_calls
    )
    deltas: list[Delta] = []
    for start, end in pairwise([0, *sorted(cuts), len(text)]):
        deltas += parser.push(text[start:end])
    return merged([*deltas, *parser.finish()])


def write(structure: Structure, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Calls as a grammar made from a structure would let a model write them."""
    syntax = structure.syntax
    forms = {form.name: form for form in structure.calls}
    written = [
        forms[name].begin + _arguments(structure, forms[name], arguments) + forms[name].end
        for name, arguments in calls
    ]
    return syntax.before + syntax.between.join(written) + syntax.after


def _arguments(structure: Structure, form: CallForm, arguments: Mapping[str, Any]) -> str:
    if form.arguments is None:
        return json.dumps(arguments)
    return structure.syntax.between_arguments.join(
        argument.begin
        + (
            value
            if argument.is_text and isinstance(value := arguments[argument.name], str)
            else json.dumps(arguments[argument.name])
        )
        + argument.end
        for argument in form.arguments
        if argument.name in arguments
    )
