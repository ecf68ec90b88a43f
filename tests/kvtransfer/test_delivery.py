"""Exactly once and in order, whatever the connection does: the two ends of a stream, and a lossy
way.

In every history of the property test, some frames and acknowledgements are dropped, doubled and
overtaken for as long as the history says; then the way is good again.
"""

import math
from dataclasses import dataclass, field
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.links.delivery import (
    ACK_DELAY_S,
    FIRST_TIMEOUT_S,
    MAX_BURST,
    MAX_EARLY,
    MAX_OWED,
    MAX_TIMEOUT_S,
    MAX_TIMEOUTS,
    MAX_WAITING,
    Inbox,
    Outbox,
)

T = TypeVar("T")
STEP_S = 0.07
STEPS = ("send", "send", "deliver", "deliver", "lose", "double", "overtake", "acknowledge", "wait")


@dataclass
class Line:
    """An outbox, an inbox, and what is under way between them, in both directions."""

    now: float = 0.0
    outbox: Outbox[str] = field(default_factory=Outbox)
    inbox: Inbox[str] = field(default_factory=lambda: Inbox(1))
    frames: list[tuple[int, str]] = field(default_factory=list)
    acks: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)
    delivered: list[str] = field(default_factory=list)
    num_resent: int = 0

    def send(self) -> None:
        self.sent.append(f"m{len(self.sent)}")
        self.frames.append((self.outbox.add(self.sent[-1], self.now), self.sent[-1]))

    def deliver(self) -> None:
        if self.acks:
            assert self.outbox.acknowledge(*self.acks.pop(0))
        if self.frames:
            self.delivered += self.inbox.take(*self.frames.pop(0), self.now) or ()

    def acknowledge(self) -> None:
        self.acks.append(self.inbox.acknowledgement())

    def wait(self) -> None:
        self.now += STEP_S
        due = self.outbox.take_due(self.now)
        self.num_resent += len(due)
        self.frames += due
        if self.inbox.due_at <= self.now:
            self.acknowledge()

    def step(self, name: str, chosen: int) -> None:
        if name in ("send", "deliver", "acknowledge", "wait"):
            getattr(self, name)()
            return
        self._disturb(name, self.frames, chosen)
        self._disturb(name, self.acks, chosen)

    @staticmethod
    def _disturb(name: str, way: list[T], chosen: int) -> None:
        if not way:
            return
        if name == "double":
            way.append(way[chosen % len(way)])
            return
        taken = way.pop(chosen % len(way))
        if name == "overtake":
            way.append(taken)


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 1_000)), max_size=300))
def test_all_is_delivered_once_and_in_order(history: list[tuple[str, int]]) -> None:
    line = Line()
    for name, chosen in history:
        line.step(name, chosen)
        assert line.delivered == line.sent[: len(line.delivered)]
        assert line.outbox.num_waiting >= len(line.sent) - len(line.delivered)
    deadline = line.now + len(line.sent) * 2 * MAX_TIMEOUT_S + 10.0
    while line.outbox.num_waiting:
        assert line.now < deadline
        line.wait()
        while line.frames or line.acks:
            line.deliver()
    assert line.delivered == line.sent
    num_resent = line.num_resent
    for _ in range(100):
        line.wait()
        while line.frames or line.acks:
            line.deliver()
    assert line.num_resent == num_resent, "all is acknowledged"
    assert line.outbox.due_at == line.inbox.due_at == math.inf


# -- the sender's end ------------------------------------------------------------------------------


def _outbox(count: int, now: float = 0.0) -> Outbox[str]:
    outbox = Outbox[str]()
    for number in range(1, count + 1):
        assert outbox.add(f"m{number}", now) == number
    return outbox


