"""Text from tokens: however it is cut into pieces, the caller sees the same."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from coordinator.http.answers.logprobs import completion_logprobs
from coordinator.text.tokens import ChoiceText, ShownToken, StopMatcher, TextOptions
from coordinator.validation.parameters import mixed_seed
from modeling.text.tokenizer import load_tokenizer
from protocol.messages import NewToken
from protocol.request import FinishReason, TokenLogprobs

TOKENIZER = load_tokenizer("arithmetic")
texts = st.text("ab ", max_size=30)
stop_lists = st.lists(st.text("ab ", min_size=1, max_size=4), max_size=4)


def first_complete(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The plain definition: the shortest prefix of the text that ends with a stop string."""
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return text[: end - len(stop)], stop
    return text, None


def cut(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(texts, stop_lists, st.lists(st.integers(0, 99)))
@example("aab", ["ab", "b"], [1, 2])
def test_stop_matcher(text: str, stops: list[str], cuts: list[int]) -> None:
    expected, expected_stop = first_complete(text, stops)
    matcher, shown, stop = StopMatcher(stops), "", None
    for piece in cut(text, cuts):
        new, stop = matcher.push(piece)
        shown += new
        assert expected.startswith(shown), "a part of a stop string has leaked"
        if stop is not None:
            break
        assert len(shown) + max(map(len, stops), default=1) > len(expected[: len(shown)])
    if stop is None:
        shown += matcher.flush()
    assert (shown, stop) == (expected, expected_stop)


@given(texts, stop_lists)
def test_no_more_is_held_back_than_could_be_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, stop = matcher.push(text)
    if stop is None:
        held = text[len(shown) :]
        assert not held or any(s.startswith(held) and s != held for s in stops)


unicode_texts = st.text(max_size=20)


@given(unicode_texts, st.lists(st.integers(1, 5)), st.booleans())
def test_choice_text_in_any_batches(text: str, sizes: list[int], ends_by_token: bool) -> None:
    token_ids = [*text.encode(), 257] if ends_by_token else list(text.encode())
    last = FinishReason.STOP if ends_by_token else FinishReason.LENGTH
    tokens = [
        NewToken("r", 1, i, t, last if i == len(token_ids) - 1 else None)
        for i, t in enumerate(token_ids)
    ]
    choice = ChoiceText(TOKENIZER.stream(continuing=True), TextOptions())
    shown, start = "", 0
    for size in [*sizes, len(tokens)]:
        piece = choice.push(tokens[start : start + size])
        start += size
        shown += piece.text
        assert text.startswith(shown)
    if token_ids:
        assert choice.finish_reason is last
        assert shown == text


def test_min_tokens_and_what_follows_a_stop() -> None:
    options = TextOptions(stops=("X",), min_tokens=3)
    choice = ChoiceText(TOKENIZER.stream(), options)
    tokens = [NewToken("r", 1, i, ord(c)) for i, c in enumerate("aXbcXde")]
    piece = choice.push(tokens)
    assert (piece.text, piece.stop_reason) == ("aXbc", "X")
    assert len(piece.tokens) == 5
    assert choice.push(tokens).tokens == ()


@given(
    st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4)), st.integers(0, 9)
)
@example("xSTOP", ["STOP"], 3)  # begins within min_tokens and ends after
@example("ac", ["a", "ab"], 1)
def test_a_stop_string_counts_by_where_it_ends(text: str, stops: list[str], least: int) -> None:
    expected = text
    for end in range(least + 1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            expected = text[: end - max(map(len, hits))]
            break
    choice = ChoiceText(TOKENIZER.stream(), TextOptions(stops=tuple(stops), min_tokens=least))
    shown = ""
    for i, character in enumerate(text):
        finish = FinishReason.LENGTH if i == len(text) - 1 else None
        piece = choice.push([NewToken("r", 1, i, ord(character), finish)])
        shown += piece.text
        assert expected.startswith(shown), "a part of a stop string has leaked"
        if piece.finish_reason is not None:
            break
    assert shown == expected


@given(st.text("aé한👩", max_size=12))
def test_offsets_are_of_the_text_shown(text: str) -> None:
    choice = ChoiceText(TOKENIZER.stream(), TextOptions())
    tokens = [NewToken("r", 1, i, byte) for i, byte in enumerate(text.encode())]
    offsets = [shown.offset for shown in choice.push(tokens).tokens]
    assert offsets == [i for i, character in enumerate(text) for _ in character.encode()]


def test_alternatives_keep_apart_what_prints_alike() -> None:
    names = {1: b"\x80", 2: b"\x81", 3: b"A", 4: b"A", 5: b"B"}
    entry = TokenLogprobs(-3.0, (1, 2, 3, 4), (-0.1, -0.2, -0.3, -0.4))
    shown = ShownToken(NewToken("r", 1, 0, 5, None, entry), 7)
    shaped = completion_logprobs([shown], names.__getitem__, 10)
    assert shaped == {
        "tokens": ["B"],
        "token_logprobs": [-3.0],
        "top_logprobs": [
            {"bytes:\\x80": -0.1, "bytes:\\x81": -0.2, "A": -0.3, "token_id:4": -0.4, "B": -3.0}
        ],
        "text_offset": [17],
    }


@pytest.mark.parametrize("include", [False, True])
def test_include_stop(include: bool) -> None:
    matcher = StopMatcher(["END"], include_stop=include)
    assert matcher.push("theENDless") == ("theEND" if include else "the", "END")


@given(st.integers(0, 2**63 - 1), st.integers(0, 64))
def test_mixed_seeds(seed: int, choice: int) -> None:
    mixed = mixed_seed(seed, choice)
    assert 0 <= mixed < 2**63
    assert (mixed == seed) is (choice == 0) or mixed != seed
