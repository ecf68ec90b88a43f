"""Whom a rank obeys: silence, pauses of its own, successors, and coordinators of yesterday."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.allegiance import Allegiance
from protocol.messages import (
    Abort,
    Alive,
    CacheUpdate,
    ComputeHere,
    GangAddress,
    GangReady,
    Heartbeat,
    Introduce,
    Prefill,
    Released,
    Reserve,
    Shutdown,
    Topology,
    Welcome,
)
from protocol.request import SamplingParams

GANG = GangAddress("", "")
SAMPLING = SamplingParams(max_tokens=1)


def welcomed(epoch: int = 1, now: float = 0.0) -> Allegiance:
    mine = Allegiance(2.5, Counter())
    assert mine.obeys(Welcome(epoch, 1, GANG), now)
    assert mine.welcomed()
    assert not mine.obeys(Alive(epoch), now), "it is heard, and asks for nothing"
    return mine


def look(mine: Allegiance, start: float, end: float) -> float | None:
    """Look each 100 ms; when it was over, or None."""
    for step in range(int((end - start) * 10) + 1):
        if mine.is_over(start + step / 10):
            return start + step / 10
    return None


def test_silence_ends_it() -> None:
    mine = welcomed()
    assert look(mine, 0.0, 2.0) is None
    mine.obeys(Alive(1), 2.0)
    assert 4.4 < (look(mine, 2.0, 10.0) or 0.0) < 4.7


def test_a_coordinator_that_never_beats_is_not_expected_to() -> None:
    mine = Allegiance(2.5, Counter())
    mine.obeys(Welcome(1, 1, GANG), 0.0)
    assert look(mine, 0.0, 100.0) is None


def test_a_coordinator_that_stops_right_after_its_welcome() -> None:
    mine = Allegiance(2.5, Counter())
    mine.obeys(Welcome(1, 1, GANG, alive_interval_s=0.3), 0.0)
    assert 2.4 < (look(mine, 0.0, 10.0) or 0.0) < 2.7


def test_a_pause_of_our_own_is_nobodys_silence() -> None:
    mine = welcomed()
    assert look(mine, 0.0, 1.0) is None
    assert look(mine, 60.0, 61.0) is None
    assert look(mine, 61.0, 70.0) is not None


def test_what_was_asked_for_is_aborted_in_its_place() -> None:
    mine = welcomed()
    for message in (
        Reserve("a", 1, (1,), SAMPLING),
        Reserve("b", 1, (1,), SAMPLING),
        Prefill("c", 2, (1,), SAMPLING, "d", 1, 0),
        ComputeHere("b", 1),
        Abort("unknown", 1),
    ):
        assert mine.obeys(message, 1.0)
    assert mine.may_say(Released("a", 1))
    assert mine.end(5.0) == [Abort("b", 1), Abort("c", 2)]
    assert mine.end(6.0) == []
    assert not mine.may_say(Released("b", 1)), "the next one never asked for it"


def test_nothing_is_obeyed_or_said_before_the_welcome() -> None:
    mine = welcomed()
    mine.end(5.0)
    assert not mine.obeys(Reserve("a", 1, (1,), SAMPLING), 5.0)
    assert not mine.obeys(Topology(3, ()), 5.0)
    assert not mine.may_say(GangReady(3.0))
    assert mine.may_say(Heartbeat(0, 0.0))
    assert mine.obeys(Shutdown("it may always be told to end"), 5.0)
    assert mine.obeys(Welcome(2, 9, GANG), 6.0)
    assert not mine.welcomed(), "it was welcome before"
    assert mine.greeting() == [GangReady(3.0)]
    assert mine.obeys(Reserve("a", 1, (1,), SAMPLING), 6.0)


def test_a_coordinator_of_yesterday_is_refused() -> None:
    counters: Counter[str] = Counter()
    mine = Allegiance(2.5, counters)
    mine.obeys(Welcome(7, 1, GANG), 0.0)
    mine.obeys(Alive(7), 0.0)
    mine.end(1.0)
    for stale in (Welcome(6, 1, GANG), Introduce(6), Alive(6)):
        assert not mine.obeys(stale, 1.0)
    assert not mine.is_welcome
    assert counters["dropped_stale_coordinator"] == 3
    assert look(mine, 1.0, 10.0) is not None, "its signs of life are none"
    assert mine.obeys(Introduce(7), 10.0), "the same one may ask"


@given(
    updates=st.lists(
        st.tuples(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9))), max_size=20
    ),
    ends=st.integers(0, 20),
)
def test_the_next_one_is_told_what_the_cache_holds(
    updates: list[tuple[set[int], set[int]]], ends: int
) -> None:
    mine, held = welcomed(), set[bytes]()
    mine.may_say(GangReady(1.0))
    for number, (stored, evicted) in enumerate(updates):
        if number == ends:
            mine.end(1.0)
        gone = {bytes([i]) for i in evicted - stored}
        new = {bytes([i]) for i in stored}
        held = (held - gone) | new
        mine.may_say(CacheUpdate(tuple(new), tuple(gone)))
    mine.end(2.0)
    mine.obeys(Welcome(2, 1, GANG), 3.0)
    *caches, ready = mine.greeting()
    assert ready == GangReady(1.0)
    assert {h for cache in caches if isinstance(cache, CacheUpdate) for h in cache.stored} == held
