"""The life of a request, between the HTTP side and the pools. One thread, the event loop's.

1. ``submit`` opens the record, chooses the decode pool and asks it for blocks (``Reserve``).
2. The ``Ticket`` says which prefix is there already: the decode pool computes a short rest itself,
   for a long one a prefill pool is chosen.
3. Tokens are put in order by the record and handed to the caller's :class:`Delivery`.
4. The end: a last token, a stop string or a lost caller (``abort``), a failure, a lost pool. Every
   pool that may hold something is told, unless it ends by itself, and is waited for: the record is
   GONE when all have said ``Released``.
"""

import logging
from collections.abc import Callable

from coordinator.config import CoordinatorConfig
from coordinator.delivery import Delivery, Generation
from coordinator.errors import pool_failure
from coordinator.metrics import Metrics
from coordinator.records import Record, State, Step, as_new_token
from coordinator.registry import Pool, Registry
from coordinator.router import (
    Candidate,
    PrefixMap,
    SessionTable,
    choose_decode,
    choose_prefill,
    computes_here,
)
from protocol.errors import RequestError
from protocol.messages import (
    Abort,
    CacheUpdate,
    Committed,
    ComputeHere,
    FirstToken,
    NewToken,
    Prefill,
    Progress,
    Released,
    RequestFailed,
    Reserve,
    Ticket,
    ToCoordinator,
    Tokens,
    ToRank,
)
from protocol.request import FinishReason
from protocol.timeline import Event

_OfOneRequest = Ticket | Progress | FirstToken | Committed | RequestFailed | Released
FIRST_ATTEMPT = 1
LEAK_AFTER_S = 30.0

_log = logging.getLogger(__name__)


