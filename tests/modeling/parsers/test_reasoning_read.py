"""Reasoning before an answer: by which prompt, between which markers."""

import pytest

from modeling.text.parsers.deltas import Content, Reasoning, ToolCall, collect
from tests.modeling.parsers.reading import read

CALL = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


def _read(text: str, parser: str, prompt: str = "") -> tuple[str, str, int]:
    whole = read(text, "hermes", parser, prompt=prompt)
    assert read(text, "hermes", parser, prompt=prompt, cuts=range(len(text))) == whole
    message = collect(whole)
    return message.reasoning, message.content, len(message.calls)


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        ("qwen3", "<think>\nWell, {0}\n\n</think>\n\nYes."),
        ("deepseek_r1", "<think>Well, {0}</think>Yes."),
        ("glm45", "\n<think>Well, {0}</think>\nYes."),
        ("mistral", "[THINK]Well, {0}[/THINK]Yes."),
        ("granite", "Here is my thought process: Well, {0} Here is my response: Yes."),
        ("granite", "Here's my thought process:\nWell, {0}\nHere's my response:\nYes."),
    ],
)
def test_reasoning_stands_between_its_markers_and_white_space_beside_them_is_markup(
    parser: str, text: str
) -> None:
    for thought in ("a < b", "</thin>k", "Here is it"):
        expected = (f"Well, {thought}", "Yes.", 0)
        assert _read(text.format(thought), parser) == expected


def test_a_prompt_that_ends_with_the_first_mark_marker_begins_the_reasoning() -> None:
    assert _read("Well.\n</think>\n\nYes.", "qwen3", "...<think>\n") == ("Well.", "Yes.", 0)
    assert _read("<think>Well.</think>Yes.", "qwen3", "...<think>\n") == ("Well.", "Yes.", 0)


def test_a_prompt_that_closes_it_leaves_an_answer_without_reasoning() -> None:
    assert _read("Yes.", "qwen3", "<think>\n\n</think>\n\n") == ("", "Yes.", 0)


def test_an_answer_that_begins_otherwise_has_no_reasoning() -> None:
    text = "\nA tag is written <think> and </think>."
    assert _read(text, "qwen3") == ("", text, 0)


def test_calls_are_looked_for_after_the_reasoning_only() -> None:
    text = f"<think>Perhaps {CALL}?</think>\n\nI will.\n{CALL}"
    assert _read(text, "qwen3") == (f"Perhaps {CALL}?", "I will.", 1)


@pytest.mark.parametrize("text", ["<think>Well, a", "<think>", "Well, a </thin"])
def test_reasoning_that_ends_at_a_limit_is_reasoning_as_far_as_it_came(text: str) -> None:
    reasoning = text.removeprefix("<think>")
    assert _read(text, "qwen3", "<think>") == (reasoning, "", 0)


def test_half_a_marker_is_content_in_the_end() -> None:
    assert _read("\n<thi", "qwen3") == ("", "\n<thi", 0)


def test_harmony_tells_reasoning_from_content_by_the_channel_in_the_order_of_the_text() -> None:
    text = (
        "<|channel|>analysis<|message|>First.<|end|><|start|>assistant<|channel|>analysis<|message|>"
        "Second.<|end|><|start|>assistant<|channel|>commentary<|message|>I will look.<|end|>"
        "<|start|>assistant<|channel|>analysis to=browser.search<|message|>{}<|call|><|start|>"
        "assistant<|channel|>commentary to=functions.get_time<|message|>{}<|call|>"
        "<|start|>assistant<|channel|>final<|message|>Noon.<|return|>"
    )
    deltas = read(text, "openai", "openai_gptoss")
    assert deltas == read(text, "openai", "openai_gptoss", cuts=range(len(text)))
    first, plan, search, call, _, answer = deltas
    assert (first, plan) == (Reasoning("First.\nSecond."), Content("I will look."))
    assert search == Reasoning("\n{}")
    assert isinstance(call, ToolCall)
    assert answer == Content("\nNoon.")


def test_harmony_without_tools_returns_a_call_as_text() -> None:
    text = "<|channel|>commentary to=functions.get_time<|message|>{}<|call|>"
    assert read(text, "none", "openai_gptoss", tools=()) == [Content("{}")]
