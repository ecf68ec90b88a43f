"""The requests that are not computed yet, and their order of service. Pure.

Thousands of requests may wait, so no step looks at all of them: they are kept in queues, and moved
as each of them changes. Those that have begun hold blocks, and are at most ``max_num_sequences``. A
step looks at these, and at as many of the waiting as it could serve.

The oldest unfinished request is served in one of any two consecutive steps; in the other, requests
that one chunk finishes go before it. So a long prompt is overtaken only between its chunks, and
never starves. A lower priority is served with the time that is left.
"""

from collections import OrderedDict
from collections.abc import Container, Sequence
from itertools import islice

from prefill.request import Request
from prefill.states import RequestState
from protocol.request import RequestKey

NUM_LOOKED_AT = 8  # waiting requests that one step considers
BEGUN = (RequestState.FETCHING, RequestState.RUNNING)

_Queue = OrderedDict[int, Request]  # by number of arrival, in that order


class Backlog:
    """The requests of a pool that are not computed yet.

    Args:
        chunk_tokens: a waiting request with no more tokens is short, and may overtake others.
    """

    def __init__(self, chunk_tokens: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._waiting: dict[int, tuple[_Queue, _Queue]] = {}  # by priority: all, and the short ones
        self._begun: _Queue = OrderedDict()
        self._waiting_tokens = 0
        self.num_waiting = 0

    @property
    def num_begun(self) -> int:
        """Requests that are being fetched or computed."""
        return len(self._begun)

    @property
    def begun(self) -> list[Request]:
        """The requests that are being fetched or computed."""
        return list(self._begun.values())

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that are still to be computed."""
        return self._waiting_tokens + sum(r.num_left_tokens for r in self._begun.values())

    def fetching_since(self, moment: float) -> list[Request]:
        """The requests whose fetch began at ``moment`` or before."""
        fetching = (r for r in self._begun.values() if r.state is RequestState.FETCHING)
        return [request for request in fetching if request.admitted <= moment]

    def add(self, request: Request) -> None:
        """Take in a request that waits."""
        queues = self._waiting.setdefault(request.priority, (OrderedDict(), OrderedDict()))
        is_short = request.num_tokens <= self._chunk_tokens
        for queue in queues if is_short else queues[:1]:
            _put(queue, request)
        self.num_waiting += 1
        self._waiting_tokens += request.num_tokens

    def moved(self, request: Request, before: RequestState) -> None:
        """Take note that a request was in state ``before`` until now."""
        if before is RequestState.WAITING:
            self._remove_waiting(request)
        if before in BEGUN and request.state not in BEGUN:
            del self._begun[request.number]
        if request.state is RequestState.WAITING:
            self.add(request)
        if request.state in BEGUN and before not in BEGUN:
            self._begun[request.number] = request

    def candidates(self) -> list[Request]:
        """The requests that the next step may serve, in the order of arrival.

        Of each priority, until there are enough, the oldest that wait and the oldest short ones: no
        other can be among the first NUM_LOOKED_AT of any order that prefers old to new. Beyond, of
        each priority the oldest, which decides whether those that run may overtake.
        """
        found = {n: r for n, r in self._begun.items() if r.state is RequestState.RUNNING}
        num_found = 0
        for priority in sorted(self._waiting):
            num_wanted = NUM_LOOKED_AT if num_found < NUM_LOOKED_AT else 1
            both = [islice(queue.items(), num_wanted) for queue in self._waiting[priority]]
            own = {number: request for queue in both for number, request in queue}
            num_found += len(own)
            found |= own
        return [found[number] for number in sorted(found)]

    def _remove_waiting(self, request: Request) -> None:
        queues = self._waiting[request.priority]
        for queue in queues:
            queue.pop(request.number, None)
        if not queues[0]:
            del self._waiting[request.priority]
        self.num_waiting -= 1
        self._waiting_tokens -= request.num_tokens


def _put(queue: _Queue, request: Request) -> None:
    """Put a request at its place in the order of arrival."""
    is_last = not queue or next(reversed(queue)) < request.number
    queue[request.number] = request
    # A request comes back to the middle only after its fetch has failed, so sorting is rare.
    if not is_last:
        for number in sorted(queue):
            queue.move_to_end(number)


# -- the order of service --------------------------------------------------------------------------


def service_order(
    unfinished: Sequence[Request], last_served: Container[RequestKey], chunk_tokens: int
) -> list[Request]:
    """The requests that the next step may serve; the first of them is served in any case.

    Args:
        unfinished: in order of arrival, as ``Backlog.candidates`` gives them.
        last_served: by the step before.
        chunk_tokens: a request with no more tokens left is quick.
    """
    if not unfinished:
        return []
    order = [
        request
        for priority in sorted({request.priority for request in unfinished})
        for request in _in_order(
            [request for request in unfinished if request.priority == priority],
            last_served,
            chunk_tokens,
        )
    ]
    waiting = [request.key for request in order if request.state is RequestState.WAITING]
    passed_over = set(waiting[NUM_LOOKED_AT:])
    return [request for request in order if request.key not in passed_over]


def _in_order(
    unfinished: Sequence[Request], last_served: Container[RequestKey], chunk_tokens: int
) -> list[Request]:
    """Requests of one priority: in the order of arrival, or the quick ones first."""
    head, *others = unfinished
    quick: list[Request] = []
    if head.key in last_served:
        limit = min(chunk_tokens, head.num_left_tokens - 1)
        quick = [request for request in others if request.num_left_tokens <= limit]
    first = {request.key for request in quick}
    return [*quick, *(request for request in unfinished if request.key not in first)]
