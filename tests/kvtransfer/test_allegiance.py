"""Whom a rank obeys: silence, pauses of its own, successors, and coordinators of yesterday."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.links.coordinator_lease import CoordinatorLease
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


def welcomed(epoch: int = 1, now: float = 0.0) -> CoordinatorLease:
    mine = CoordinatorLease(2.5, Counter())
    assert not mine.is_over(now, is_up=True)
    assert mine.obeys(Welcome(epoch, 1, GANG))
    assert mine.welcomed()
    assert not mine.obeys(Alive(epoch)), "it asks for nothing"
    return mine


def look(mine: CoordinatorLease, start: float, end: float, *, is_up: bool = False) -> float | None:
    """Look each 100 ms at a line that is down; when it was over, or None."""
    for step in range(int((end - start) * 10) + 1):
        if mine.is_over(start + step / 10, is_up=is_up):
            return start + step / 10
    return None


@given(gaps=st.lists(st.floats(0.0, 100.0), max_size=50))
def test_a_line_that_is_up_is_never_over(gaps: list[float]) -> None:
    """Whatever is said on it, and when: a busy coordinator says nothing at all."""
    mine, now = welcomed(), 0.0
    for gap in gaps:
        now += gap
        assert not mine.is_over(now, is_up=True)


@given(outages=st.lists(st.tuples(st.floats(0.0, 0.2), st.floats(0.0, 60.0)), max_size=10))
def test_a_line_that_comes_back_at_once_is_the_same(outages: list[tuple[float, float]]) -> None:
    mine, now = welcomed(), 0.0
    for down_s, up_s in outages:
        assert look(mine, now, now + down_s) is None
        now += down_s + up_s
        assert look(mine, now, now, is_up=True) is None


def test_a_line_that_does_not_come_back_is_over() -> None:
    mine = welcomed()
    assert 0.2 < (look(mine, 0.1, 5.0) or 0.0) < 0.6


def test_a_line_that_broke_before_its_welcome_is_over_at_once() -> None:
    """Its HELLO may be lost, and is said once."""
    mine = CoordinatorLease(2.5, Counter())
    assert not mine.is_over(0.0, is_up=True)
    assert mine.is_over(0.02, is_up=False)


def test_a_line_that_cannot_be_connected_is_tried_anew() -> None:
    mine = welcomed()
    mine.end(0.0)
    assert 2.4 < (look(mine, 0.0, 10.0) or 0.0) < 2.7


def test_a_line_that_is_up_waits_for_its_welcome() -> None:
    """For the rest of its gang, or for a coordinator that is busy."""
    mine = CoordinatorLease(2.5, Counter())
    assert look(mine, 0.0, 100.0, is_up=True) is None


def test_a_pause_of_our_own_is_nobodys_outage() -> None:
    mine = welcomed()
    assert look(mine, 0.0, 0.1) is None
    assert not mine.is_over(60.0, is_up=False), "nobody looked for a minute"
    assert look(mine, 60.0, 70.0) is not None


def test_what_was_asked_for_is_aborted_in_its_place() -> None:
    mine = welcomed()
    for message in (
        Reserve("a", 1, (1,), SAMPLING),
        Reserve("b", 1, (1,), SAMPLING),
        Prefill("c", 2, (1,), SAMPLING, "d", 1, 0),
        ComputeHere("b", 1),
        Abort("unknown", 1),
    ):
        assert mine.obeys(message)
    assert mine.may_say(Released("a", 1))
    assert mine.end(5.0) == [Abort("b", 1), Abort("c", 2)]
    assert mine.end(6.0) == []
    assert not mine.may_say(Released("b", 1)), "the next one never asked for it"


def test_nothing_is_obeyed_or_said_before_the_welcome() -> None:
    mine = welcomed()
    mine.end(5.0)
    assert not mine.obeys(Reserve("a", 1, (1,), SAMPLING))
    assert not mine.obeys(Topology(3, ()))
    assert not mine.may_say(GangReady(3.0))
    assert mine.may_say(Heartbeat(0, 0.0))
    assert mine.obeys(Shutdown("it may always be told to end"))
    assert mine.obeys(Welcome(2, 9, GANG))
    assert not mine.welcomed(), "it was welcome before"
    assert mine.greeting() == [GangReady(3.0)]
    assert mine.obeys(Reserve("a", 1, (1,), SAMPLING))


def test_a_coordinator_of_yesterday_is_refused() -> None:
    counters: Counter[str] = Counter()
    mine = CoordinatorLease(2.5, counters)
    mine.obeys(Welcome(7, 1, GANG))
    mine.obeys(Alive(7))
    mine.end(1.0)
    for stale in (Welcome(6, 1, GANG), Introduce(6), Alive(6)):
        assert not mine.obeys(stale)
    assert not mine.is_welcome
    assert counters["dropped_stale_coordinator"] == 3
    assert mine.obeys(Introduce(7)), "the same one may ask"


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
    mine.obeys(Welcome(2, 1, GANG))
    *caches, ready = mine.greeting()
    assert ready == GangReady(1.0)
    assert {h for cache in caches if isinstance(cache, CacheUpdate) for h in cache.stored} == held