def test_what_is_acknowledged_in_time_is_sent_once() -> None:
    outbox = _outbox(3)
    assert outbox.due_at == FIRST_TIMEOUT_S
    assert outbox.take_due(FIRST_TIMEOUT_S - 0.001) == []
    assert outbox.acknowledge(2)
    assert outbox.take_due(FIRST_TIMEOUT_S) == [(3, "m3")]
    assert outbox.acknowledge(3)
    assert outbox.due_at == math.inf
    assert outbox.take_due(1e9) == []


def test_the_timeout_doubles_and_starts_small_after_an_acknowledgement() -> None:
    outbox, now, waits = _outbox(2), 0.0, []
    for _ in range(6):
        waits.append(outbox.due_at - now)
        now = outbox.due_at
        assert outbox.take_due(now) == [(1, "m1"), (2, "m2")]
    assert waits == pytest.approx([0.2, 0.4, 0.8, 1.6, 2.0, 2.0])
    assert outbox.acknowledge(1)
    assert outbox.due_at == now + FIRST_TIMEOUT_S


def test_an_old_or_repeated_acknowledgement_changes_nothing() -> None:
    outbox = _outbox(3)
    assert outbox.acknowledge(2)
    due_at = outbox.take_due(FIRST_TIMEOUT_S), outbox.due_at
    for old in (0, 1, 2):
        assert outbox.acknowledge(old)
    assert outbox.num_waiting == 1
    assert due_at == ([(3, "m3")], outbox.due_at), "an old one is no sign of life"


def test_what_was_never_sent_cannot_be_acknowledged() -> None:
    outbox = _outbox(3)
    assert not outbox.acknowledge(4)
    assert outbox.num_waiting == 3


def test_much_is_sent_again_in_bursts_each_after_the_one_before_has_arrived() -> None:
    outbox = _outbox(2 * MAX_BURST + 1)
    now = FIRST_TIMEOUT_S
    assert [number for number, _ in outbox.take_due(now)] == list(range(1, MAX_BURST + 1))
    assert outbox.take_due(now) == []
    assert outbox.acknowledge(MAX_BURST)
    assert outbox.due_at <= now, "what waits behind them is overdue already"
    assert len(outbox.take_due(now)) == MAX_BURST
    assert outbox.acknowledge(2 * MAX_BURST)
    assert len(outbox.take_due(now)) == 1


def test_only_what_fills_a_gap_is_sent_again() -> None:
    outbox = _outbox(7)
    assert outbox.acknowledge(1, held=(3, 5, 6))
    assert outbox.take_due(outbox.due_at) == [(2, "m2"), (4, "m4"), (7, "m7")]
    assert outbox.acknowledge(3, held=(5, 6))
    assert outbox.acknowledge(1, held=(4,)), "an older one tells nothing new"
    assert outbox.take_due(outbox.due_at) == [(4, "m4"), (7, "m7")]
    assert outbox.acknowledge(3)
    now = outbox.due_at
    assert outbox.take_due(now)[:3] == [(4, "m4"), (5, "m5"), (6, "m6")], "it has let go of them"


def test_nothing_that_is_missing_is_kept_waiting_by_what_is_held() -> None:
    outbox, inbox = _outbox(MAX_EARLY), Inbox[str](1)
    for number in range(2, MAX_EARLY + 1):
        assert inbox.take(number, f"m{number}", 0.0) == []
    number, held = inbox.acknowledgement()
    assert (number, held) == (0, tuple(range(2, MAX_BURST + 2)))
    assert outbox.acknowledge(number, held)
    due = outbox.take_due(outbox.due_at)
    assert due[0] == (1, "m1")
    assert due[1][0] == MAX_BURST + 2, "of which the sender was not told"


def test_a_silent_receiver_is_sent_less_and_less() -> None:
    outbox, counts = _outbox(MAX_BURST), []
    for _ in range(8):
        counts.append(len(outbox.take_due(outbox.due_at)))
    assert counts == [64, 32, 16, 8, 4, 2, 1, 1]


