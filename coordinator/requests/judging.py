"""What follows when a pool says that it cannot go on with a request. Pure; time is an argument.

Another pool may be able to, or be the one that tells whose fault it is; else the request ends. Of
numbers that are not finite, a rank may be to blame, or the request:

1. A pool says that a request's logits are not finite. One other pool tries it.
2. Does that get a token, the first pool was to blame: it is *proven*. Does it fail in the same
   way, the request or the checkpoint is, and no pool is blamed.
3. Where no other pool can try it, the pool is only *suspected*: as soon as it brings another
   request to its end, it is taken to be sound.
4. A pool that is to blame for ``non_finite_requests`` different requests within
   ``non_finite_window_s`` is lost: its ranks start anew, with what they had in memory gone.
"""

from collections import OrderedDict, defaultdict
from dataclasses import dataclass

from coordinator.cluster.placement import Placement
from coordinator.config import CoordinatorConfig
from coordinator.errors import pool_failure
from coordinator.request import Request
from protocol.errors import RequestError
from protocol.messages import RequestFailed
from protocol.request import NoToken

TOO_SMALL = "kv_capacity_exceeded"
HEALED_BY_ANOTHER = frozenset({"handoff_failed", "stale_target"})
MAX_POOLS_PER_REQUEST = 2  # that try one whose logits were not finite


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with a request."""

    error: RequestError  # for which the attempt is over
    goes_on: bool  # with another attempt
    home: str = ""  # a pool that still has something of it
    pause: bool = False  # there is nobody else to ask


class Judge:
    """Knows who failed before.

    Args:
        config: how often a pool may.
        placement: which pools there are.
    """

    def __init__(self, config: CoordinatorConfig, placement: Placement) -> None:
        self._placement = placement
        self.flaws = Flaws(config.non_finite_requests, config.non_finite_window_s)

    def on_failed(
        self, request: Request, pool_id: str, message: RequestFailed, now: float
    ) -> Verdict:
        """A pool has failed on its present attempt."""
        error = pool_failure(message.code, message.message)
        named = pool_failure(message.code, f"{pool_id}: {message.message}")
        if message.code == TOO_SMALL:
            request.too_small.add(pool_id)
            fits = request.num_output_tokens > 0 or not self._placement.is_too_large(request)
            home = request.decode_pool if pool_id != request.decode_pool else ""
            return Verdict(named if fits else error, fits, home)
        if message.code == NoToken.NON_FINITE:
            # What one has computed, the other may have spoilt on the way: both are avoided.
            request.blamed |= {request.decode_pool, request.prefill_pool} - {""}
            can_avoid = self._placement.can_avoid(request, pool_id)
            goes_on = self.flaws.on_flaw(request, pool_id, now, can_avoid=can_avoid)
            return Verdict(named if goes_on else error, goes_on)
        if message.code in HEALED_BY_ANOTHER:
            # Who computed it is the first to be avoided, who was to receive it the second.
            suspect = request.prefill_pool or request.decode_pool
            request.blamed.add(request.decode_pool if suspect in request.blamed else suspect)
            pause = not self._placement.has_blameless(request)
            return Verdict(named, True, request.decode_pool, pause)
        return Verdict(error, goes_on=False)


class Flaws:
    """Who is to blame for how many requests.

    Args:
        num_requests: different ones, after which a pool is lost.
        window_s: after which a request no longer counts.
    """

    def __init__(self, num_requests: int, window_s: float) -> None:
        self._num_requests = num_requests
        self._window_s = window_s
        # By pool and fingerprint, oldest first: when it was, and whether it is proven.
        self._blamed: defaultdict[str, OrderedDict[bytes, tuple[float, bool]]] = defaultdict(
            OrderedDict
        )

    def on_flaw(self, request: Request, pool_id: str, now: float, *, can_avoid: bool) -> bool:
        """A pool has come to nothing with a request; whether another one is to try it.

        Args:
            can_avoid: there is a pool that could.
        """
        request.flawed.append(pool_id)
        if len(request.flawed) >= MAX_POOLS_PER_REQUEST:
            return False
        if not can_avoid:
            self._blame(pool_id, request.fingerprint, now, is_proven=False)
        return can_avoid

    def on_tokens(self, request: Request, now: float) -> None:
        """It goes on where it had come to nothing: who failed it is to blame."""
        if len(request.flawed) == 1 and not request.is_flaw_settled:
            request.is_flaw_settled = True
            self._blame(request.flawed[0], request.fingerprint, now, is_proven=True)

    def on_finished(self, pool_ids: tuple[str, ...]) -> None:
        """These have brought a request to its end: what they are only suspected of is forgotten."""
        for pool_id in pool_ids:
            blamed = self._blamed.get(pool_id)
            if blamed:
                proven = ((key, value) for key, value in blamed.items() if value[1])
                self._blamed[pool_id] = OrderedDict(proven)

    def forget_pool(self, pool_id: str) -> None:
        """It is lost: its next ranks have done nothing yet."""
        self._blamed.pop(pool_id, None)

    def guilty(self, now: float) -> list[tuple[str, str]]:
        """(pool, reason) of those that are to be lost."""
        found = []
        for pool_id, blamed in self._blamed.items():
            while blamed and now - next(iter(blamed.values()))[0] > self._window_s:
                blamed.popitem(last=False)
            if len(blamed) >= self._num_requests:
                reason = (
                    f"its logits were not finite for {len(blamed)} different requests: its memory, "
                    f"or the checkpoint's weights, are damaged"
                )
                found.append((pool_id, reason))
        return found

    def _blame(self, pool_id: str, request: bytes, now: float, *, is_proven: bool) -> None:
        blamed = self._blamed[pool_id]
        was_proven = blamed.pop(request, (now, False))[1]
        blamed[request] = (now, is_proven or was_proven)
        if len(blamed) > self._num_requests:
            blamed.popitem(last=False)
