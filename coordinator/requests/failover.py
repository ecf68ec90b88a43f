"""Attempts that were lost, and when the next one starts. Pure; time comes as an argument.

::

    an attempt is lost --> WAITING --------------- due, and a pool is there -------> next attempt
                             '-- no pool within failover_wait_s, or the last attempt --> the error

A waiting request is due at once, but for three reasons:

1. Its decode pool is still closing the last attempt: what has arrived there in full will be found
   by the next one. Not for longer than ``resume_wait_s``.
2. No other prefill pool is there than the one with which a hand-off broke: a moment, in which the
   pool may turn out to be lost.
3. It may be what has killed a pool: it runs while no other such request does, so that the next
   death tells. Only for those of which nothing is known yet, and not for longer than
   ``SUSPECT_WAIT_S``.
"""

from collections.abc import Callable, Iterable, Iterator

from coordinator.config import CoordinatorConfig
from coordinator.records.attempts import Wait
from coordinator.records.records import Record, RecordState
from coordinator.requests.quarantine import Quarantine
from protocol.errors import RequestError

PAUSE_S = 1.0
SUSPECT_WAIT_S = 10.0
NUM_TOKENS_TO_CLEAR = 8  # past the point of a death; a pool may have been some tokens ahead of us

# What a pool may say of an attempt that another one can heal.
HEALED_BY_ANOTHER = frozenset({"handoff_failed", "stale_target"})
TOO_SMALL = "kv_capacity_exceeded"


class Failover:
    """The requests that are WAITING, and those that are suspected.

    Args:
        config: budgets.
        start: begins the next attempt; False when no pool can take it.
        fail: ends a request with an error.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        start: Callable[[Record], bool],
        fail: Callable[[Record, RequestError], None],
        clock: Callable[[], float],
    ) -> None:
        self.quarantine = Quarantine(config.poison_deaths, config.quarantine_s)
        self._config = config
        self._start = start
        self._fail = fail
        self._clock = clock
        self._waiting: dict[str, Record] = {}  # in order of their losses
        self._suspects: dict[str, Record] = {}
        self._at_large: set[str] = set()  # suspects that are not WAITING

    def lose(
        self, record: Record, error: RequestError, *, home: str = "", pause: bool = False
    ) -> None:
        """An attempt cannot go on: prepare the next one, or end the request.

        Args:
            error: why; its code names the reason.
            home: a pool that still has something of it.
            pause: there is nobody else to ask.
        """
        now = self._clock()
        if record.attempt >= self._config.max_attempts:
            self._fail(record, error)
            return
        closing = (home, record.attempt) if home else None
        record.lose_attempt(error.code)
        record.wait = Wait(
            since=now,
            until=now + self._config.failover_wait_s,
            error=error,
            not_before=now + PAUSE_S if pause else now,
            home=home,
            closing=closing,
        )
        self._waiting[record.request_id] = record
        self._at_large.discard(record.request_id)

    def forget(self, record: Record) -> None:
        """It has ended, however."""
        self._waiting.pop(record.request_id, None)
        self._suspects.pop(record.request_id, None)
        self._at_large.discard(record.request_id)

    def go_on(self) -> Iterator[None]:
        """Start what is due; end what has waited for too long. A step for each that waits."""
        for record in list(self._waiting.values()):
            self.go_on_with(record)
            yield

    def go_on_with(self, record: Record) -> None:
        """The same for one of them, if it still waits."""
        wait = record.wait
        if wait is None or record.state is not RecordState.WAITING:
            return
        now = self._clock()
        if self._is_due(record, wait, now) and self._start(record):
            record.wait = None
            del self._waiting[record.request_id]
            if record.request_id in self._suspects:
                self._at_large.add(record.request_id)
        elif now >= wait.until:
            self._fail(record, wait.error)

    def go_on_with_suspects(self) -> Iterator[None]:
        """The same for those that may have waited for another suspect."""
        for record in list(self._suspects.values()):
            self.go_on_with(record)
            yield

    def _is_due(self, record: Record, wait: Wait, now: float) -> bool:
        if now < wait.not_before:
            return False
        if wait.closing in record.holders and now - wait.since < self._config.resume_wait_s:
            return False
        return not (
            record.runs_alone and now - wait.since < SUSPECT_WAIT_S and bool(self._at_large)
        )

    # -- who was it? -------------------------------------------------------------------------------

    def on_death(self, on_board: Iterable[Record]) -> bytes | None:
        """A pool has died while it computed these; the fingerprint that is quarantined for it."""
        now, records = self._clock(), list(on_board)
        guilty = self.quarantine.on_death([record.fingerprint for record in records], now)
        for record in records:
            record.suspected_at = record.num_output_tokens
            # Who had got a token out of the pool is less likely to have killed it than who had not.
            is_unknown = record.num_output_tokens == record.num_replayed_tokens
            record.runs_alone = is_unknown or self.quarantine.is_doubtful(record.fingerprint, now)
            self._suspects[record.request_id] = record
            self._at_large.add(record.request_id)
        return guilty

    def on_tokens(self, record: Record) -> bool:
        """It has got further: past the point of a death it is cleared; whether it was now."""
        if record.suspected_at is None:
            return False
        if record.num_output_tokens < record.suspected_at + NUM_TOKENS_TO_CLEAR:
            return False
        self.clear(record)
        return True

    def clear(self, record: Record) -> None:
        """It was not the cause of any death."""
        record.suspected_at, record.runs_alone = None, False
        self._suspects.pop(record.request_id, None)
        self._at_large.discard(record.request_id)
        self.quarantine.clear(record.fingerprint)
