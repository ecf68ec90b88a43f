"""Any text of a format's own fragments, cut anywhere: one result, nothing lost, little held."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.text.parsers.deltas import Arguments, Content, Delta, ToolCall
from modeling.text.parsers.formats import REASONING_PARSERS, TOOL_CALL_PARSERS, OutputFormat
from modeling.text.parsers.reader import MAX_BLANK_CHARS
from tests.modeling.parsers.reading import TOOLS, deepseek, read

PROSE = ["a", " ", "\n", "Grüße", "\U0001f600", "<", "[", "{", "}", "]", ":", ",", '"', "\\", "'"]
JSON = [
    '{"',
    '"name": "get_time"',
    ', "arguments": ',
    '{"a": [1, "}"]}',
    "{}",
    "12",
    "\\u00e",
    "tr",
]
OBJECT = ['{"name": "get_time", "parameters": {"a": ', '{"arguments": {}, "name": "get_time"}']
FRAGMENTS: dict[str, list[str]] = {
    "hermes": ["<tool_call>", "</tool_call>", '<tool_call>{"name": "get_time", "arguments": {'],
    "llama3_json": ["<|python_tag|>", "\n{", *OBJECT, ";"],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", "get_time", "[CALL_ID]", *OBJECT],
    "deepseek_v3": [
        deepseek(text)
        for text in (
            *("<|tool calls begin|>", "<|tool call begin|>", "<|tool sep|>", "<|tool call end|>"),
            *("<|tool calls end|>", "function<|tool sep|>get_time\n```json\n", "\n```", "get_time"),
        )
    ],
    "qwen3_coder": [
        *("<tool_call>\n<function=get_weather>\n", "<parameter=city>\n", "<parameter=days>"),
        *("\n</parameter>\n", "</function>\n", "</tool_call>", "<function=", ">"),
    ],
    "glm45": [
        *("<tool_call>get_weather", "<arg_key>city</arg_key>", "<arg_key>days</arg_key>"),
        *("<arg_value>", "</arg_value>", "</tool_call>", "<tool_call>"),
    ],
    "pythonic": ["\n[get_time(", "get_weather(", "city='", 'days="""', ")", "]", "=1, ", "a="],
    "openai": [
        *("<|start|>", "assistant", "<|channel|>", "analysis", "commentary", "<|message|>"),
        *(" to=functions.get_time", "<|constrain|>json", "<|end|>", "<|call|>", "final"),
        "<|channel|>commentary to=functions.get_time<|message|>",
    ],
}
NOT_HARMONY = sorted(set(FRAGMENTS) - {"openai"})


def _texts(parser: str) -> st.SearchStrategy[str]:
    fragments = st.sampled_from([*FRAGMENTS[parser], *PROSE, *JSON, " " * (MAX_BLANK_CHARS + 1)])
    return st.lists(fragments | st.text(max_size=3), max_size=14).map("".join)


def _cuts(text: str) -> st.SearchStrategy[list[int]]:
    everywhere = st.just(list(range(len(text) + 1)))
    return everywhere | st.lists(st.integers(0, len(text)), max_size=8)


@pytest.mark.parametrize("parser", FRAGMENTS)
@given(data=st.data(), buffer_calls=st.booleans())
def test_a_cut_changes_nothing(parser: str, buffer_calls: bool, data: st.DataObject) -> None:
    text = data.draw(_texts(parser))
    deltas = read(text, parser, buffer_calls=buffer_calls)
    cuts = data.draw(_cuts(text))
    assert read(text, parser, buffer_calls=buffer_calls, cuts=cuts) == deltas
    _check_order(deltas)
    if parser != "openai" and not any(isinstance(delta, ToolCall) for delta in deltas):
        assert deltas == ([Content(text)] if text else [])


def _check_order(deltas: list[Delta]) -> None:
    """Calls are numbered from 0 on, and each begins once and before its arguments."""
    begun = 0
    for delta in deltas:
        if isinstance(delta, ToolCall):
            assert delta.index == begun
            assert delta.name
            begun += 1
        elif isinstance(delta, Arguments):
            assert delta.index == begun - 1


@pytest.mark.parametrize("parser", NOT_HARMONY)
@settings(max_examples=40)
@given(data=st.data())
def test_no_letter_that_is_not_markup_is_lost(parser: str, data: st.DataObject) -> None:
    """Wherever it stood; in harmony, what stands in the header of a message is markup."""
    parts = data.draw(
        st.lists(
            st.sampled_from([*FRAGMENTS[parser], *PROSE[:3]])
            | st.text("ÄÖÜ", min_size=1, max_size=3),
            max_size=12,
        )
    )
    deltas = read("".join(parts), parser)
    emitted = "".join(delta.text for delta in deltas if not isinstance(delta, ToolCall))
    emitted += "".join(delta.name for delta in deltas if isinstance(delta, ToolCall))
    assert sorted(re.findall("[ÄÖÜ]", emitted)) == sorted(re.findall("[ÄÖÜ]", "".join(parts)))


@pytest.mark.parametrize("parser", NOT_HARMONY)
@settings(max_examples=40)
@given(text=st.text("ab <\n[T{|_", max_size=40))
def test_only_what_may_become_markup_is_held_back(parser: str, text: str) -> None:
    kind = TOOL_CALL_PARSERS[parser]
    stream = OutputFormat(parser).parser(prompt="", tools=TOOLS, id_seed="request")
    emitted = ""
    for at, character in enumerate(text):
        emitted += "".join(d.text for d in stream.push(character) if isinstance(d, Content))
        held = text[len(emitted) : at + 1]
        assert text.startswith(emitted)
        bare = held.lstrip()
        marks = [mark.lstrip() for mark in (*kind.marks, kind.first_mark)]
        assert any(mark.startswith(bare) or bare.rstrip().startswith(mark) for mark in marks)


@pytest.mark.parametrize(
    ("parser", "text"),
    [("pythonic", "\n[see("), ("llama3_json", '\n{"city"'), ("hermes", '<tool_call>{"a"')],
)
def test_what_cannot_become_a_call_is_released_at_once(parser: str, text: str) -> None:
    stream = OutputFormat(parser).parser(prompt="", tools=TOOLS, id_seed="request")
    assert stream.push(text) == [Content(text)]


@pytest.mark.parametrize("parser", ["qwen3", "mistral", "granite"])
@settings(max_examples=40)
@given(data=st.data())
def test_a_cut_changes_nothing_in_reasoning(parser: str, data: st.DataObject) -> None:
    form = REASONING_PARSERS[parser]
    fragments = [*form.opens, *form.closes, *PROSE, "Here ", "is my ", *FRAGMENTS["hermes"]]
    text = data.draw(st.lists(st.sampled_from(fragments), max_size=10).map("".join))
    prompt = data.draw(st.sampled_from(["", form.opens[0] + "\n"]))
    whole = read(text, "hermes", parser, prompt=prompt)
    assert read(text, "hermes", parser, prompt=prompt, cuts=data.draw(_cuts(text))) == whole
