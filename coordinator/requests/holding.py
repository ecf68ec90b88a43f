"""Every request of which something is kept, here or in a pool, until the last pool let go. Pure."""

from collections.abc import Callable
from itertools import takewhile

from coordinator.request import Request, RequestEvent, RequestState
from protocol.messages import Abort, ToRank
from protocol.timeline import TimelineEvent

LEAK_AFTER_S = 30.0


class Holding:
    """The requests by their ids, and who holds blocks of them.

    Args:
        send: a message to a pool's leader.
        on_gone: told of each request of which nothing is kept any more, and when.
    """

    def __init__(
        self,
        send: Callable[[str, ToRank], None],
        on_gone: Callable[[Request, float], None],
    ) -> None:
        self.requests: dict[str, Request] = {}
        self._send = send
        self._on_gone = on_gone
        self._ending: dict[str, Request] = {}  # of the requests, in the order of their ends

    def num_leaked(self, now: float) -> int:
        """Ended requests for which a pool still holds blocks, long after it should not."""
        ends = (request.ended_at for request in self._ending.values())
        return sum(1 for _ in takewhile(lambda ended_at: now - ended_at > LEAK_AFTER_S, ends))

    def end(self, request: Request, now: float, *, tell_pools: bool) -> None:
        """It has ended: its pools are waited for, and told unless they know."""
        self._ending[request.request_id] = request
        if tell_pools:
            self.tell_pools(request)
        self._forget_if_released(request, now)

    def release(self, request: Request, pool_id: str, attempt: int, now: float) -> None:
        """A pool holds nothing of this attempt any more."""
        request.holders.discard((pool_id, attempt))
        self._forget_if_released(request, now)

    def lose_pool(self, request: Request, pool_id: str, attempt: int, now: float) -> None:
        """A pool that is gone holds nothing of the attempts up to this one."""
        holders = {h for h in request.holders if h[0] != pool_id or h[1] > attempt}
        is_orphaned = holders != request.holders and not request.is_active
        request.holders = holders
        if is_orphaned:  # the others may wait for what the pool was to hand over
            self.tell_pools(request)
        self._forget_if_released(request, now)

    def tell_pools(self, request: Request) -> None:
        """Ask every pool that still holds blocks of a lost attempt, or of an ended request, to
        release them."""
        for pool_id, attempt in sorted(request.holders):
            if attempt < request.attempt or not request.is_active:
                self._send(pool_id, Abort(request.request_id, attempt))

    def _forget_if_released(self, request: Request, now: float) -> None:
        if request.state is RequestState.ENDING and not request.holders:
            request.advance(RequestEvent.ALL_RELEASED)
            request.block_hashes = ()
            request.timeline.mark(TimelineEvent.RELEASED, now)
            del self.requests[request.request_id], self._ending[request.request_id]
            self._on_gone(request, now)
