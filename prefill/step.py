"""Which requests a step serves: who goes first, and how much fits into one step. Pure.

The oldest unfinished request is served in one of any two consecutive steps; in the other, those
that one chunk finishes go before it. So a long prompt is overtaken only between its chunks, and
never starves. What has a lower priority is served with the time that is left. A step takes in more
work as long as it does not become longer than its longest item or its target, whichever is more.
"""

from collections.abc import Container, Sequence

from prefill.backlog import NUM_LOOKED_AT
from prefill.placement import ChunkCosts, RingPlacement
from prefill.request import Request
from prefill.states import RequestState
from protocol.request import RequestKey


def service_order(
    unfinished: Sequence[Request], last_served: Container[RequestKey], chunk_tokens: int
) -> list[Request]:
    """The requests that the next step may serve, the first of them in any case.

    Args:
        unfinished: in order of arrival, as far as they may be of interest (backlog.py).
        last_served: by the step before.
        chunk_tokens: what is left of a quick request at most.
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
    """Those of one priority."""
    head, *others = unfinished
    quick: list[Request] = []
    if head.key in last_served:
        limit = min(chunk_tokens, head.num_left_tokens - 1)
        quick = [request for request in others if request.num_left_tokens <= limit]
    first = {request.key for request in quick}
    return [*quick, *(request for request in unfinished if request.key not in first)]


def load_s(running: Sequence[Request], cp_size: int) -> list[float]:
    """What each cp rank has still to compute for the requests that have begun."""
    loads = [0.0] * cp_size
    for request in running:
        placement = request.placed
        left = request.num_left_tokens / (request.num_tokens - placement.chunks[0].start)
        for rank in placement.ring:
            loads[rank] += placement.total_s * left
    return loads


class StepTime:
    """The predicted time of a step that is being put together."""

    def __init__(self, costs: ChunkCosts, cp_size: int, target_s: float) -> None:
        self._costs = costs
        self._target_s = target_s
        self._finish_s = [0.0] * cp_size
        self._is_empty = True
        self._priority = 0  # of the first item

    @property
    def is_full(self) -> bool:
        """Whether no rank has time left."""
        return not self._is_empty and min(self._finish_s) >= self._limit_s

    def take(self, placement: RingPlacement, chunk_index: int, priority: int) -> bool:
        """Take in a chunk if it fits; the first always does.

        A rank reaches an item when it and all others of the ring are done with what comes before.
        What has a lower priority than the first item only fills ranks that would wait: an answer
        is told when the whole step is done.
        """
        chunk = placement.chunks[chunk_index]
        seconds = self._costs.seconds(len(chunk), chunk.start, len(placement.ring))
        end_s = max(self._finish_s[rank] for rank in placement.ring) + seconds
        if self._is_empty:
            self._priority = priority
        limit_s = self._limit_s if priority <= self._priority else max(self._finish_s)
        if not self._is_empty and end_s > limit_s:
            return False
        self._is_empty = False
        for rank in placement.ring:
            self._finish_s[rank] = end_s
        return True

    @property
    def _limit_s(self) -> float:
        return max(self._target_s, *self._finish_s)
