"""Requests by what they wait for, kept as each of them changes, so that no step looks at all. Pure.

Thousands may wait; those that have begun hold blocks and are at most ``max_num_sequences``. A step
looks at these, and at so many of the waiting as it could serve.
"""

from collections import OrderedDict
from itertools import islice

from prefill.request import Request
from prefill.states import RequestState

NUM_LOOKED_AT = 8  # waiting requests that one step considers
BEGUN = (RequestState.FETCHING, RequestState.RUNNING)

_Line = OrderedDict[int, Request]  # by number of arrival, in that order


class Backlog:
    """What is to be computed.

    Args:
        chunk_tokens: a waiting request that has no more is short, and may overtake others.
    """

    def __init__(self, chunk_tokens: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._waiting: dict[int, tuple[_Line, _Line]] = {}  # by priority: all, and the short ones
        self._begun: _Line = OrderedDict()
        self._waiting_tokens = 0
        self.num_waiting = 0

    @property
    def num_begun(self) -> int:
        return len(self._begun)

    @property
    def begun(self) -> list[Request]:
        """Those that are being fetched or computed."""
        return list(self._begun.values())

    @property
    def num_pending_tokens(self) -> int:
        """That are still to be computed."""
        return self._waiting_tokens + sum(r.num_left_tokens for r in self._begun.values())

    def fetching_since(self, moment: float) -> list[Request]:
        """Those whose fetch began then, or before."""
        fetching = (r for r in self._begun.values() if r.state is RequestState.FETCHING)
        return [request for request in fetching if request.admitted <= moment]

    def add(self, request: Request) -> None:
        """It waits."""
        lines = self._waiting.setdefault(request.priority, (OrderedDict(), OrderedDict()))
        for line in lines if request.num_tokens <= self._chunk_tokens else lines[:1]:
            _put(line, request)
        self.num_waiting += 1
        self._waiting_tokens += request.num_tokens

    def moved(self, request: Request, before: RequestState) -> None:
        """It is in another state than before."""
        if before is RequestState.WAITING:
            self._remove_waiting(request)
        if before in BEGUN and request.state not in BEGUN:
            del self._begun[request.number]
        if request.state is RequestState.WAITING:
            self.add(request)
        if request.state in BEGUN and before not in BEGUN:
            self._begun[request.number] = request

    def candidates(self) -> list[Request]:
        """Whom the next step may serve, in order of arrival.

        Of each priority, until there are enough, the oldest that wait and the oldest short ones: no
        other can be among the first NUM_LOOKED_AT of any order that prefers old to new. Beyond, of
        each priority the oldest, which decides whether those that run may overtake.
        """
        found = {n: r for n, r in self._begun.items() if r.state is RequestState.RUNNING}
        num_found = 0
        for priority in sorted(self._waiting):
            num_wanted = NUM_LOOKED_AT if num_found < NUM_LOOKED_AT else 1
            both = [islice(line.items(), num_wanted) for line in self._waiting[priority]]
            own = {number: request for line in both for number, request in line}
            num_found += len(own)
            found |= own
        return [found[number] for number in sorted(found)]

    def _remove_waiting(self, request: Request) -> None:
        lines = self._waiting[request.priority]
        for line in lines:
            line.pop(request.number, None)
        if not lines[0]:
            del self._waiting[request.priority]
        self.num_waiting -= 1
        self._waiting_tokens -= request.num_tokens


def _put(line: _Line, request: Request) -> None:
    """At its place: behind all others, unless its fetch has failed, after which it waits again."""
    is_last = not line or next(reversed(line)) < request.number
    line[request.number] = request
    if not is_last:
        for number in sorted(line):
            line.move_to_end(number)
