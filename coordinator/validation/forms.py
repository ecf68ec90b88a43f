"""The form that an answer is to have: from a caller's fields to a grammar.

Three families of names mean the same: OpenAI's ``response_format``, vLLM's ``structured_outputs``
(and its older ``guided_*``), SGLang's ``json_schema``, ``regex`` and ``ebnf``. A request has one.
"""

import json
from collections.abc import Callable
from typing import Any

from coordinator.errors import invalid_value, unsupported
from coordinator.validation.schemas import GenerationBody
from modeling.text import grammar as grammars
from modeling.text.grammar import Tag
from protocol.errors import RequestError

MAX_CHOICES = 10_000
MAX_TAGS = 128
_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
_SGLANG = {"json_schema": "json", "regex": "regex", "ebnf": "grammar"}


def read_form(body: GenerationBody) -> tuple[str, str] | None:
    """(grammar, the field that asks for it); None if an answer may be any text.

    Raises:
        RequestError: the form is none, there are several, or another field contradicts it.
    """
    asked = [(name, make) for name, make in _asked(body) if make is not None]
    if not asked:
        return None
    if len(asked) > 1:
        names = " and ".join(name for name, _ in asked)
        raise invalid_value(asked[1][0], f"{names} both say what the answer is to be: give one")
    [(param, make)] = asked
    for name in ("min_tokens", "ignore_eos"):
        if getattr(body, name):
            raise invalid_value(
                name,
                f"{name} cannot be had together with {param}, which decides where the answer ends",
            )
    return make(), param


Make = Callable[[], str]


def _asked(body: GenerationBody) -> list[tuple[str, Make | None]]:
    found: list[tuple[str, Make | None]] = [
        ("response_format", _response_format(body.response_format)),
        ("structured_outputs", _structured_outputs(body.structured_outputs)),
        ("structural_tag", _one("structural_tag", "structural_tag", body.structural_tag)),
    ]
    for name in _GUIDED:
        kind = name.removeprefix("guided_")
        found.append((name, _one(name, kind, getattr(body, name))))
    found += [(name, _one(name, kind, getattr(body, name))) for name, kind in _SGLANG.items()]
    return found


def _response_format(given: Any) -> Make | None:  # noqa: ANN401 - a caller's JSON value
    param = "response_format"
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, dict) else None
    match kind:
        case "text":
            return None
        case "json_object":
            return grammars.of_json_object
        case "json_schema":
            outer = given.get("json_schema")
            schema = outer.get("schema") if isinstance(outer, dict) else None
            if schema is None:
                raise _missing(f"{param}.json_schema.schema", param)
            return _one(param, "json", schema)
        case "structural_tag":
            return _one(param, "structural_tag", given)
        case _:
            raise invalid_value(
                param, f"{param}.type must be text, json_object, json_schema or structural_tag"
            )


def _structured_outputs(given: Any) -> Make | None:  # noqa: ANN401 - a caller's JSON value
    param = "structured_outputs"
    if given is None:
        return None
    if not isinstance(given, dict):
        raise _wrong_type(param, param, "an object")
    named = {name: value for name, value in given.items() if value not in (None, False)}
    kinds = named.keys() & {*_MAKERS, "json_object"}
    settings = {"disable_any_whitespace", "disable_fallback", "disable_additional_properties"}
    if unknown := named.keys() - _MAKERS.keys() - {"json_object"}:
        what = "cannot be set here" if unknown <= settings else "is no field of it"
        raise unsupported(param, f"{param}.{min(unknown)} {what}")
    if len(kinds) != 1:
        raise invalid_value(
            param, f"{param} needs one of {', '.join(sorted([*_MAKERS, 'json_object']))}"
        )
    [kind] = kinds
    return grammars.of_json_object if kind == "json_object" else _one(param, kind, named[kind])


def _one(param: str, kind: str, value: Any) -> Make | None:  # noqa: ANN401 - a caller's JSON value
    if value is None:
        return None
    return lambda: _MAKERS[kind](param, value)


def _json(param: str, value: Any) -> str:  # noqa: ANN401 - a caller's JSON value
    schema = _parsed(param, value)
    if not isinstance(schema, dict) and schema is not True:
        raise _wrong_type(param, f"{param}: a schema", "an object")
    return grammars.of_json_schema(schema)


def _regex(param: str, value: Any) -> str:  # noqa: ANN401 - a caller's JSON value
    return grammars.of_regex(_text(param, value))


def _choice(param: str, value: Any) -> str:  # noqa: ANN401 - a caller's JSON value
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise _wrong_type(param, f"{param}: choice", "a list of strings")
    if not 0 < len(value) <= MAX_CHOICES:
        raise invalid_value(param, f"{param}: from 1 to {MAX_CHOICES} choices are served")
    return grammars.of_choice(value)


def _grammar(param: str, value: Any) -> str:  # noqa: ANN401 - a caller's JSON value
    return grammars.of_text(_text(param, value), param)


def _structural_tag(param: str, value: Any) -> str:  # noqa: ANN401 - a caller's JSON value
    """``{"structures": [{"begin", "schema", "end"}], "triggers": [...]}``, as vLLM and SGLang."""
    given = _parsed(param, value)
    structures = given.get("structures") if isinstance(given, dict) else None
    triggers = given.get("triggers") if isinstance(given, dict) else None
    if not isinstance(structures, list) or not isinstance(triggers, list):
        raise _missing(f"{param}: structures, or triggers,", param)
    if not 0 < len(structures) <= MAX_TAGS:
        raise invalid_value(param, f"{param}: from 1 to {MAX_TAGS} structures are served")
    return grammars.of_tags([_tag(param, structure, triggers) for structure in structures])


def _tag(param: str, structure: Any, triggers: list[Any]) -> Tag:  # noqa: ANN401 - a caller's JSON value
    if not isinstance(structure, dict):
        raise _wrong_type(param, f"{param}: a structure", "an object")
    begin, end = structure.get("begin"), structure.get("end", "")
    if not isinstance(begin, str) or not isinstance(end, str):
        raise _wrong_type(param, f"{param}: begin and end", "strings")
    found = (t for t in triggers if isinstance(t, str) and t and begin.startswith(t))
    trigger = next(found, None)
    if trigger is None:
        raise invalid_value(param, f"{param}: no trigger is the beginning of {begin[:64]!r}")
    schema = structure.get("schema", {})
    if not isinstance(schema, dict):
        raise _wrong_type(param, f"{param}: schema", "an object")
    return Tag(trigger, begin, schema, end)


_MAKERS: dict[str, Callable[[str, Any], str]] = {
    "json": _json,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "structural_tag": _structural_tag,
}


def _parsed(param: str, value: Any) -> Any:  # noqa: ANN401 - a caller's JSON value
    """JSON that may have come as a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise invalid_value(param, f"{param} is not JSON: {error}") from error


def _text(param: str, value: Any) -> str:  # noqa: ANN401 - a caller's JSON value
    if not isinstance(value, str) or not value:
        raise _wrong_type(param, param, "a string that is not empty")
    return value


def _wrong_type(param: str, what: str, wanted: str) -> RequestError:
    return invalid_value(param, f"{what} must be {wanted}", "invalid_type")


def _missing(what: str, param: str) -> RequestError:
    return invalid_value(param, f"{what} is missing", "missing_required_parameter")
