"""The life of every request, between whoever asks and the pools. Pure; time is an argument.

1. ``submit`` takes a request in, chooses its decode pool and asks it for blocks (``Reserve``).
2. The ``Ticket`` says which prefix is there already: the decode pool computes a short rest itself,
   for a long one a prefill pool is chosen.
3. Tokens are put in order by the request and handed to its receiver.
4. A lost pool, a broken hand-off or a message that never came cost an *attempt*, not the request:
   the next one (failover.py) starts with the tokens that the caller has. What comes late of an
   earlier attempt is dropped here, by its number.
5. The end: a last token, a stop string or a lost caller (``abort``), a failure that no other pool
   could heal. Every pool that may hold something, of whatever attempt, is told, unless it ends by
   itself, and is waited for: the request is GONE when all have said ``Released``.

``now`` is in monotonic seconds, the time of the time lines. Budgets for what others do are kept by
``observed(now)``, a clock that stands still while the event loop does.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from coordinator.cluster.placement import Placement, computed_by, needs
from coordinator.cluster.registry import Registry
from coordinator.config import CoordinatorConfig
from coordinator.errors import no_workers, quarantined, shutting_down
from coordinator.request import Loads, Request, RequestEvent, RequestState, as_new_token
from coordinator.requests.admission import Admission, Rush
from coordinator.requests.failover import Failover, overdue, pools_to_ask
from coordinator.requests.holding import Holding
from coordinator.requests.judging import Judge
from coordinator.requests.quarantine import fingerprint
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
from protocol.request import FinishReason, NoToken
from protocol.timeline import TimelineEvent

_OfOneRequest = Ticket | Progress | FirstToken | Committed | Stored | RequestFailed | Released

_log = logging.getLogger(__name__)


def at_once(work: Iterator[None]) -> None:
    """Do all of it now, for drivers without a loop."""
    for _ in work:
        pass


class StoreListener(Protocol):
    """Who keeps documents in a store, and hears of what is no request."""

    def on_store_message(self, message: ToCoordinator) -> None: ...

    def on_pool_lost(self, pool_id: str) -> None: ...

    def on_pool_serving(self, pool_id: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Ports:
    """What whoever drives a service lends it.

    Attributes:
        spread: runs what walks over all requests, in slices or at once.
        observed: the clock of all budgets, from monotonic seconds.
        num_tenants: who share the room at the moment.
        on_ended: told of each request that has ended.
        on_gone: told of each request of which nothing is kept any more.
    """

    spread: Callable[[Iterator[None]], None] = at_once
    observed: Callable[[float], float] = lambda now: now
    num_tenants: Callable[[], int] = lambda: 1
    on_ended: Callable[[Request], None] = lambda _: None
    on_gone: Callable[[Request], None] = lambda _: None


PLAIN = Ports()  # of a driver without a loop


class Service:
    """All requests of the cluster.

    Args:
        config: thresholds and budgets.
        registry: which pools serve.
        send: sends a message to a pool's leader; does not block and does not fail.
        ports: see there.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        registry: Registry,
        send: Callable[[str, ToRank], None],
        ports: Ports,
    ) -> None:
        self.num_quarantined = 0  # requests refused since pools died of them
        self.num_non_finite: Counter[str] = Counter()  # requests, by the pool that failed them
        self.listener: StoreListener | None = None
        self.rush = Rush()  # of requests for which somebody waits
        self.loads = Loads()  # of all requests
        self.admission = Admission(config.limits, ports.num_tenants)
        self.placement = Placement(config, registry)
        self._config = config
        self._send = send
        self._observed, self._spread = ports.observed, ports.spread
        self._on_ended, self._on_gone = ports.on_ended, ports.on_gone
        self.holding = Holding(send, self._forget)
        self.requests = self.holding.requests
        self._failover = Failover(config)
        self._judge = Judge(config, self.placement)
        self._is_sweeping = False

    # -- for whoever asks --------------------------------------------------------------------------

    def check_room(self, tenant: str, num: int, now: float) -> None:
        """Whether so many requests can be submitted now, before the first of them is.

        Raises:
            RequestError: as ``submit``.
        """
        held = (self.loads.num_held(tenant), len(self.requests))
        self.admission.check(tenant, num, held, now)

    def submit(self, request: Request, now: float, arrived: float | None = None) -> None:
        """Start a request, whose tokens its receiver will get.

        Args:
            request: as it is asked for.
            now: when it can be computed.
            arrived: when its caller began to wait, if that was before.

        Raises:
            RequestError: no pool serves, too much is going on, the request has killed pools before,
                or the cluster ends.
        """
        self.check_room(request.tenant, 1, now)
        if request.priority == 0:
            self.rush.arrived(now)
        request.loads = self.loads
        request.fingerprint = fingerprint(
            request.prompt_token_ids,
            request.block_hashes,
            self._config.block_size,
            request.sampling,
        )
        if self._failover.quarantine.is_refused(request.fingerprint, self._observed(now)):
            raise quarantined()
        request.timeline.mark(TimelineEvent.ARRIVED, now if arrived is None else arrived)
        request.timeline.mark(TimelineEvent.TOKENIZED, now)
        if not self._start(request, now):
            raise no_workers("decode")
        self.requests[request.request_id] = request

    def abort(
        self, request: Request, now: float, *, reason: FinishReason = FinishReason.ABORT
    ) -> None:
        """The caller wants nothing more of it. Idempotent; ``STOP`` is for a stop string."""
        if request.is_active:
            request.finish_reason = reason
            self._end(request, now, tell_pools=True)

    def shut_down(self, now: float) -> None:
        """Fail what is running and refuse everything from now on."""
        error = shutting_down()
        self.admission.close(error)
        self._spread(self._fail_all(error, now))

    def _fail_all(self, error: RequestError, now: float) -> Iterator[None]:
        for request in list(self.requests.values()):
            self._fail(request, error, now)
            yield

    def num_leaked(self, now: float) -> int:
        """Ended requests for which a pool still holds blocks, long after it should not."""
        return self.holding.num_leaked(self._observed(now))

    # -- what the pools say ------------------------------------------------------------------------

    def on_message(self, pool_id: str, message: ToCoordinator, now: float) -> None:
        """A leader says something about a request. Of unknown or ended ones nothing is expected."""
        if isinstance(message, Tokens):
            at = self._observed(now)
            for token in message.tokens:
                self._on_token(pool_id, token, now, at)
        elif isinstance(message, CacheUpdate):
            self.placement.on_cache_update(pool_id, message)
        elif isinstance(message, Released):
            self._on_released(pool_id, message, now)
        elif isinstance(message, _OfOneRequest):
            self._on_request_message(pool_id, message, now)

    def _on_request_message(self, pool_id: str, message: _OfOneRequest, now: float) -> None:
        if isinstance(message, RequestFailed) and message.code == NoToken.NON_FINITE:
            # Also of what has ended meanwhile: a later prompt must not find it in a cache.
            self._doubt(message.request_id, message.attempt)
        request = self._find(message.request_id, message.attempt)
        if request is None and self.listener is not None:
            self.listener.on_store_message(message)
        if request is None or not request.is_active:
            return
        request.heard_at = self._observed(now)
        if isinstance(message, RequestFailed):
            self._on_failed(request, pool_id, message, now)
        elif pool_id == request.decode_pool:
            self._on_decode(request, message, now)
        elif pool_id == request.prefill_pool:
            self._on_prefill(request, message, now)

    def _find(self, request_id: str, attempt: int) -> Request | None:
        request = self.requests.get(request_id)
        return request if request is not None and request.attempt == attempt else None

    def _on_decode(self, request: Request, message: _OfOneRequest, now: float) -> None:
        if isinstance(message, Ticket) and request.state is RequestState.RESERVING:
            request.grant(message.num_cached_tokens, message.num_loaded_tokens)
            request.timeline.mark(TimelineEvent.RESERVED, now)
            self._place_prefill(request, now)
        elif isinstance(message, Ticket) and request.state is RequestState.COMPUTING:
            # It was asked, and is not computing yet: it may not have been told to.
            self._send(request.decode_pool, ComputeHere(request.request_id, request.attempt))
        elif isinstance(message, Committed) and request.state is RequestState.PREFILLING:
            request.advance(RequestEvent.COMMIT)
            request.stats = message.stats
            request.timeline.mark(TimelineEvent.COMMITTED, now)
        elif isinstance(message, Stored):
            request.finish_reason = FinishReason.LENGTH
            receiver = request.receiver
            self._end(request, now, tell_pools=False)
            if receiver is not None:
                receiver.put(request.choice, ())

    def _place_prefill(self, request: Request, now: float) -> None:
        pool_id = self.placement.choose_prefill(request, self.loads)
        request.timeline.mark(TimelineEvent.PREFILL_SENT, now)
        if pool_id is None and request.is_offload:
            self._lose(request, no_workers("prefill"), now, pause=True)
        elif pool_id is None:
            request.advance(RequestEvent.COMPUTE_HERE)
            self._send(request.decode_pool, ComputeHere(request.request_id, request.attempt))
        else:
            request.prefill_on(pool_id)
            self._send(pool_id, request.prefill(self.placement.epoch(request.decode_pool)))

    def _on_prefill(self, request: Request, message: _OfOneRequest, now: float) -> None:
        if isinstance(message, Progress):
            request.is_prefill_begun = True
            request.progress(message.num_done)
        elif isinstance(message, FirstToken) and request.path is None:
            request.path = message.path
            request.prefilled_at = request.heard_at
            request.progress(request.num_attempt_tokens)
            if not request.is_offload:  # a store needs no answer
                self._take_token(request, as_new_token(message), now)

    def _on_token(self, pool_id: str, token: NewToken, now: float, at: float) -> None:
        request = self._find(token.request_id, token.attempt)
        if request is not None and request.is_active and pool_id == request.decode_pool:
            request.heard_at = at
            request.timeline.mark(TimelineEvent.FIRST_DECODE, now)
            if request.state is RequestState.PREFILLING:
                request.advance(RequestEvent.COMMIT)  # what it told us of that was lost
            self._take_token(request, token, now)

    def _take_token(self, request: Request, token: NewToken, now: float) -> None:
        request.advance(RequestEvent.TOKEN)
        ready = request.accept(token)
        if not ready:
            return
        request.stalled_since = None
        request.timeline.mark(TimelineEvent.FIRST_TOKEN, now)
        if request.receiver is not None:
            request.receiver.put(request.choice, ready)
        if self._failover.on_tokens(request):
            self._spread(self._go_on(self._failover.suspects, now))
        if request.flawed:
            self._judge.flaws.on_tokens(request, request.heard_at)
        if request.finish_reason is not None:
            self._failover.clear(request)
            self._judge.flaws.on_finished((request.decode_pool, request.prefill_pool))
            self._end(request, now, tell_pools=False)

    def _on_failed(
        self, request: Request, pool_id: str, message: RequestFailed, now: float
    ) -> None:
        """A pool cannot go on with it: another one may, or else it ends."""
        self.num_non_finite[pool_id] += message.code == NoToken.NON_FINITE
        verdict = self._judge.on_failed(request, pool_id, message, request.heard_at)
        if verdict.goes_on:
            self._lose(request, verdict.error, now, home=verdict.home, pause=verdict.pause)
        else:
            _log.warning("%s failed on %s: %s", request.request_id, pool_id, message.message)
            self._fail(request, verdict.error, now)
        self._go_on_with(request, now)
        self._spread(self._go_on(self._failover.suspects, now))

    def _doubt(self, request_id: str, attempt: int) -> None:
        """The KV of an attempt may be wrong: no pool may offer any of it."""
        request = self.requests.get(request_id)
        if request is not None:
            for pool_id in request.pools_of(attempt):
                self._send(pool_id, request.doubt(attempt))

    def _on_released(self, pool_id: str, message: Released, now: float) -> None:
        request = self.requests.get(message.request_id)
        if request is not None:
            self.holding.release(request, pool_id, message.attempt, now)
            self._go_on_with(request, now)

    # -- pools come and go -------------------------------------------------------------------------

    def on_pool_serving(self, pool_id: str, now: float) -> None:
        """A pool has come, or come back: whoever waits for one may go on."""
        _log.debug("%s serves: %d requests are here", pool_id, len(self.requests))
        if self.listener is not None:
            self.listener.on_pool_serving(pool_id)
        self._spread(self._go_on(self._failover.waiting, now))

    def on_pool_lost(self, pool_id: str, now: float) -> None:
        """What the pool held is gone; who needed it needs another attempt."""
        self.placement.forget_pool(pool_id)
        self._judge.flaws.forget_pool(pool_id)
        if self.listener is not None:
            self.listener.on_pool_lost(pool_id)
        active = [request for request in self.requests.values() if request.is_active]
        on_board = [request for request in active if computed_by(request, pool_id)]
        guilty = self._failover.on_death(on_board, self._observed(now))
        everybody = [
            (request, request.attempt, request.is_active and needs(request, pool_id))
            for request in self.requests.values()
        ]
        self._spread(self._leave_pool(pool_id, everybody, guilty, now))

    def _leave_pool(
        self,
        pool_id: str,
        everybody: list[tuple[Request, int, bool]],
        guilty: bytes | None,
        now: float,
    ) -> Iterator[None]:
        """A step for each request that was here when the pool was lost, with its attempt then.

        The pool may be back, and work on a later attempt, before all have had their step.
        """
        for request, attempt, is_affected in everybody:
            self.holding.lose_pool(request, pool_id, attempt, now)
            if request.flawed[:1] == [pool_id]:
                request.is_flaw_settled = True  # its next gang has failed nobody
            if is_affected and request.is_active and request.attempt == attempt:
                self._lose_pool(request, pool_id, now, is_guilty=request.fingerprint == guilty)
            yield
        yield from self._go_on(self._failover.waiting, now)

    def _lose_pool(self, request: Request, pool_id: str, now: float, *, is_guilty: bool) -> None:
        if is_guilty:
            self.num_quarantined += 1
            _log.error("%s is quarantined: pools died of it", request.request_id)
            self._fail(request, quarantined(), now)
            return
        error = RequestError(
            f"{pool_id} was lost while it served this request", code="worker_lost", status=503
        )
        home = request.decode_pool if request.decode_pool != pool_id else ""
        self._lose(request, error, now, home=home)

    def sweep(self, now: float) -> list[tuple[str, str]]:
        """Once a second: what is overdue, and (pool, reason) of those that are to be lost.

        Pools that hold what is over are told again, pools that are silent about a request are
        asked, what can no longer be expected is tried anew, and who waits goes on.
        """
        if not self._is_sweeping:
            self._spread(self._sweep(now))
        guilty = self._judge.flaws.guilty(self._observed(now))
        for pool_id, _ in guilty:
            for request in self.requests.values():
                if request.prefill_pool == pool_id and request.is_active:
                    self._doubt(request.request_id, request.attempt)
        return guilty

    def _sweep(self, now: float) -> Iterator[None]:
        self._is_sweeping = True
        for request in list(self.requests.values()):
            self._sweep_one(request, now)
            yield
        self._is_sweeping = False
        yield from self._go_on(self._failover.waiting, now)

    def _sweep_one(self, request: Request, now: float) -> None:
        at = self._observed(now)
        if at - request.ended_at > self._config.release_grace_s:
            self.holding.tell_pools(request)
        error = overdue(request, self._config, at, is_cut=self.placement.is_cut(request))
        if error is not None:
            self._lose(request, error, now, home=request.decode_pool)
        for pool_id in pools_to_ask(request, self._config, at):
            self._send(pool_id, Ask(request.request_id, request.attempt))

    # -- attempts ----------------------------------------------------------------------------------

    def _start(self, request: Request, now: float) -> bool:
        """Begin an attempt; False when there is no pool for it."""
        at = self._observed(now)
        pool_id = self.placement.choose_decode(request, self.loads, at)
        if pool_id is None:
            return False
        request.reserve_on(pool_id, at)
        self._send(pool_id, request.reserve(self.placement.store_hint(request)))
        return True

    def _lose(
        self,
        request: Request,
        error: RequestError,
        now: float,
        *,
        home: str = "",
        pause: bool = False,
    ) -> None:
        """This attempt is over; the request goes on with another one, if it may."""
        _log.warning("%s/%d: %s", request.request_id, request.attempt, error.message)
        at = self._observed(now)
        if not self._failover.lose(request, error, at, home=home, pause=pause):
            self._fail(request, error, now)
            return
        request.ended_at = at
        request.timeline.mark(TimelineEvent.RETRIED, now)
        self.holding.tell_pools(request)

    def _go_on(self, who: Callable[[], list[Request]], now: float) -> Iterator[None]:
        """Start what is due; end what has waited for too long. A step for each of them."""
        for request in who():
            self._go_on_with(request, now)
            yield

    def _go_on_with(self, request: Request, now: float) -> None:
        wait, at = request.wait, self._observed(now)
        if wait is None or request.state is not RequestState.WAITING:
            return
        if self._failover.is_due(request, wait, at) and self._start(request, now):
            self._failover.started(request)
        elif at >= wait.until:
            self._fail(request, wait.error, now)

    # -- the end -----------------------------------------------------------------------------------

    def _fail(self, request: Request, error: RequestError, now: float) -> None:
        if not request.is_active:
            return
        request.finish_reason = FinishReason.ERROR
        request.error_code = error.code
        receiver = request.receiver
        self._end(request, now, tell_pools=True)
        if receiver is not None:
            receiver.fail(error)

    def _end(self, request: Request, now: float, *, tell_pools: bool) -> None:
        request.advance(RequestEvent.END)
        request.ended_at = self._observed(now)
        request.timeline.mark(TimelineEvent.FINISHED, now)
        request.forget_tokens()
        self._failover.forget(request)
        self._on_ended(request)
        self.holding.end(request, now, tell_pools=tell_pools)

    def _forget(self, request: Request, now: float) -> None:
        self.admission.ended(now)
        self._on_gone(request)
