"""Messages arrive exactly once and in order, over connections that lose, repeat and reorder. Pure.

The life of a message:

1. The sender's :class:`Outbox` numbers and keeps it. It goes out.
2. The receiver's :class:`Inbox` hands it up when all before it have come, and keeps it until then.
   What comes again is dropped.
3. The inbox owes an acknowledgement of all that has come without a gap. The next message that goes
   the other way carries it; after ``ACK_DELAY_S`` without one it goes alone.
4. The outbox forgets what is acknowledged. What is not is sent again after a timeout, which doubles
   while nothing is acknowledged and starts small again when something is. The receiver
   says what it holds behind a gap, and only what fills it is sent.

The sender gives up a receiver that acknowledges nothing through ``MAX_TIMEOUTS`` timeouts, some
30 s. Timeouts are counted rather than seconds, because time in which this process did not run says
nothing about the other one.
"""

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

FIRST_TIMEOUT_S, MAX_TIMEOUT_S = 0.2, 2.0
MAX_TIMEOUTS = 17  # 0.2 + 0.4 + 0.8 + 1.6 s, and 2 s each from there on: 29 s
MAX_BURST = 64  # messages that are sent again at one time
MAX_WAITING = 10_000  # messages that are not acknowledged
MAX_EARLY = 256  # messages that came before one that is missing
ACK_DELAY_S = 0.02  # far below the first timeout
MAX_OWED = 32  # frames received after which an acknowledgement does not wait for a message

M = TypeVar("M")


@dataclass(slots=True)
class _Sent(Generic[M]):
    number: int
    message: M
    sent_at: float


class Outbox(Generic[M]):
    """The sender's end of a stream."""

    def __init__(self) -> None:
        self._waiting: deque[_Sent[M]] = deque()  # by number, without gaps
        self._num_sent = 0
        self._timeout_s = FIRST_TIMEOUT_S
        self._num_timeouts = 0  # since something was acknowledged
        self._held: Collection[int] = ()  # what the receiver has behind a gap

    @property
    def num_waiting(self) -> int:
        """Messages that are not acknowledged."""
        return len(self._waiting)

    @property
    def is_hopeless(self) -> bool:
        """Whether the receiver has been silent for too long, or has too much to acknowledge."""
        return self._num_timeouts > MAX_TIMEOUTS or len(self._waiting) > MAX_WAITING

    @property
    def due_at(self) -> float:
        """When there is something to be sent again, unless it is acknowledged before."""
        return self._waiting[0].sent_at + self._timeout_s if self._waiting else math.inf

    def add(self, message: M, now: float) -> int:
        """Keep a message that is sent now; its number."""
        self._num_sent += 1
        self._waiting.append(_Sent(self._num_sent, message, now))
        return self._num_sent

    def acknowledge(self, number: int, held: Collection[int] = ()) -> bool:
        """Take note that all up to ``number`` has come, and ``held`` behind a gap.

        Returns:
            False, and nothing is done, if ``number`` was never sent.
        """
        if number > self._num_sent:
            return False
        waiting = self._waiting
        # An old acknowledgement can overtake a newer one: what it holds is out of date.
        if number >= self._num_sent - len(waiting):
            self._held = held
        if waiting and waiting[0].number <= number:
            self._timeout_s = FIRST_TIMEOUT_S
            self._num_timeouts = 0
            while waiting and waiting[0].number <= number:
                waiting.popleft()
        return True

    def take_due(self, now: float) -> list[tuple[int, M]]:
        """What is to be sent again now, oldest first, with its numbers.

        The oldest messages only: when they are acknowledged, the next ones are due at once. While
        nothing is acknowledged it is half as many each time, down to one: a silent peer is not
        flooded, and a link that loses each n-th frame does not lose the same one for ever.
        """
        if now < self.due_at:
            return []
        found = []
        limit = max(1, MAX_BURST >> self._num_timeouts)
        missing = (sent for sent in self._waiting if sent.number not in self._held)
        for sent in islice(missing, limit):
            if now < sent.sent_at + self._timeout_s:
                break
            sent.sent_at = now
            found.append((sent.number, sent.message))
        self._timeout_s = min(2 * self._timeout_s, MAX_TIMEOUT_S)
        self._num_timeouts += 1
        return found


class Inbox(Generic[M]):
    """The receiver's end of the stream with the number ``stream``."""

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self._num_delivered = 0  # all up to this number
        self._early: dict[int, M] = {}  # by number
        self._num_owed = 0  # frames since the last acknowledgement
        self._owed_since = 0.0

    @property
    def due_at(self) -> float:
        """When an acknowledgement is to be sent, unless something carries it before."""
        if not self._num_owed:
            return math.inf
        return self._owed_since + (ACK_DELAY_S if self._num_owed < MAX_OWED else 0.0)

    def take(self, number: int, message: M, now: float) -> list[M] | None:
        """Take in a message.

        Returns:
            The messages that can be delivered now, in order; None if this one came before, or is
            too far ahead to keep. Either way an acknowledgement is owed: the sender may have missed
            the last one.
        """
        if not self._num_owed:
            self._owed_since = now
        self._num_owed += 1
        if number <= self._num_delivered or number in self._early:
            return None
        if number > self._num_delivered + MAX_EARLY:
            return None
        self._early[number] = message
        ready = []
        while self._num_delivered + 1 in self._early:
            self._num_delivered += 1
            ready.append(self._early.pop(self._num_delivered))
        return ready

    def acknowledgement(self) -> tuple[int, tuple[int, ...]]:
        """For a frame that is sent now: up to which number all has been delivered, and the first
        ones that are held behind a gap."""
        self._num_owed = 0
        held = tuple(sorted(self._early)[:MAX_BURST]) if self._early else ()
        return self._num_delivered, held

    def rest(self) -> None:
        """The sender is gone, and may come back: keep only the count by which repeats are known."""
        self._early.clear()
        self._num_owed = 0
