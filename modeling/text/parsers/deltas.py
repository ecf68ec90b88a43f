"""What an answer consists of once its text has been read: content, reasoning and tool calls.

OpenAI's chat stream sends such deltas; an answer that is not streamed is what they add up to.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the text that the user reads."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call begins; its arguments follow."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


Delta = Content | Reasoning | ToolCall | Arguments


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; ``parameters`` is the JSON schema of its arguments."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Call:
    """A whole call. ``arguments`` is JSON text, except where the answer broke off or broke it."""

    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """A whole answer."""

    content: str
    reasoning: str
    calls: tuple[Call, ...]


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """The same deltas with neighbouring pieces of one text joined, and empty ones left out."""
    joined: list[Delta] = []
    for _, group in groupby(deltas, lambda delta: (type(delta), getattr(delta, "index", 0))):
        first, *more = group
        if isinstance(first, ToolCall):
            joined.append(first)
        elif text := "".join([first.text, *(d.text for d in more if not isinstance(d, ToolCall))]):
            joined.append(replace(first, text=text))
    return joined


def collect(deltas: Iterable[Delta]) -> Message:
    """The message that the deltas of one answer add up to."""
    content, reasoning, calls = "", "", dict[int, Call]()
    for delta in merged(deltas):
        match delta:
            case Content(text):
                content += text
            case Reasoning(text):
                reasoning += text
            case ToolCall(index, call_id, name):
                calls[index] = Call(call_id, name, "")
            case Arguments(index, text):
                calls[index] = replace(calls[index], arguments=calls[index].arguments + text)
    return Message(content, reasoning, tuple(calls.values()))
