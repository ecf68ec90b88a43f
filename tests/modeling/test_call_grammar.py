"""Grammars of tool calls: what they let a model write is what the format's parser reads back."""

import json
import random
from typing import Any

import pytest

from modeling.matchers import Matcher
from modeling.text import grammar as grammars
from modeling.text.call_grammar import of_forced_calls, of_free_calls
from modeling.text.grammar import Vocabulary, spell_as_text
from modeling.text.parsers.deltas import Tool, collect
from modeling.text.parsers.formats import TOOL_CALL_PARSERS, OutputFormat
from modeling.text.tokenizer import ByteTokenizer
from tests.modeling.parsers.reading import read, write
from tests.modeling.test_grammar import EOS, allowed, generate

TOOLS = (
    Tool(
        "move",
        {
            "type": "object",
            "properties": {
                "to": {"type": "string", "enum": ["left", "right"]},
                "steps": {"type": "integer"},
                "exact": {"type": "boolean"},
            },
            "required": ["to"],
            "additionalProperties": False,
        },
    ),
    Tool("halt", {"type": "object", "properties": {}, "additionalProperties": False}),
)
CALLS: list[list[tuple[str, dict[str, Any]]]] = [
    [("move", {"to": "left"})],
    [("move", {"to": "right", "steps": -3, "exact": True})],
    [("halt", {})],
    [("move", {"to": "left", "exact": False}), ("halt", {})],
]


@pytest.fixture(scope="module")
def by_bytes() -> Vocabulary:
    return Vocabulary(ByteTokenizer(300), (EOS,))


def is_taken(vocabulary: Vocabulary, grammar: str, text: str) -> bool:
    """Whether a whole answer is a text of the grammar."""
    matcher, output = Matcher(vocabulary, grammar), list(text.encode())
    for end, token_id in enumerate(output):
        if token_id not in allowed(matcher.mask(output[:end])):
            return False
    return EOS in allowed(matcher.mask(output))


@pytest.mark.parametrize("parser", TOOL_CALL_PARSERS)
def test_a_forced_call_can_be_written_and_nothing_else(by_bytes: Vocabulary, parser: str) -> None:
    structure = OutputFormat(parser).structure(TOOLS)
    assert structure is not None
    one = of_forced_calls(structure, spell_as_text, is_one=True)
    many = of_forced_calls(structure, spell_as_text, is_one=False)
    grammars.check(one, "tools")
    grammars.check(many, "tools")
    for calls in CALLS:
        text = write(structure, calls)
        assert is_taken(by_bytes, many, text), text
        assert is_taken(by_bytes, one, text) is (len(calls) == 1), text
    for wrong in (
        [("move", {"to": "up"})],
        [("move", {"to": "left", "steps": "many"})],
        [("move", {"steps": 1})],
    ):
        assert not is_taken(by_bytes, many, write(structure, wrong)), wrong
    assert not is_taken(by_bytes, many, "hello")


@pytest.mark.parametrize("parser", TOOL_CALL_PARSERS)
def test_what_is_drawn_under_force_is_read_as_calls_of_the_tools(
    by_bytes: Vocabulary, parser: str
) -> None:
    structure = OutputFormat(parser).structure(TOOLS)
    assert structure is not None
    grammar = of_forced_calls(structure, spell_as_text, is_one=True)
    num_read = 0
    for seed in range(12):
        found = generate(by_bytes, grammar, EOS, seed)
        if found is None:
            continue
        message = collect(
            read(ByteTokenizer(300).decode(found, continuing=True), parser, tools=TOOLS)
        )
        assert message.content == ""
        [call] = message.calls
        arguments = json.loads(call.arguments)
        if call.name == "move":
            assert {"to"} <= arguments.keys() <= {"to", "steps", "exact"}
            assert arguments["to"] in ("left", "right")
            assert type(arguments.get("steps", 0)) is int
        else:
            assert (call.name, arguments) == ("halt", {})
        num_read += 1
    assert num_read >= 3


@pytest.mark.parametrize("parser", sorted(set(TOOL_CALL_PARSERS) - {"pythonic", "llama3_json"}))
def test_text_is_free_until_a_call_begins(by_bytes: Vocabulary, parser: str) -> None:
    structure = OutputFormat(parser).structure(TOOLS)
    assert structure is not None
    grammar = of_free_calls(structure, spell_as_text, is_one=False)
    assert grammar is not None
    assert is_taken(by_bytes, grammar, "only text")
    for calls in CALLS[:3]:
        assert is_taken(by_bytes, grammar, "so: " + write(structure, calls))
    wrong = write(structure, [("move", {"to": "up"})])
    assert not is_taken(by_bytes, grammar, "so: " + wrong)


def test_reasoning_goes_before_the_answer(by_bytes: Vocabulary) -> None:
    inner = grammars.of_choice(["yes"])
    form = (["<think>"], ["</think>"], spell_as_text)
    opened = grammars.after_reasoning(inner, *form, is_opened=True)
    closed = grammars.after_reasoning(inner, *form, is_opened=False)
    assert is_taken(by_bytes, opened, "let me see\n</think>\n\nyes")
    assert not is_taken(by_bytes, opened, "yes")
    assert is_taken(by_bytes, closed, "<think>\nwell</think>yes")
    assert is_taken(by_bytes, closed, "yes")
    assert not is_taken(by_bytes, closed, "<think>\nwell</think>no")
    as_json = grammars.after_reasoning(grammars.of_json_object(), *form, is_opened=True)
    assert is_taken(by_bytes, as_json, 'a { b</think>{"a": 1}')
    grammars.check(as_json, "response_format")


class _Controlled(ByteTokenizer):
    """Whose texts may spell control tokens, as a checkpoint's do."""

    def special_texts(self) -> list[str]:
        return ["<|im_start|>", "<|im_end|>"]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        named = {"<|im_start|>": [258], "<|im_end|>": [259]}
        return named.get(text) or super().encode(text, add_special_tokens=add_special_tokens)


def test_a_control_token_in_the_writing_is_that_token(by_bytes: Vocabulary) -> None:
    tokenizer = _Controlled(300)
    spell = grammars.spell_with(tokenizer)
    assert spell("a<|im_start|>b<|im_end|>") == ["a", 258, "b", 259]
    form = (["<|im_start|>"], ["<|im_end|>"], spell)
    grammar = grammars.after_reasoning(grammars.of_choice(["y"]), *form, is_opened=True)
    matcher, draw, output = Matcher(by_bytes, grammar), random.Random(1), list[int]()
    for _ in range(20):
        choices = allowed(matcher.mask(output))
        assert 259 in choices
        output.append(draw.choice([i for i in choices if i < 128]))
    assert ord("y") in allowed(matcher.mask([*output, 259]))
