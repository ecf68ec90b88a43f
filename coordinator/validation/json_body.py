"""The body of a request, parsed as strictly as JSON is defined, and a little more.

Refused: what is not UTF-8, a byte order mark, NaN and infinities (also as 1e400), duplicate keys,
half surrogate pairs, and structures deeper or larger than any real request. Python's own parser
takes most of these, and an engine behind it may not survive them.

Every step costs time in proportion to the body's bytes, whatever they are; values are counted
before any is made, since each takes many times the memory of its text.
"""

import json
import math
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from coordinator.config import Limits
from protocol.errors import RequestError

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_NO_MARKS = bytes(set(range(256)) - set(b'",[{'))
_TEXT = re.compile(rb'"[^"]*"')


def parse_json(body: bytes, limits: Limits) -> dict[str, Any]:
    """The object that ``body`` is.

    Raises:
        RequestError: it is none, with the code that says why.
    """
    if body.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise RequestError("the body starts with a byte order mark", code="invalid_encoding")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"the body is not UTF-8 at byte {error.start}", code="invalid_encoding"
        ) from error
    _check_size(body, limits)
    parser = _Parser(limits)
    try:
        value = json.loads(
            text,
            object_pairs_hook=parser.take_object,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except json.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise _too_deep(limits) from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise RequestError(
            "an integer of the body has more digits than any field takes", code="invalid_json"
        ) from error
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object", code="invalid_type")
    _check_depth(value, limits)
    if _SURROGATE_ESCAPE.search(body):
        _check_unicode(value)
    return value


def _check_size(body: bytes, limits: Limits) -> None:
    """Refuse more values than are served before any is made. Each stands behind a mark or first."""
    most = limits.max_json_values
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) < most:
        return
    # Marks within strings are text. All that is neither mark nor quote is dropped, then strings
    # without marks: the end of one and the start of the next, in a row, are as good as none.
    marks = body.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NO_MARKS)
    marks = marks.replace(b'""', b"")
    num_quotes = marks.count(b'"')
    num_values = len(marks) - num_quotes + 1
    if num_quotes // 2 <= 2 * most:  # so many strings are too many values, whatever is in them
        num_values -= sum(len(text[0]) - 2 for text in _TEXT.finditer(marks))
    if num_values > most:
        raise RequestError(f"the body has more than {most} values", code="too_large")


class _Parser:
    """Sees each object as it is completed."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._num_objects = 0

    def take_object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self._num_objects += 1
        if self._num_objects > self._limits.max_json_objects:
            raise RequestError(
                f"the body has more than {self._limits.max_json_objects} objects", code="too_large"
            )
        value = dict(pairs)
        if len(value) < len(pairs):
            raise _duplicate_key(key for key, _ in pairs)
        return value


def _duplicate_key(keys: Iterable[str]) -> RequestError:
    seen: set[str] = set()
    double = ""
    for double in keys:
        if double in seen:
            break
        seen.add(double)
    return RequestError(
        f"the key {double[:64]!r} is given twice", code="duplicate_key", param=double[:64]
    )


def _refuse_constant(name: str) -> NoReturn:
    raise RequestError(f"{name} is not JSON", code="invalid_json")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise RequestError(f"the number {digits[:32]} is out of range", code="invalid_json")
    return value


def _too_deep(limits: Limits) -> RequestError:
    return RequestError(
        f"the body is nested deeper than {limits.max_json_depth} levels", code="too_deep"
    )


def _check_depth(value: dict[str, Any], limits: Limits) -> None:
    level: list[Any] = [value]
    for _ in range(limits.max_json_depth):
        level = [item for container in level for item in _containers(container)]
        if not level:
            return
    raise _too_deep(limits)


def _containers(container: Any) -> list[Any]:  # noqa: ANN401 - any JSON value
    items = container.values() if type(container) is dict else container
    return [item for item in items if type(item) in (dict, list)]


def _check_unicode(value: Any) -> None:  # noqa: ANN401 - any JSON value
    """Only for bodies with an escaped surrogate. Depth is bounded by now."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                "a string has half a surrogate pair: it is no Unicode text", code="invalid_unicode"
            ) from error
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_unicode(key)
            _check_unicode(item)
    elif isinstance(value, list):
        for item in value:
            _check_unicode(item)
