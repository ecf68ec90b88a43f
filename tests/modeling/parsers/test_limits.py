"""A megabyte that is made to hurt: the time stays linear, and little is kept."""

import time
import tracemalloc

import pytest

from modeling.text.parsers.formats import OutputFormat, OutputParser
from modeling.text.parsers.tool_parser import MAX_HELD_CHARS
from tests.modeling.parsers.reading import TOOLS, deepseek

MEGABYTE = 1 << 20

# Parser, how the text begins, what is repeated.
HELD = [
    ("hermes", "", " "),
    ("hermes", '<tool_call>{"arguments": {"a": "', "\u00e4"),
    ("hermes", '<tool_call>{"name": "get_time", "arguments": {"a": ', "0"),
    ("qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=days>", "</parameter"),
    ("glm45", "", "<tool_call>get_weather<arg_key>"),
    ("pythonic", "[get_weather(city=[", "1,"),
    ("pythonic", "[get_weather(city='", "\\'"),
    ("openai", "<|channel|>", "a "),
]
HURTING = [
    *HELD,
    ("hermes", "", "<tool_call>"),
    ("hermes", "", '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "get_time", "arguments": {"a": "', "</tool_call"),
    ("llama3_json", "", '\n{"name"'),
    ("mistral", "[TOOL_CALLS] [", '{"name": "get_time", "arguments": {}}, '),
    ("deepseek_v3", "", deepseek("<|tool calls begin|><|tool call begin|>")),
    ("pythonic", "", "\n[get_time("),
    ("openai", "", "<|channel|>"),
    ("openai", "", "<|channel|>commentary to=functions.get_time<|message|>{"),
]


def _parser(name: str) -> OutputParser:
    return OutputFormat(name).parser(prompt="", tools=TOOLS, id_seed="request")


def _cpu_s(name: str, text: str) -> float:
    parser, started = _parser(name), time.process_time()
    parser.push(text)
    parser.finish()
    return time.process_time() - started


@pytest.mark.parametrize(("name", "start", "repeated"), HURTING)
def test_time_is_linear_in_the_text(name: str, start: str, repeated: str) -> None:
    text = start + repeated * (MEGABYTE // len(repeated))
    quarter = _cpu_s(name, text[: MEGABYTE // 4])
    # Linear is four times as long, quadratic sixteen times; the offset is a busy machine's.
    assert _cpu_s(name, text) < 10 * quarter + 0.5


@pytest.mark.parametrize(("name", "start", "repeated"), HELD)
def test_little_is_kept(name: str, start: str, repeated: str) -> None:
    text = start + repeated * (4 * MAX_HELD_CHARS // len(repeated))
    parser, kept = _parser(name), 0
    tracemalloc.start()
    try:
        for at in range(0, len(text), 1000):
            parser.push(text[at : at + 1000])
            kept = max(kept, tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # What is held is kept twice, as text and as the value that it will be, at four bytes each.
    assert kept < 12 * MAX_HELD_CHARS
