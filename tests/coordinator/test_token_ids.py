"""Packed token ids: a sequence like any other, and a message's field like a tuple."""

import array

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.codec import Codec
from protocol.messages import Reserve, ToRank
from protocol.request import SamplingParams
from protocol.token_ids import TokenIds

IDS = st.lists(st.integers(0, 2**32 - 1), max_size=40)
CODEC: Codec[ToRank] = Codec(ToRank)


@given(IDS, st.integers(-50, 50), st.integers(-50, 50), IDS)
def test_it_is_the_sequence_that_it_was_made_of(
    ids: list[int], start: int, stop: int, more: list[int]
) -> None:
    packed = TokenIds.of(ids)
    assert (len(packed), list(packed), packed == ids) == (len(ids), ids, True)
    assert packed[start:stop] == tuple(ids[start:stop])
    assert packed[::-1] == tuple(ids[::-1])
    assert packed.head(abs(start)) == TokenIds.of(ids[: abs(start)])
    assert packed.followed_by(more) == TokenIds.of([*ids, *more])
    assert TokenIds(memoryview(packed.packed)) == packed
    assert packed.little() == array.array("I", ids).tobytes()
    if -len(ids) <= start < len(ids):
        assert packed[start] == ids[start]
    else:
        with pytest.raises(IndexError):
            packed[start]


@given(IDS)
def test_a_message_carries_it_as_a_tuple(ids: list[int]) -> None:
    sampling = SamplingParams(max_tokens=1)
    packed = Reserve("r", 1, TokenIds.of(ids).as_field(), sampling)
    assert CODEC.decode(CODEC.encode(packed)) == Reserve("r", 1, tuple(ids), sampling)
    assert msgspec.msgpack.decode(TokenIds.of(ids).packed) == ids
