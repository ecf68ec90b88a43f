"""What is no call, or not a whole one: nothing is lost, and nothing passes for a call."""

import pytest

from modeling.text.parsers.deltas import Arguments, Content, ToolCall, collect
from tests.modeling.parsers.reading import deepseek, read

NO_CALLS = [
    ("hermes", "<tool_call>get_time</tool_call>"),
    ("hermes", "a <tool_call> b"),
    ("hermes", '<tool_call>{"name": "a b", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "get_time", "arguments": 3}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"what": "get_time"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "get_time", "name": "get_time"}</tool_call>'),
    ("hermes", "\n<tool_call"),
    ("hermes", '<tool_call>{"name": "get_w'),
    ("llama3_json", '{"name": "Bob", "parameters": {}}'),
    ("llama3_json", '{"name": "get_time", "age": 3}'),
    ("llama3_json", '{"name": "get_time"}'),
    ("llama3_json", 'Sure: {"name": "get_time", "parameters": {}}'),
    ("llama3_json", "<|python_tag|>print(1)"),
    ("mistral", "[TOOL_CALLS] []"),
    ("mistral", "[TOOL_CALLS]get_time"),
    ("deepseek_v31", deepseek("<|tool calls begin|>get_time")),
    ("qwen3_coder", "<tool_call>\n<function=get time>"),
    ("qwen3_coder", "<tool_call>\nget_time\n</tool_call>"),
    ("glm45", "<tool_call>\n</tool_call>"),
    ("pythonic", "[get_time]"),
    ("pythonic", "[get_time()"),
    ("pythonic", "[get_weather(Bern)]"),
    ("pythonic", "[get_weather(city=here)]"),
    ("pythonic", "[get_weather(**{})]"),
    ("pythonic", "[get_weather(city=f'{1}', days=__import__('os'))]"),
    ("pythonic", "[get_weather(days=1e999)]"),
    ("pythonic", "[get_time(), print(a=1)]"),
    ("pythonic", "[get_time(a=1, a=2)]"),
    ("pythonic", "See [get_time()](http://there)"),
    ("pythonic", "[get_weather(city='" + "[" * 300 + "', where=" + "[" * 300 + "]" * 300 + ")]"),
]


@pytest.mark.parametrize(("parser", "text"), NO_CALLS)
def test_what_is_no_call_is_text(parser: str, text: str) -> None:
    for cuts in ((), range(len(text))):
        assert read(text, parser, cuts=cuts) == [Content(text)]


@pytest.mark.parametrize(
    ("parser", "text", "arguments", "content"),
    [
        (
            "hermes",
            '<tool_call>{"name": "get_time", "arguments": {"a": oops}}</tool_call> So.',
            '{"a": oops}}',
            " So.",
        ),
        (
            "mistral",
            '[TOOL_CALLS]get_time[ARGS]{"a": oops}',
            '{"a": oops}',
            "",
        ),
        (
            "openai",
            "<|channel|>commentary to=functions.get_time<|message|>{oops}<|call|>",
            "{oops}",
            "",
        ),
        (
            "hermes",
            '<tool_call>{"name": "get_time", "arguments": {}}}</tool_call>',
            "{}",
            "}}",
        ),
    ],
)
def test_a_call_that_breaks_after_it_was_told_keeps_all_text_up_to_its_end(
    parser: str, text: str, arguments: str, content: str
) -> None:
    message = collect(read(text, parser))
    assert [call.arguments for call in message.calls] == [arguments]
    assert message.content == content


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        ("hermes", 'Now:\n<tool_call>{"name": "get_time", "arguments": {"a": oops}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "get_time", "arguments": {}}}</tool_call>'),
        ("qwen3_coder", "<tool_call>\n<function=get_time>\n<parameter=a>\n1\n</parameter>\nOops"),
        ("mistral", '[TOOL_CALLS]get_time[ARGS]{"a": oops}'),
    ],
)
def test_a_broken_call_of_an_answer_that_is_not_streamed_is_text(parser: str, text: str) -> None:
    for cuts in ((), range(len(text))):
        assert read(text, parser, cuts=cuts, buffer_calls=True) == [Content(text)]


def test_a_broken_call_does_not_hide_the_next() -> None:
    call = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    for broken in ("<tool_call>\n", "<tool_call>{oops}</tool_call>\n"):
        message = collect(read(broken + call, "hermes"))
        assert message.content.rstrip("\n") == broken.rstrip("\n")
        assert [call.arguments for call in message.calls] == ["{}"]
    mistral = "[TOOL_CALLS]get_time[ARGS]{oops[TOOL_CALLS]get_time[ARGS]{}"
    assert [call.arguments for call in collect(read(mistral, "mistral")).calls] == ["{oops", "{}"]


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"days": 3, "city": "Be'),
        ("llama3_json", '{"name": "get_weather", "parameters": {"days": 3, "city": "Be'),
        ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"days": 3, "city": "Be'),
        ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"days": 3, "city": "Be'),
        (
            "deepseek_v31",
            deepseek("<|tool call begin|>get_weather<|tool sep|>") + '{"days": 3, "city": "Be',
        ),
        (
            "qwen3_coder",
            "<function=get_weather>\n<parameter=days>\n3\n</parameter>\n<parameter=city>\nBe",
        ),
        (
            "glm45",
            "<tool_call>get_weather\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n"
            "<arg_key>city</arg_key>\n<arg_value>Be",
        ),
        (
            "openai",
            '<|channel|>commentary to=functions.get_weather<|message|>{"days": 3, "city": "Be',
        ),
    ],
)
@pytest.mark.parametrize("buffer_calls", [False, True], ids=["streamed", "held"])
def test_a_call_that_ends_at_a_limit_is_told_as_far_as_it_came(
    parser: str, text: str, buffer_calls: bool
) -> None:
    for cuts in ((), range(len(text))):
        call, arguments = read(text, parser, cuts=cuts, buffer_calls=buffer_calls)
        assert isinstance(call, ToolCall)
        assert call.name == "get_weather"
        assert arguments == Arguments(0, '{"days": 3, "city": "Be')


@pytest.mark.parametrize("text", ["</tool_c", "\n</tool_call", "\n", ""])
def test_half_an_end_tag_is_no_text(text: str) -> None:
    call = '<tool_call>{"name": "get_time", "arguments": {}}'
    message = collect(read(call + text, "hermes"))
    assert (message.content, len(message.calls)) == ("", 1)
