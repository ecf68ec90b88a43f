"""Every request of which something is kept, here or in a pool, until the last pool let go. Pure."""

from collections.abc import Callable
from itertools import takewhile

from coordinator.records.records import Record, RecordEvent, RecordState
from protocol.messages import Abort, ToRank
from protocol.timeline import TimelineEvent

LEAK_AFTER_S = 30.0


class Holding:
    """The records, by request, and who holds blocks of them.

    Args:
        send: a message to a pool's leader.
        clock: monotonic seconds.
        on_gone: told when nothing is kept of a request any more. ``tell_gone`` is told of which.
    """

    def __init__(
        self,
        send: Callable[[str, ToRank], None],
        clock: Callable[[], float],
        on_gone: Callable[[float], None],
    ) -> None:
        self.records: dict[str, Record] = {}
        self.tell_gone: Callable[[Record], None] = lambda _: None
        self._send = send
        self._clock = clock
        self._on_gone = on_gone
        self._ending: dict[str, Record] = {}  # of the records, in the order of their ends

    def num_leaked(self, now: float) -> int:
        """Ended requests for which a pool still holds blocks, long after it should not."""
        ends = (record.ended_at for record in self._ending.values())
        return sum(1 for _ in takewhile(lambda ended_at: now - ended_at > LEAK_AFTER_S, ends))

    def end(self, record: Record, *, tell_pools: bool) -> None:
        """It has ended: its pools are waited for, and told unless they know."""
        self._ending[record.request_id] = record
        if tell_pools:
            self.tell_pools(record)
        self._forget_if_released(record)

    def release(self, record: Record, pool_id: str, attempt: int) -> None:
        """A pool holds nothing of this attempt any more."""
        record.holders.discard((pool_id, attempt))
        self._forget_if_released(record)

    def lose_pool(self, record: Record, pool_id: str, attempt: int) -> None:
        """A pool that is gone holds nothing of the attempts up to this one."""
        holders = {h for h in record.holders if h[0] != pool_id or h[1] > attempt}
        is_orphaned = holders != record.holders and not record.is_active
        record.holders = holders
        if is_orphaned:  # the others may wait for what the pool was to hand over
            self.tell_pools(record)
        self._forget_if_released(record)

    def tell_pools(self, record: Record) -> None:
        """Whoever holds something of what is over is to let go of it."""
        for pool_id, attempt in record.holders:
            if attempt < record.attempt or not record.is_active:
                self._send(pool_id, Abort(record.request_id, attempt))

    def _forget_if_released(self, record: Record) -> None:
        if record.state is RecordState.ENDING and not record.holders:
            now = self._clock()
            record.advance(RecordEvent.ALL_RELEASED)
            record.timeline.mark(TimelineEvent.RELEASED, now)
            del self.records[record.request_id], self._ending[record.request_id]
            self._on_gone(now)
            self.tell_gone(record)
