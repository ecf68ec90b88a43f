"""Untyped text becomes the value that the schema asks for."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling.text.parsers.schema_types import as_json, property_types

STRING, NUMBER, ANY = frozenset({"string"}), frozenset({"number"}), frozenset[str]()
MAYBE = frozenset({"string", "null"})


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("3", {"integer"}, 3),
        (" 3.0\n", {"integer"}, 3),
        ("3.5", {"integer"}, "3.5"),
        ("3", {"number"}, 3),
        ("1e999", {"integer"}, "1e999"),
        ("NaN", {"number"}, "NaN"),
        ("true", {"boolean"}, True),
        ("False", {"boolean"}, False),
        ("1", {"boolean"}, "1"),
        ("null", {"string", "null"}, None),
        ("12", {"string", "null"}, "12"),
        ('"a"', {"string", "null"}, '"a"'),
        ("12", {"string", "integer"}, 12),
        ('{"a": [1]}', {"object"}, {"a": [1]}),
        ("{'a': (1, None)}", {"object"}, {"a": [1, None]}),
        ("[" * 10_000, {"array"}, "[" * 10_000),
        ("__import__('os')", {"object"}, "__import__('os')"),
        ("12", set(), 12),
        ('"a"', set(), "a"),
        ("a b", set(), "a b"),
        (" a ", set(), " a "),
    ],
)
def test_text_is_read_as_what_is_allowed(text: str, types: set[str], value: Any) -> None:
    assert json.loads(as_json(text, frozenset(types))) == value


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, {"string"}),
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, {"string", "null"}),
        ({"enum": ["a", 1]}, {"string", "integer"}),
        ({"$ref": "#/$defs/Unit"}, {"string"}),
        ({"allOf": [{"$ref": "#/$defs/Unit"}]}, {"string"}),
        ({"$ref": "#/$defs/Loop"}, set()),
        ({"$ref": "#/$defs/Missing"}, set()),
        ({}, set()),
        (True, set()),
    ],
)
def test_types_are_found_in_the_schema(schema: Any, types: set[str]) -> None:
    definitions = {"Unit": {"enum": ["c", "f"]}, "Loop": {"$ref": "#/$defs/Loop"}}
    root = {"properties": {"a": schema}, "$defs": definitions}
    assert property_types(root, "a") == types
    assert property_types(root, "b") == set()


KEYWORDS = ["type", "enum", "anyOf", "allOf", "$ref", "properties", "a"]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["string", "#/a", "#/properties/a"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=4)
    ),
)


@given(JSON, JSON)
def test_no_schema_breaks_it(schema: Any, other: Any) -> None:
    assert all(
        isinstance(kind, str)
        for kind in property_types({"properties": {"a": schema}, "a": other}, "a")
    )


@given(st.text(max_size=20), st.sampled_from([STRING, NUMBER, ANY, MAYBE, frozenset({"object"})]))
def test_what_is_written_is_always_json(text: str, types: frozenset[str]) -> None:
    json.loads(as_json(text, types))