def test_what_was_sent_just_now_is_not_sent_again_with_the_rest() -> None:
    outbox = _outbox(1)
    outbox.add("later", FIRST_TIMEOUT_S / 2)
    assert outbox.take_due(FIRST_TIMEOUT_S) == [(1, "m1")]


def test_a_receiver_that_is_silent_for_half_a_minute_is_hopeless() -> None:
    outbox, now = _outbox(1), 0.0
    for _ in range(MAX_TIMEOUTS):
        now = outbox.due_at
        outbox.take_due(now)
        assert not outbox.is_hopeless
    assert 25.0 < now < 35.0
    outbox.take_due(outbox.due_at)
    assert outbox.is_hopeless
    assert outbox.acknowledge(1)
    assert not outbox.is_hopeless


def test_a_pause_of_the_sender_is_not_held_against_the_receiver() -> None:
    outbox = _outbox(1)
    assert outbox.take_due(1_000.0) == [(1, "m1")]
    assert not outbox.is_hopeless
    assert outbox.due_at == 1_000.0 + 2 * FIRST_TIMEOUT_S


def test_no_more_than_so_much_is_kept() -> None:
    outbox = _outbox(MAX_WAITING)
    assert not outbox.is_hopeless
    outbox.add("one more", 0.0)
    assert outbox.is_hopeless


# -- the receiver's end ----------------------------------------------------------------------------


def test_what_comes_early_waits_for_what_is_missing() -> None:
    inbox = Inbox[str](1)
    assert inbox.take(2, "b", 0.0) == []
    assert inbox.acknowledgement() == (0, (2,)), "nothing has come without a gap"
    assert inbox.take(4, "d", 0.0) == []
    assert inbox.take(1, "a", 0.0) == ["a", "b"]
    assert inbox.acknowledgement() == (2, (4,))
    assert inbox.take(3, "c", 0.0) == ["c", "d"]
    assert inbox.acknowledgement() == (4, ())


def test_what_comes_again_is_dropped_and_acknowledged_again() -> None:
    inbox = Inbox[str](1)
    inbox.take(1, "a", 0.0)
    inbox.take(3, "c", 0.0)
    inbox.acknowledgement()
    assert inbox.due_at == math.inf
    assert inbox.take(1, "a", 5.0) is None
    assert inbox.due_at == 5.0 + ACK_DELAY_S
    assert inbox.take(3, "c", 5.0) is None
    assert inbox.acknowledgement() == (1, (3,))


def test_what_is_too_far_ahead_is_not_kept() -> None:
    inbox = Inbox[str](1)
    assert inbox.take(MAX_EARLY + 1, "far", 0.0) is None
    assert inbox.take(MAX_EARLY, "near", 0.0) == []
    for number in range(1, MAX_EARLY - 1):
        assert inbox.take(number, "m", 0.0) == ["m"]
    assert inbox.take(MAX_EARLY - 1, "last", 0.0) == ["last", "near"]
    assert inbox.take(MAX_EARLY + 1, "far", 0.0) == ["far"]


def test_acknowledgements_wait_for_a_while_but_not_for_many_frames() -> None:
    inbox = Inbox[str](1)
    for number in range(1, MAX_OWED):
        inbox.take(number, "m", 1.0 + 0.0001 * number)
        assert inbox.due_at == 1.0001 + ACK_DELAY_S, "from the first one that is owed"
    inbox.take(MAX_OWED, "m", 1.005)
    assert inbox.due_at <= 1.005


def test_a_sender_that_is_back_is_known_by_what_it_had_delivered() -> None:
    inbox = Inbox[str](1)
    inbox.take(1, "a", 0.0)
    inbox.take(3, "c", 0.0)
    inbox.rest()
    assert inbox.due_at == math.inf
    assert inbox.take(1, "a", 0.0) is None
    assert inbox.take(2, "b", 0.0) == ["b"], "the third one is for its sender to say again"
    assert inbox.take(3, "c", 0.0) == ["c"]
