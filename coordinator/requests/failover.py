"""What costs a request an attempt, and when the next one starts. Pure; time comes as an argument.

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

from collections.abc import Iterable

from coordinator.config import CoordinatorConfig
from coordinator.request import Request, RequestState, Wait
from coordinator.requests.quarantine import Quarantine
from protocol.errors import RequestError

PAUSE_S = 1.0
SUSPECT_WAIT_S = 10.0
NUM_TOKENS_TO_CLEAR = 8  # past the point of a death; a pool may have been some tokens ahead of us


class Failover:
    """The requests that are WAITING, and those that are suspected.

    Args:
        config: budgets.
    """

    def __init__(self, config: CoordinatorConfig) -> None:
        self.quarantine = Quarantine(config.poison_deaths, config.quarantine_s)
        self._config = config
        self._waiting: dict[str, Request] = {}  # in order of their losses
        self._suspects: dict[str, Request] = {}
        self._at_large: set[str] = set()  # suspects that are not WAITING

    def lose(
        self, request: Request, error: RequestError, now: float, *, home: str, pause: bool
    ) -> bool:
        """An attempt cannot go on: whether there may be another one, for which it waits now.

        Args:
            error: why; its code names the reason.
            home: a pool that still has something of it, or "".
            pause: there is nobody else to ask.
        """
        if request.attempt >= self._config.max_attempts:
            return False
        closing = (home, request.attempt) if home else None
        request.lose_attempt(error.code)
        request.wait = Wait(
            since=now,
            until=now + self._config.failover_wait_s,
            error=error,
            not_before=now + PAUSE_S if pause else now,
            home=home,
            closing=closing,
        )
        self._waiting[request.request_id] = request
        self._at_large.discard(request.request_id)
        return True

    def started(self, request: Request) -> None:
        """Its next attempt has begun."""
        request.wait = None
        del self._waiting[request.request_id]
        if request.request_id in self._suspects:
            self._at_large.add(request.request_id)

    def forget(self, request: Request) -> None:
        """It has ended, however."""
        self._waiting.pop(request.request_id, None)
        self._suspects.pop(request.request_id, None)
        self._at_large.discard(request.request_id)

    def waiting(self) -> list[Request]:
        """Those that wait, in the order in which they lost an attempt."""
        return list(self._waiting.values())

    def suspects(self) -> list[Request]:
        """Those that may have waited for another suspect."""
        return list(self._suspects.values())

    def is_due(self, request: Request, wait: Wait, now: float) -> bool:
        """Whether its next attempt may start."""
        if now < wait.not_before:
            return False
        if wait.closing in request.holders and now - wait.since < self._config.resume_wait_s:
            return False
        return not (
            request.runs_alone and now - wait.since < SUSPECT_WAIT_S and bool(self._at_large)
        )

    # -- who was it? -------------------------------------------------------------------------------

    def on_death(self, on_board: Iterable[Request], now: float) -> bytes | None:
        """A pool has died while it computed these; the fingerprint that is quarantined for it."""
        requests = list(on_board)
        guilty = self.quarantine.on_death([request.fingerprint for request in requests], now)
        for request in requests:
            request.suspected_at = request.num_output_tokens
            # Who had got a token out of the pool is less likely to have killed it than who had not.
            is_unknown = request.num_output_tokens == request.num_replayed_tokens
            request.runs_alone = is_unknown or self.quarantine.is_doubtful(request.fingerprint, now)
            self._suspects[request.request_id] = request
            self._at_large.add(request.request_id)
        return guilty

    def on_tokens(self, request: Request) -> bool:
        """It has got further: past the point of a death it is cleared; whether it was now."""
        if request.suspected_at is None:
            return False
        if request.num_output_tokens < request.suspected_at + NUM_TOKENS_TO_CLEAR:
            return False
        self.clear(request)
        return True

    def clear(self, request: Request) -> None:
        """It was not the cause of any death."""
        request.suspected_at, request.runs_alone = None, False
        self._suspects.pop(request.request_id, None)
        self._at_large.discard(request.request_id)
        self.quarantine.clear(request.fingerprint)


# -- messages that did not come ------------------------------------------------------------------
#
# Messages are lost when a connection to the coordinator breaks; between ranks they are sent again,
# but two pools may not reach each other at all. No request depends on a single message: a pool that
# is silent about it is asked how it stands, and what cannot come any more costs an attempt.


def overdue(
    request: Request, config: CoordinatorConfig, now: float, *, is_cut: bool = False
) -> RequestError | None:
    """Why this attempt will come to nothing, or None while it may. Call it once in a while.

    Args:
        is_cut: its two pools do not reach each other at the moment.
    """
    if request.state is RequestState.WAITING or not request.is_active:
        return None
    if is_cut and request.state is RequestState.PREFILLING:
        text = f"{request.prefill_pool} and {request.decode_pool} do not reach each other"
        return RequestError(text, code="handoff_failed", status=503)
    if not request.lacks_a_message:
        request.stalled_since = None
    elif request.stalled_since is None:
        request.stalled_since = now
    elif now - request.stalled_since > config.stall_timeout_s:
        return _stalled("a message about this request was lost")
    is_handing_over = request.state is RequestState.PREFILLING and request.path is not None
    if is_handing_over and now - request.prefilled_at > config.handoff_timeout_s:
        return _stalled("its KV was not handed over in time")
    return None


def pools_to_ask(request: Request, config: CoordinatorConfig, now: float) -> list[str]:
    """Pools that work on it, when none has said anything of it for a while."""
    if request.state is RequestState.WAITING or not request.is_active:
        return []
    if now - request.heard_at <= config.stall_timeout_s:
        return []
    request.heard_at = now
    return sorted(pool_id for pool_id, attempt in request.holders if attempt == request.attempt)


def _stalled(message: str) -> RequestError:
    return RequestError(message, code="stalled", status=503)