class Service:
    """All requests of the cluster.

    Args:
        config: thresholds and budgets.
        registry: which pools serve.
        send: sends a message to a pool's leader; does not block and does not fail.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        registry: Registry,
        send: Callable[[str, ToRank], None],
        clock: Callable[[], float],
    ) -> None:
        self.metrics = Metrics()
        self._config = config
        self._registry = registry
        self._send = send
        self._clock = clock
        self._records: dict[str, Record] = {}
        self._deliveries: dict[str, tuple[Delivery, int]] = {}
        self._sessions = SessionTable(config.session_ttl_s)
        self._prefixes = PrefixMap()
        self._refusal: RequestError | None = None

    # -- for the HTTP side -------------------------------------------------------------------------

    def submit(
        self, generation: Generation, delivery: Delivery, choice: int, arrived: float
    ) -> Record:
        """Start one sequence, whose tokens will be put into ``delivery`` under ``choice``.

        Raises:
            RequestError: no pool serves, too much is going on, or the cluster ends.
        """
        self._check_admission()
        now = self._clock()
        candidates = [
            self._decode_candidate(p, generation) for p in self._registry.serving("decode")
        ]
        session = generation.session
        home = self._sessions.home(session, now) if session else None
        chosen = choose_decode(candidates, home)
        if chosen is None:
            raise RequestError("no decode pool serves at the moment", code="no_workers", status=503)
        if session:
            self._sessions.settle(session, chosen.pool_id, now)
        record = Record(
            request_id=generation.request_id,
            attempt=FIRST_ATTEMPT,
            prompt_token_ids=generation.prompt_token_ids,
            sampling=generation.sampling,
            tenant=generation.tenant,
            cache_salt=generation.cache_salt,
            block_hashes=generation.block_hashes,
            session=session,
            decode_pool=chosen.pool_id,
            holders={chosen.pool_id},
        )
        record.timeline.mark(Event.ARRIVED, arrived)
        record.timeline.mark(Event.TOKENIZED, now)
        self._records[record.request_id] = record
        self._deliveries[record.request_id] = (delivery, choice)
        record.step(Step.RESERVE)
        self._send(
            chosen.pool_id,
            Reserve(
                record.request_id,
                record.attempt,
                record.prompt_token_ids,
                record.sampling,
                record.cache_salt,
            ),
        )
        return record

    def abort(self, record: Record, *, reason: FinishReason = FinishReason.ABORT) -> None:
        """The caller wants nothing more of it. Idempotent; ``STOP`` is for a stop string."""
        if record.is_active:
            record.finish_reason = reason
            self._end(record, tell_pools=True)

    def shut_down(self) -> None:
        """Fail what is running and refuse everything from now on."""
        self._refusal = RequestError(
            "the server is shutting down", code="shutting_down", status=503
        )
        for record in list(self._records.values()):
            self._fail(record, self._refusal)

    @property
    def num_active(self) -> int:
        return sum(record.is_active for record in self._records.values())

    def num_leaked(self, now: float) -> int:
        """Ended requests for which a pool still holds blocks, long after it should not."""
        return sum(
            not record.is_active and now - record.ended_at > LEAK_AFTER_S
            for record in self._records.values()
        )

    # -- for the control plane ---------------------------------------------------------------------

    def on_message(self, pool_id: str, message: ToCoordinator) -> None:
        """A leader says something about a request. Of unknown or ended ones nothing is expected."""
        if isinstance(message, Tokens):
            for token in message.tokens:
                self._on_token(pool_id, token)
        elif isinstance(message, CacheUpdate):
            self._prefixes.update(pool_id, message.stored, message.evicted)
        elif isinstance(message, _OfOneRequest):
            self._on_request_message(pool_id, message)

    def _on_request_message(self, pool_id: str, message: _OfOneRequest) -> None:
        record = self._find(message.request_id, message.attempt)
        if record is None:
            return
        if isinstance(message, Released):
            self._on_released(record, pool_id)
        elif not record.is_active:
            return
        elif isinstance(message, RequestFailed):
            _log.warning("%s failed on %s: %s", record.request_id, pool_id, message.message)
            self._fail(record, pool_failure(message.code, message.message))
        elif pool_id == record.decode_pool:
            self._on_decode(record, message)
        elif pool_id == record.prefill_pool:
            self._on_prefill(record, message)

    def on_pool_lost(self, pool_id: str) -> None:
        """What the pool held is gone, and so are the requests that needed it."""
        self._prefixes.forget_pool(pool_id)
        self._sessions.forget_pool(pool_id)
        for record in list(self._records.values()):
            if pool_id not in (record.decode_pool, record.prefill_pool):
                continue
            record.holders.discard(pool_id)
            is_needed = pool_id == record.decode_pool or record.state is State.PREFILLING
            if record.is_active and is_needed:
                self._fail(
                    record,
                    RequestError(f"{pool_id} was lost while it served this request",
                                 code="worker_lost", status=503),
                )  # fmt: skip
            self._forget_if_released(record)

    def sweep(self, now: float) -> None:
        """Once a second: tell the pools that still hold what has ended by itself."""
        for record in self._records.values():
            if not record.is_active and now - record.ended_at > self._config.release_grace_s:
                self._tell_pools(record)

    # -- placement ---------------------------------------------------------------------------------

    def _check_admission(self) -> None:
        if self._refusal is not None:
            raise self._refusal
        if len(self._records) >= self._config.limits.max_requests:
            raise RequestError("too many requests are waiting", code="overloaded", status=503)

    def _cached_tokens(self, pool: Pool, hashes: tuple[bytes, ...]) -> int:
        return self._prefixes.num_cached_blocks(pool.pool_id, hashes) * self._config.block_size

    def _decode_candidate(self, pool: Pool, generation: Generation) -> Candidate:
        pending = sum(
            record.pending_decode_tokens
            + (0 if record.prefill_pool else record.pending_prefill_tokens)
            for record in self._records.values()
            if record.decode_pool == pool.pool_id
        )
        cached = self._cached_tokens(pool, generation.block_hashes)
        return Candidate(pool.pool_id, cached, pending, pool.tokens_per_s)

    def _prefill_candidates(self, record: Record) -> list[Candidate]:
        target = self._registry.pools[record.decode_pool]
        return [
            Candidate(
                pool.pool_id,
                self._cached_tokens(pool, record.block_hashes),
                sum(
                    other.pending_prefill_tokens
                    for other in self._records.values()
                    if other.prefill_pool == pool.pool_id
                ),
                pool.tokens_per_s,
            )
            for pool in self._registry.serving("prefill")
            if self._registry.can_hand_over(pool, target)
        ]

    def _place_prefill(self, record: Record, num_cached_tokens: int) -> None:
        threshold = self._config.local_prefill_threshold
        chosen = None
        if not computes_here(record.num_prompt_tokens, num_cached_tokens, threshold):
            chosen = choose_prefill(self._prefill_candidates(record))
        now = self._clock()
        if chosen is None:
            record.step(Step.COMPUTE_HERE)
            record.timeline.mark(Event.PREFILL_SENT, now)
            self._send(record.decode_pool, ComputeHere(record.request_id, record.attempt))
            return
        record.step(Step.SEND_PREFILL)
        record.prefill_pool = chosen.pool_id
        record.holders.add(chosen.pool_id)
        record.timeline.mark(Event.PREFILL_SENT, now)
        self._send(
            chosen.pool_id,
            Prefill(
                record.request_id,
                record.attempt,
                record.prompt_token_ids,
                record.sampling,
                record.decode_pool,
                self._registry.pools[record.decode_pool].epoch,
                num_cached_tokens,
                record.cache_salt,
            ),
        )

    # -- what the pools say ------------------------------------------------------------------------

    def _find(self, request_id: str, attempt: int) -> Record | None:
        record = self._records.get(request_id)
        return record if record is not None and record.attempt == attempt else None

    def _on_decode(self, record: Record, message: ToCoordinator) -> None:
        if isinstance(message, Ticket) and record.state is State.RESERVING:
            record.num_target_cached_tokens = message.num_cached_tokens
            record.timeline.mark(Event.RESERVED, self._clock())
            self._place_prefill(record, message.num_cached_tokens)
        elif isinstance(message, Committed) and record.state is State.PREFILLING:
            record.step(Step.COMMIT)
            record.stats = message.stats
            record.timeline.mark(Event.COMMITTED, self._clock())

    def _on_prefill(self, record: Record, message: ToCoordinator) -> None:
        if isinstance(message, Progress):
            record.num_prefilled_tokens = max(record.num_prefilled_tokens, message.num_done)
        elif isinstance(message, FirstToken) and record.path is None:
            record.path = message.path
            record.num_prefilled_tokens = record.num_prompt_tokens
            self._take_token(record, as_new_token(message))

    def _on_token(self, pool_id: str, token: NewToken) -> None:
        record = self._find(token.request_id, token.attempt)
        if record is not None and record.is_active and pool_id == record.decode_pool:
            record.timeline.mark(Event.FIRST_DECODE, self._clock())
            self._take_token(record, token)

    def _take_token(self, record: Record, token: NewToken) -> None:
        record.step(Step.TOKEN)
        ready = record.accept(token)
        if not ready:
            return
        now = self._clock()
        record.timeline.mark(Event.FIRST_TOKEN, now)
        self.metrics.num_output_tokens += len(ready)
        delivery, choice = self._deliveries[record.request_id]
        delivery.put(choice, ready)
        if record.finish_reason is not None:
            self._end(record, tell_pools=False)

    def _on_released(self, record: Record, pool_id: str) -> None:
        record.holders.discard(pool_id)
        self._forget_if_released(record)

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
        record.step(Step.END)
        record.ended_at = self._clock()
        record.timeline.mark(Event.FINISHED, record.ended_at)
        record.forget_prompt()
        self._deliveries.pop(record.request_id)
        self.metrics.observe(record)
        if tell_pools:
            self._tell_pools(record)
        self._forget_if_released(record)

    def _tell_pools(self, record: Record) -> None:
        for pool_id in record.holders:
            self._send(pool_id, Abort(record.request_id, record.attempt))

    def _forget_if_released(self, record: Record) -> None:
        if record.state is State.ENDING and not record.holders:
            record.step(Step.ALL_RELEASED)
            record.timeline.mark(Event.RELEASED, self._clock())
            del self._records[record.request_id]
