"""A call that is written by a format's structure is read back as the same call."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.text.parsers.deltas import Tool, collect
from modeling.text.parsers.formats import TOOL_CALL_PARSERS, OutputFormat
from tests.modeling.parsers.reading import TOOLS, read, write

TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
# A string that reads as null is one of two things that the schema of "note" allows.
NOTES = st.none() | TEXTS.filter(lambda text: text.strip() not in ("null", "None"))
ARGUMENTS = st.fixed_dictionaries(
    {"city": TEXTS},
    optional={
        "days": st.integers(-(2**60), 2**60),
        "exact": st.booleans(),
        "where": st.dictionaries(TEXTS, VALUES, max_size=3),
        "note": NOTES,
    },
)
CALLS = st.lists(
    st.tuples(st.just("get_weather"), ARGUMENTS) | st.tuples(st.just("get_time"), st.just({})),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("parser", TOOL_CALL_PARSERS)
@settings(max_examples=30)
@given(calls=CALLS, data=st.data())
def test_calls_by_the_structure_are_read_back(
    parser: str, calls: list[tuple[str, dict[str, Any]]], data: st.DataObject
) -> None:
    structure = OutputFormat(parser).structure(TOOLS)
    assert structure is not None
    text = write(structure, calls)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    for buffer_calls in (False, True):
        message = collect(read(text, parser, cuts=cuts, buffer_calls=buffer_calls))
        assert [(call.name, json.loads(call.arguments)) for call in message.calls] == calls
        assert (message.content, message.reasoning) == ("", "")


@pytest.mark.parametrize("parser", TOOL_CALL_PARSERS)
def test_a_trigger_begins_every_call(parser: str) -> None:
    structure = OutputFormat(parser).structure(TOOLS)
    assert structure is not None
    for name in ("get_weather", "get_time"):
        text = write(structure, [(name, {"city": "Bern"} if name == "get_weather" else {})])
        assert text.startswith(structure.syntax.triggers)


def test_a_form_of_an_argument_has_what_its_schema_refers_to() -> None:
    unit = {"enum": ["c", "f"]}
    schema = {
        "properties": {"unit": {"$ref": "#/$defs/Unit"}, "days": {"type": "integer"}},
        "required": ["unit"],
        "$defs": {"Unit": unit},
    }
    structure = OutputFormat("qwen3_coder").structure([Tool("f", schema)])
    assert structure is not None
    (form,) = structure.calls
    assert form.schema == {"type": "object", **schema}
    assert form.arguments is not None
    of_unit, of_days = form.arguments
    assert of_unit.schema == {"$ref": "#/$defs/Unit", "$defs": {"Unit": unit}}
    assert (of_unit.is_text, of_unit.is_required) == (True, True)
    assert (of_days.is_text, of_days.is_required) == (False, False)
