"""The life of a request, between the HTTP side and the pools. One thread, the event loop's.

1. ``submit`` opens the record, chooses the decode pool and asks it for blocks (``Reserve``).
2. The ``Ticket`` says which prefix is there already: the decode pool computes a short rest itself,
   for a long one a prefill pool is chosen.
3. Tokens are put in order by the record and handed to the caller's :class:`Delivery`.
4. A lost pool, a broken hand-off or a message that never came cost an *attempt*, not the request:
   the next one (failover.py) starts with the tokens that the caller has. What comes late of an
   earlier attempt is dropped here, by its number.
5. The end: a last token, a stop string or a lost caller (``abort``), a failure that no other pool
   could heal. Every pool that may hold something, of whatever attempt, is told, unless it ends by
   itself, and is waited for: the record is GONE when all have said ``Released``.
"""

import logging
from collections.abc import Callable, Iterator

from coordinator.cluster.placement import Placement, computed_by, needs
from coordinator.cluster.registry import Registry
from coordinator.config import CoordinatorConfig
from coordinator.errors import no_workers, quarantined
from coordinator.loop.slices import at_once
from coordinator.records.generation import Generation
from coordinator.records.loads import Loads
from coordinator.records.records import Record, RecordEvent, RecordState, as_new_token
from coordinator.requests.admission import Admission
from coordinator.requests.delivery import Delivery, StoreListener
from coordinator.requests.draining import shutting_down
from coordinator.requests.failover import Failover
from coordinator.requests.holding import Holding
from coordinator.requests.judging import Judge
from coordinator.requests.metrics import Metrics
from coordinator.requests.overdue import overdue, pools_to_ask
from coordinator.requests.quarantine import fingerprint
from coordinator.requests.rush import Rush
from protocol.errors import RequestError
from protocol.messages import (
    Ask,
    CacheUpdate,
    Committed,
    ComputeHere,
    FirstToken,
    NewToken,
    Progress,
    Released,
    RequestFailed,
    Stored,
    Ticket,
    ToCoordinator,
    Tokens,
    ToRank,
)
from protocol.request import FinishReason
from protocol.timeline import TimelineEvent

_OfOneRequest = Ticket | Progress | FirstToken | Committed | Stored | RequestFailed | Released

_log = logging.getLogger(__name__)


