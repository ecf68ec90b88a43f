"""JSON followed as it comes: what is JSON, and where it ends, is what the json module says."""

import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from modeling.text.parsers.json_text import MAX_DEPTH, JsonText

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
)
PIECES = ["{", "}", "[", "]", ",", ":", '"', "a", "\\", "\\n", "\\u00e9", " ", "\n", "1", "-", "."]
PIECES += ["e", "0", "true", "null", "nul", '"a"', '"a": ', "{}", "[]"]


def _follow(text: str, size: int) -> tuple[JsonText, str, int]:
    value, out, at = JsonText(), "", 0
    for end in range(size, len(text) + size, size):
        at, passed = value.feed(text, at, min(end, len(text)))
        out += passed
    return value, out, at


def _decoded(text: str) -> tuple[Any, int] | None:
    start = len(text) - len(text.lstrip(" \t\n\r"))
    try:
        return json.JSONDecoder(strict=False).raw_decode(text, start)
    except ValueError:
        return None


@given(VALUES, st.sampled_from([None, 1]), st.integers(1, 5), st.sampled_from([" ", "]", "x", ""]))
def test_a_value_is_followed_to_its_end(
    value: Any, indent: int | None, size: int, after: str
) -> None:
    text = json.dumps([value], indent=indent, ensure_ascii=False)
    followed, out, at = _follow(text + after, size)
    assert followed.is_done
    assert (out, at) == (text, len(text))


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.integers(1, 5))
@example("[1 ,01 ]", 3)
@example('{"a":"\t"}', 2)
def test_it_is_done_exactly_where_json_is(text: str, size: int) -> None:
    followed, out, at = _follow(text, size)
    decoded = _decoded(text)
    if followed.is_done:
        assert decoded is not None
        assert decoded[1] == at
        assert json.loads(out) == decoded[0]
    elif decoded is not None:
        # A number at the end of the text may go on; the decoder takes one that is followed by
        # letters for whole.
        assert not text.lstrip().startswith(("{", "[", '"'))
    if followed.is_broken:
        assert not followed.is_done


def test_what_is_deeper_than_anybody_writes_is_no_json() -> None:
    followed, _, at = _follow("[" * (MAX_DEPTH + 1), 7)
    assert followed.is_broken
    assert at == MAX_DEPTH
