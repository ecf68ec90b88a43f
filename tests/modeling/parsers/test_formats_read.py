"""Answers as the models of each format write them, and what they are read as, however cut."""

import json
from typing import Any

import pytest

from modeling.text.parsers.deltas import Arguments, ToolCall, collect
from modeling.text.parsers.formats import OutputFormat
from tests.modeling.parsers.reading import TOOLS, deepseek, read

Calls = list[tuple[str, dict[str, Any]]]
ZURICH, BERN = {"city": 'Zürich {"]}'}, {"city": "Bern", "days": 3}
BOTH: Calls = [("get_weather", ZURICH), ("get_weather", BERN)]

# Parser, the answer, its content, its calls.
ANSWERS: dict[str, tuple[str, str, str, Calls]] = {
    "hermes: two calls after content": (
        "hermes",
        'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich {\\"]}"}}'
        '\n</tool_call>\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern", '
        '"days": 3}}\n</tool_call>',
        "Let me look.",
        BOTH,
    ),
    "hermes: text after a call": (
        "hermes",
        '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>\nDone.',
        "\nDone.",
        [("get_time", {})],
    ),
    "hermes: arguments before the name": (
        "hermes",
        '<tool_call>{"arguments": {"city": "Bern", "days": 3}, "name": "get_weather"}</tool_call>',
        "",
        [("get_weather", BERN)],
    ),
    "hermes: a tool without parameters": (
        "hermes",
        '<tool_call>\n{"name": "get_time"}\n</tool_call>',
        "",
        [("get_time", {})],
    ),
    "hermes: the end tag inside a string": (
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "</tool_call>"}}</tool_call>',
        "",
        [("get_weather", {"city": "</tool_call>"})],
    ),
    "hermes: a line break inside a string, which JSON forbids": (
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "a\nb"}}</tool_call>',
        "",
        [("get_weather", {"city": "a\nb"})],
    ),
    "hermes: the end tag left out": (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern", "days": 3}}\n',
        "",
        [("get_weather", BERN)],
    ),
    "llama: a bare object": (
        "llama3_json",
        '{"name": "get_weather", "parameters": {"city": "Bern", "days": 3}}',
        "",
        [("get_weather", BERN)],
    ),
    "llama: two, with a type": (
        "llama3_json",
        '\n{"type": "function", "name": "get_weather", "parameters": {"city": "Zürich {\\"]}"}}; '
        '{"type": "function", "name": "get_weather", "parameters": {"city": "Bern", "days": 3}}',
        "",
        BOTH,
    ),
    "llama: after the tag, after content": (
        "llama3_json",
        'Sure.<|python_tag|>{"name": "get_weather", "arguments": {"city": "Bern", "days": 3}}\n'
        '{"name": "get_time", "parameters": {}}',
        "Sure.",
        [("get_weather", BERN), ("get_time", {})],
    ),
    "llama: on a line of its own": (
        "llama3_json",
        'Sure:\n\n{"name": "get_weather", "parameters": {"city": "Bern", "days": 3}}',
        "Sure:",
        [("get_weather", BERN)],
    ),
    "mistral: two calls after content": (
        "mistral",
        'Sure.[TOOL_CALLS]get_weather[ARGS]{"city": "Zürich {\\"]}"}'
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Bern", "days": 3}',
        "Sure.",
        BOTH,
    ),
    "mistral: the list": (
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Zürich {\\"]}"}, "id": '
        '"abcDEF123"}, {"name": "get_weather", "arguments": {"city": "Bern", "days": 3}}]',
        "",
        BOTH,
    ),
    "deepseek v3: two calls": (
        "deepseek_v3",
        deepseek(
            "Sure.<|tool calls begin|>"
            "<|tool call begin|>function<|tool sep|>get_weather\n```json\n"
            '{"city": "Zürich {\\"]}"}\n```<|tool call end|>\n'
            "<|tool call begin|>function<|tool sep|>get_weather\n```json\n"
            '{"city": "Bern", "days": 3}\n```<|tool call end|><|tool calls end|>'
        ),
        "Sure.",
        BOTH,
    ),
    "deepseek v3.1: two calls": (
        "deepseek_v31",
        deepseek(
            "<|tool calls begin|><|tool call begin|>get_weather<|tool sep|>"
            '{"city": "Zürich {\\"]}"}<|tool call end|>'
            '<|tool call begin|>get_weather<|tool sep|>{"city": "Bern", "days": 3}<|tool call end|>'
            "<|tool calls end|>"
        ),
        "",
        BOTH,
    ),
    "qwen3-coder: two calls after content": (
        "qwen3_coder",
        'Sure.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nZürich {"]}\n'
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=get_weather>\n<parameter=city>\nBern\n"
        "</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        "Sure.",
        BOTH,
    ),
    "qwen3-coder: strings keep their line breaks, values get the schema's types": (
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\n\n a\n\n</parameter>\n"
        "<parameter=exact>\nTrue\n</parameter>\n<parameter=where>\n{'a': [1, None]}\n</parameter>\n"
        "<parameter=note>\n12\n</parameter>\n<parameter=unknown>\n[1]\n</parameter>\n</function>\n</tool_call>",
        "",
        [
            (
                "get_weather",
                {
                    "city": "\n a\n",
                    "exact": True,
                    "where": {"a": [1, None]},
                    "note": "12",
                    "unknown": [1],
                },
            )
        ],
    ),
    "qwen3-coder: the outer tag left out": (
        "qwen3_coder",
        "Sure.\n<function=get_weather>\n<parameter=city>\nBern\n</parameter>\n<parameter=days>\n3\n"
        "</parameter>\n</function>",
        "Sure.",
        [("get_weather", BERN)],
    ),
    "glm: two calls after content": (
        "glm45",
        'Sure.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Zürich {"]}</arg_value>'
        "\n</tool_call>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Bern</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        "Sure.",
        BOTH,
    ),
    "glm 4.7: no line breaks, no arguments": (
        "glm45",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Bern</arg_value><arg_key>days"
        "</arg_key><arg_value>3</arg_value></tool_call><tool_call>get_time</tool_call>",
        "",
        [("get_weather", BERN), ("get_time", {})],
    ),
    "pythonic: two calls": (
        "pythonic",
        '[get_weather(city=\'Zürich {"]}\'), get_weather(city="Bern", days=3)]',
        "",
        BOTH,
    ),
    "pythonic: all kinds of values, on a line of its own": (
        "pythonic",
        "Sure:\n[get_weather(city='''a\"b'c\\n''', days=-3, exact=True, "
        "where={'a': [1.5, None, (true,)]}, "
        'note="\\ud83d\\ude00\\d")]',
        "Sure:",
        [
            (
                "get_weather",
                {
                    "city": "a\"b'c\n",
                    "days": -3,
                    "exact": True,
                    "where": {"a": [1.5, None, [True]]},
                    "note": "\U0001f600\\d",
                },
            )
        ],
    ),
    "harmony: two calls, one with the recipient before the channel": (
        "openai",
        "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"city":"Zürich {\\"]}"}<|call|><|start|>assistant to=functions.get_weather<|channel|>'
        'commentary json<|message|>{"city": "Bern", "days": 3}<|call|>',
        "",
        BOTH,
    ),
    "harmony: a preamble, and the call in the wrong channel": (
        "openai",
        "<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant<|channel|>analysis "
        'to=functions.get_weather code<|message|>{"city": "Bern", "days": 3}<|call|>',
        "I will look.",
        [("get_weather", BERN)],
    ),
    "harmony: a message whose end was forgotten, and a doubled channel": (
        "openai",
        "<|channel|>commentary<|message|>I will look.<|start|>assistant<|channel|>commentary"
        "<|channel|>commentary to=functions.get_time<|message|>{}",
        "I will look.",
        [("get_time", {})],
    ),
    "harmony: an answer": (
        "openai",
        "<|channel|>final<|message|>2 < 3.<|return|>",
        "2 < 3.",
        [],
    ),
    "harmony: no markup at all": ("openai", "to be or not <|be", "to be or not <|be", []),
    "harmony: two messages without a text": (
        "openai",
        "<|channel|>commentary?<|end|><|start|>assistant<|channel|>analysis<|start|>assistant"
        "<|channel|>final<|message|>Yes.",
        "Yes.",
        [],
    ),
}