class Service:
    """All requests of the cluster.

    Args:
        config: thresholds and budgets.
        registry: which pools serve.
        send: sends a message to a pool's leader; does not block and does not fail.
        clock: monotonic seconds, of the time lines.
        spread: runs what walks over all requests, in slices or at once.
        observed: the clock without the loop's stalls, of all budgets.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        registry: Registry,
        send: Callable[[str, ToRank], None],
        clock: Callable[[], float],
        spread: Callable[[Iterator[None]], None] = at_once,
        observed: Callable[[], float] | None = None,
    ) -> None:
        self.metrics = Metrics()
        self.listener: StoreListener | None = None
        self.rush = Rush()  # of requests for which somebody waits
        self._config = config
        self._send = send
        self._clock = clock
        self._observed = observed or clock
        self._spread = spread
        self.loads = Loads()  # of all records
        self.admission = Admission(config.limits, lambda: len(config.api_keys))
        self.holding = Holding(send, clock, self.admission.ended)
        self._records = self.holding.records
        self._is_sweeping = False
        self._deliveries: dict[str, tuple[Delivery, int]] = {}
        self.placement = self._placement = Placement(config, registry)
        self._failover = Failover(config, self._start, self._fail, self._observed)
        self._judge = Judge(config, self.placement)

    # -- for the HTTP side -------------------------------------------------------------------------

    def check_room(self, tenant: str, num: int) -> None:
        """Whether so many sequences can be submitted now, before the first of them is.

        Raises:
            RequestError: as ``submit``.
        """
        held = (self.loads.num_held(tenant), len(self._records))
        self.admission.check(tenant, num, held, self._clock())

    def submit(
        self, generation: Generation, delivery: Delivery, choice: int, arrived: float
    ) -> Record:
        """Start one sequence, whose tokens will be put into ``delivery`` under ``choice``.

        Raises:
            RequestError: no pool serves, too much is going on, the request has killed pools before,
                or the cluster ends.
        """
        self.check_room(generation.tenant, 1)
        now = self._clock()
        if generation.priority == 0:
            self.rush.arrived(now)
        prompt, hashes = generation.prompt_token_ids, generation.block_hashes
        print_ = fingerprint(prompt, hashes, self._config.block_size, generation.sampling)
        if self._failover.quarantine.is_refused(print_, self._observed()):
            raise quarantined()
        record = Record.of(generation, print_, self.loads)
        record.timeline.mark(TimelineEvent.ARRIVED, arrived)
        record.timeline.mark(TimelineEvent.TOKENIZED, now)
        if not self._start(record):
            raise no_workers("decode")
        self._records[record.request_id] = record
        self._deliveries[record.request_id] = (delivery, choice)
        return record

    def abort(self, record: Record, *, reason: FinishReason = FinishReason.ABORT) -> None:
        """The caller wants nothing more of it. Idempotent; ``STOP`` is for a stop string."""
        if record.is_active:
            record.finish_reason = reason
            self._end(record, tell_pools=True)

    def shut_down(self) -> None:
        """Fail what is running and refuse everything from now on."""
        error = shutting_down()
        self.admission.close(error)
        self._spread(self._fail_all(error))

    def _fail_all(self, error: RequestError) -> Iterator[None]:
        for record in list(self._records.values()):
            self._fail(record, error)
            yield

    @property
    def num_leaked(self) -> int:
        """Ended requests for which a pool still holds blocks, long after it should not."""
        return self.holding.num_leaked(self._observed())

    # -- for the control plane ---------------------------------------------------------------------

    def on_message(self, pool_id: str, message: ToCoordinator) -> None:
        """A leader says something about a request. Of unknown or ended ones nothing is expected."""
        if isinstance(message, Tokens):
            for token in message.tokens:
                self._on_token(pool_id, token)
        elif isinstance(message, CacheUpdate):
            self._placement.on_cache_update(pool_id, message)
        elif isinstance(message, _OfOneRequest):
            self._on_request_message(pool_id, message)

    def _on_request_message(self, pool_id: str, message: _OfOneRequest) -> None:
        if isinstance(message, Released):
            self._on_released(pool_id, message)
            return
        record = self._find(message.request_id, message.attempt)
        if record is None and self.listener is not None:
            self.listener.on_store_message(message)
        if record is None or not record.is_active:
            return
        record.heard_at = self._observed()
        if isinstance(message, RequestFailed):
            self._on_failed(record, pool_id, message)
        elif pool_id == record.decode_pool:
            self._on_decode(record, message)
        elif pool_id == record.prefill_pool:
            self._on_prefill(record, message)

    def on_pool_lost(self, pool_id: str) -> None:
        """What the pool held is gone; who needed it needs another attempt."""
        self._placement.forget_pool(pool_id)
        self._judge.flaws.forget_pool(pool_id)
        if self.listener is not None:
            self.listener.on_pool_lost(pool_id)
        active = [record for record in self._records.values() if record.is_active]
        guilty = self._failover.on_death(r for r in active if computed_by(r, pool_id))
        everybody = [
            (record, record.attempt, record.is_active and needs(record, pool_id))
            for record in self._records.values()
        ]
        self._spread(self._leave_pool(pool_id, everybody, guilty))

    def _leave_pool(
        self, pool_id: str, everybody: list[tuple[Record, int, bool]], guilty: bytes | None
    ) -> Iterator[None]:
        """A step for each request that was here when the pool was lost, with its attempt then.

        The pool may be back, and work on a later attempt, before all have had their step.
        """
        for record, attempt, is_affected in everybody:
            self.holding.lose_pool(record, pool_id, attempt)
            if is_affected and record.is_active and record.attempt == attempt:
                self._lose_pool(record, pool_id, is_guilty=record.fingerprint == guilty)
            yield
        yield from self._failover.go_on()

    def _lose_pool(self, record: Record, pool_id: str, *, is_guilty: bool) -> None:
        if is_guilty:
            self.metrics.num_quarantined += 1
            _log.error("%s is quarantined: pools died of it", record.request_id)
            self._fail(record, quarantined())
            return
        error = RequestError(
            f"{pool_id} was lost while it served this request", code="worker_lost", status=503
        )
        self._lose(record, error, home=record.decode_pool if record.decode_pool != pool_id else "")

    def on_pool_serving(self, pool_id: str) -> None:
        """A pool has come, or come back: whoever waits for one may go on."""
        _log.debug("%s serves: %d requests are here", pool_id, len(self._records))
        if self.listener is not None:
            self.listener.on_pool_serving(pool_id)
        self._spread(self._failover.go_on())

    def sweep(self, now: float) -> list[tuple[str, str]]:
        """Once a second: what is overdue, and (pool, reason) of those that are to be lost.

        Pools that hold what is over are told again, pools that are silent about a request are
        asked, what can no longer be expected is tried anew, and who waits goes on.
        """
        if not self._is_sweeping:
            self._spread(self._sweep(now))
        return self._judge.flaws.guilty(now)

    def _sweep(self, now: float) -> Iterator[None]:
        self._is_sweeping = True
        for record in list(self._records.values()):
            self._sweep_one(record, now)
            yield
        self._is_sweeping = False
        yield from self._failover.go_on()

    def _sweep_one(self, record: Record, now: float) -> None:
        if now - record.ended_at > self._config.release_grace_s:
            self.holding.tell_pools(record)
        error = overdue(record, self._config, now, is_cut=self._placement.is_cut(record))
        if error is not None:
            self._lose(record, error, home=record.decode_pool)
        for pool_id in pools_to_ask(record, self._config, now):
            self._send(pool_id, Ask(record.request_id, record.attempt))

    # -- attempts ----------------------------------------------------------------------------------

    def _start(self, record: Record) -> bool:
        """Begin an attempt; False when there is no pool for it."""
        now = self._observed()
        pool_id = self._placement.choose_decode(record, self.loads, now)
        if pool_id is None:
            return False
        record.reserve_on(pool_id, now)
        self._send(pool_id, record.reserve(self._placement.store_hint(record)))
        return True

    def _place_prefill(self, record: Record) -> None:
        pool_id = self._placement.choose_prefill(record, self.loads)
        record.timeline.mark(TimelineEvent.PREFILL_SENT, self._clock())
        if pool_id is None and record.is_offload:
            self._lose(record, no_workers("prefill"), pause=True)
            return
        if pool_id is None:
            record.advance(RecordEvent.COMPUTE_HERE)
            self._send(record.decode_pool, ComputeHere(record.request_id, record.attempt))
            return
        record.prefill_on(pool_id)
        self._send(pool_id, record.prefill(self._placement.epoch(record.decode_pool)))

    def _lose(
        self, record: Record, error: RequestError, *, home: str = "", pause: bool = False
    ) -> None:
        """This attempt is over; the request goes on with another one, if it may."""
        _log.warning("%s/%d: %s", record.request_id, record.attempt, error.message)
        self._failover.lose(record, error, home=home, pause=pause)
        if record.is_active:
            record.ended_at = self._observed()
            record.timeline.mark(TimelineEvent.RETRIED, self._clock())
            self.holding.tell_pools(record)

    def _on_failed(self, record: Record, pool_id: str, message: RequestFailed) -> None:
        """A pool cannot go on with it: another one may, or else it ends."""
        verdict = self._judge.on_failed(record, pool_id, message, record.heard_at)
        if verdict.is_doubtful:
            self.metrics.num_non_finite[pool_id] += 1
            for holder in {record.decode_pool, record.prefill_pool} - {""}:
                self._send(holder, record.doubt())
        if verdict.goes_on:
            self._lose(record, verdict.error, home=verdict.home, pause=verdict.pause)
        else:
            _log.warning("%s failed on %s: %s", record.request_id, pool_id, message.message)
            self._fail(record, verdict.error)
        self._failover.go_on_with(record)
        self._spread(self._failover.go_on_with_suspects())

    # -- what the pools say ------------------------------------------------------------------------

    def _find(self, request_id: str, attempt: int) -> Record | None:
        record = self._records.get(request_id)
        return record if record is not None and record.attempt == attempt else None

    def _on_decode(self, record: Record, message: ToCoordinator) -> None:
        if isinstance(message, Ticket) and record.state is RecordState.RESERVING:
            record.grant(message.num_cached_tokens, message.num_loaded_tokens)
            record.timeline.mark(TimelineEvent.RESERVED, self._clock())
            self._place_prefill(record)
        elif isinstance(message, Ticket) and record.state is RecordState.COMPUTING:
            # It was asked, and is not computing yet: it may not have been told to.
            self._send(record.decode_pool, ComputeHere(record.request_id, record.attempt))
        elif isinstance(message, Committed) and record.state is RecordState.PREFILLING:
            record.advance(RecordEvent.COMMIT)
            record.stats = message.stats
            record.timeline.mark(TimelineEvent.COMMITTED, self._clock())
        elif isinstance(message, Stored):
            record.finish_reason = FinishReason.LENGTH
            delivery, choice = self._deliveries[record.request_id]
            self._end(record, tell_pools=False)
            delivery.put(choice, ())

    def _on_prefill(self, record: Record, message: ToCoordinator) -> None:
        if isinstance(message, Progress):
            record.is_prefill_begun = True
            record.progress(message.num_done)
        elif isinstance(message, FirstToken) and record.path is None:
            record.path = message.path
            record.prefilled_at = self._observed()
            record.progress(record.num_attempt_tokens)
            if not record.is_offload:  # a store needs no answer
                self._take_token(record, as_new_token(message))

    def _on_token(self, pool_id: str, token: NewToken) -> None:
        record = self._find(token.request_id, token.attempt)
        if record is not None and record.is_active and pool_id == record.decode_pool:
            record.heard_at = self._observed()
            record.timeline.mark(TimelineEvent.FIRST_DECODE, self._clock())
            if record.state is RecordState.PREFILLING:
                record.advance(RecordEvent.COMMIT)  # what it told us of that was lost
            self._take_token(record, token)

    def _take_token(self, record: Record, token: NewToken) -> None:
        record.advance(RecordEvent.TOKEN)
        ready = record.accept(token)
        if not ready:
            return
        record.stalled_since = None
        record.timeline.mark(TimelineEvent.FIRST_TOKEN, self._clock())
        delivery, choice = self._deliveries[record.request_id]
        delivery.put(choice, ready)
        if self._failover.on_tokens(record):
            self._spread(self._failover.go_on_with_suspects())
        if record.flawed:
            self._judge.flaws.on_tokens(record, record.heard_at)
        if record.finish_reason is not None:
            self._failover.clear(record)
            self._judge.flaws.on_finished((record.decode_pool, record.prefill_pool))
            self._end(record, tell_pools=False)

    def _on_released(self, pool_id: str, message: Released) -> None:
        record = self._records.get(message.request_id)
        if record is None:
            return
        self.holding.release(record, pool_id, message.attempt)
        self._failover.go_on_with(record)

    # -- the end -----------------------------------------------------------------------------------

    def _fail(self, record: Record, error: RequestError) -> None:
        if not record.is_active:
            return
        record.finish_reason = FinishReason.ERROR
        record.error_code = error.code
        delivery, _ = self._deliveries[record.request_id]
        self._end(record, tell_pools=True)
        delivery.fail(error)

    def _end(self, record: Record, *, tell_pools: bool) -> None:
        record.advance(RecordEvent.END)
        record.ended_at = self._observed()
        record.timeline.mark(TimelineEvent.FINISHED, self._clock())
        record.forget_tokens()
        self._deliveries.pop(record.request_id)
        self._failover.forget(record)
        self.metrics.observe(record)
        self.holding.end(record, tell_pools=tell_pools)
