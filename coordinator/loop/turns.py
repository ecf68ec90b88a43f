"""Who goes on in which pass of the event loop, when thousands could.

A pass of the loop runs all that is ready. A thousand requests that arrive together, or the tokens
of a thousand streams, would all be ready in one pass, and nobody else would run before they had.
Here they wait in lanes, first come, first served; each pass takes what there is time for, from the
lanes in turn, so that new requests and those being answered share the loop evenly. What is not of
these kinds (health, heartbeats, the pools' messages) has no lane and runs in every pass.
"""

import asyncio
import enum
import time
from collections import deque
from collections.abc import Callable

URGENT_PATHS = frozenset({"/health", "/ready", "/metrics"})
TURN_S = 0.003  # of a pass


class Lane(enum.Enum):
    NEW = "new"  # what brings requests in, up to the pools
    ANSWERS = "answers"  # what takes tokens out to callers


class Turns:
    """The lanes of the running event loop.

    Args:
        turn_s: of a pass, after which whoever comes waits for the next one.
        clock: monotonic seconds.
    """

    def __init__(self, turn_s: float = TURN_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._loop = asyncio.get_running_loop()
        self._turn_s = turn_s
        self._clock = clock
        self._lanes: dict[Lane, deque[Callable[[], bool]]] = {lane: deque() for lane in Lane}
        self._next = Lane.NEW
        self._until = 0.0  # of this pass's time
        self._is_in_pass = False

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._lanes.values()))

    def call(self, lane: Lane, work: Callable[[], None]) -> None:
        """Do ``work``: now, if there is time in this pass and nobody waits; else in a later one."""
        if not self.num_waiting and self._has_time():
            work()
        else:
            self._wait(lane, lambda: _done(work))

    async def take(self, lane: Lane) -> None:
        """Return when it is the caller's turn."""
        if not self.num_waiting and self._has_time():
            return
        turn: asyncio.Future[None] = self._loop.create_future()
        self._wait(lane, lambda: _begun(turn))
        await turn

    def _wait(self, lane: Lane, start: Callable[[], bool]) -> None:
        self._lanes[lane].append(start)
        self._see_to_next_pass()

    def _has_time(self) -> bool:
        if not self._is_in_pass:
            self._until = self._clock() + self._turn_s
            self._see_to_next_pass()
            return True
        return self._clock() < self._until

    def _see_to_next_pass(self) -> None:
        if not self._is_in_pass:
            self._is_in_pass = True
            self._loop.call_soon(self._pass)

    def _pass(self) -> None:
        """Runs once in each pass, while there is anything to do."""
        self._is_in_pass = False
        if not self.num_waiting:
            return
        self._see_to_next_pass()
        self._until = self._clock() + self._turn_s
        while self.num_waiting:
            if self._start_one():
                self._until = 0.0  # a task: how long it takes shows in the next pass
            if self._clock() >= self._until:
                break

    def _start_one(self) -> bool:
        """Start the first of the next lane; whether it is a task that goes on by itself."""
        lanes = list(Lane)
        for _ in lanes:
            lane = self._lanes[self._next]
            self._next = lanes[(lanes.index(self._next) + 1) % len(lanes)]
            if lane:
                return lane.popleft()()
        return False


def _done(work: Callable[[], None]) -> bool:
    work()
    return False


def _begun(turn: asyncio.Future[None]) -> bool:
    if turn.done():  # who waited has been cancelled
        return False
    turn.set_result(None)
    return True