@pytest.mark.parametrize("title", ANSWERS)
@pytest.mark.parametrize("buffer_calls", [False, True], ids=["streamed", "held"])
def test_a_format_is_read_as_its_models_write_it(title: str, buffer_calls: bool) -> None:
    parser, text, content, calls = ANSWERS[title]
    for cuts in ((), range(len(text))):
        message = collect(read(text, parser, cuts=cuts, buffer_calls=buffer_calls))
        assert message.content == content
        assert message.reasoning == ""
        assert [(call.name, json.loads(call.arguments)) for call in message.calls] == calls


def test_a_call_is_told_before_its_arguments_which_come_in_pieces() -> None:
    text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>'
    parser = OutputFormat("hermes").parser(prompt="", tools=TOOLS, id_seed="request")
    emitted = [parser.push(character) for character in text]
    after = {text[: at + 1]: deltas for at, deltas in enumerate(emitted) if deltas}
    (begun, brace), *pieces = after.values()
    assert isinstance(begun, ToolCall)
    assert (begun.index, begun.name, brace) == (0, "get_weather", Arguments(0, "{"))
    assert next(iter(after)).endswith('"arguments": {')
    assert all(isinstance(piece, Arguments) for (piece,) in pieces)
    assert len(pieces) > len("Bern")
    assert parser.finish() == []
    assert parser.num_calls == 1
