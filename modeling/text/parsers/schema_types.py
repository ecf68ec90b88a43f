"""Untyped text of an argument to the JSON value that the tool's schema asks for."""

import ast
import json
import warnings
from collections.abc import Mapping
from typing import Any

MAX_SCHEMA_DEPTH = 16
_KINDS: dict[type, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
    type(None): "null",
}
_JSON_NAMES = {"true": True, "false": False, "null": None}


def property_types(schema: Mapping[str, Any], name: str) -> frozenset[str]:
    """JSON types that a schema of arguments allows for one of them; none if they are not known."""
    properties = schema.get("properties")
    of_name = properties.get(name) if isinstance(properties, Mapping) else None
    return frozenset(_types(of_name, schema, MAX_SCHEMA_DEPTH))


def _types(schema: Any, root: Mapping[str, Any], depth: int) -> set[str]:  # noqa: ANN401 - any JSON
    if not isinstance(schema, Mapping) or not depth:
        return set()
    kinds = schema.get("type")
    if isinstance(kinds, str):
        return {kinds}
    if isinstance(kinds, list):
        return {kind for kind in kinds if isinstance(kind, str)}
    if isinstance(schema.get("enum"), list):
        return {_KINDS[type(value)] for value in schema["enum"] if type(value) in _KINDS}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        found: Any = root
        for step in reference.removeprefix("#/").split("/"):
            found = found.get(step) if isinstance(found, Mapping) else None
        return _types(found, root, depth - 1)
    choices = [schema.get(key) for key in ("anyOf", "oneOf", "allOf")]
    branches = [branch for choice in choices if isinstance(choice, list) for branch in choice]
    return {kind for branch in branches for kind in _types(branch, root, depth - 1)}


def as_json(text: str, types: frozenset[str]) -> str:
    """JSON text of the value that ``text`` stands for.

    Models write JSON or Python. If the types allow a string, the text is one, unless it reads as a
    value of another allowed type. If the types are not known, the text is what it reads as.
    """
    bare = text.strip()
    for read in (_read_json, python_value):
        try:
            value = read(bare)
        except (ValueError, RecursionError):
            continue
        kind = _KINDS[type(value)]
        if kind == "number" and "number" not in types and value.is_integer():
            kind, bare = "integer", str(int(value))
        is_allowed = kind in types or (kind == "integer" and "number" in types)
        if not types or (is_allowed and kind != "string"):
            return bare if read is _read_json else json.dumps(value, ensure_ascii=False)
    return json.dumps(text, ensure_ascii=False)


def _read_json(text: str) -> Any:  # noqa: ANN401 - any JSON
    return json.loads(text, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def python_tree(source: str) -> ast.expr:
    """The syntax tree of a Python expression, which is never evaluated.

    Raises:
        ValueError: it is none, or deeper than Python reads.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a pattern
            return ast.parse(source, mode="eval").body
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(str(error)) from error


def python_value(source: str | ast.expr) -> Any:  # noqa: ANN401 - any JSON
    """The JSON value of a Python literal, in which JSON's names may stand.

    Raises:
        ValueError: it is something else.
    """
    node = python_tree(source) if isinstance(source, str) else source
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [python_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [key and python_value(key) for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError("a key of a JSON object is a string")
        return dict(zip(keys, map(python_value, node.values), strict=True))
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        sign, node = -1, node.operand
    if not isinstance(node, ast.Constant) or type(node.value) not in _KINDS:
        raise ValueError("not a literal of JSON")
    if isinstance(node.value, str):
        # A character beyond U+FFFF that JSON spells as two escapes is two of Python's.
        return node.value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(node.value, int | float) and not isinstance(node.value, bool):
        if abs(node.value) == float("inf"):
            raise ValueError("no number of JSON")
        return sign * node.value
    return node.value
