"""Pools whose numbers come to nothing: whether a rank is to blame, or the request. Pure.

1. A pool says that a request's logits are not finite. One other pool tries it.
2. Does that get a token, the first pool was to blame: it is *proven*. Does it fail in the same
   way, the request or the checkpoint is, and no pool is blamed.
3. Where no other pool can try it, the pool is only *suspected*: as soon as it brings another
   request to its end, it is taken to be sound.
4. A pool that is to blame for ``num_requests`` different requests within ``window_s`` is lost: its
   ranks start anew, with what they had in memory gone.
"""

from collections import OrderedDict, defaultdict

from coordinator.records.records import Record

MAX_POOLS_PER_REQUEST = 2  # that try it


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

    def on_flaw(self, record: Record, pool_id: str, now: float, *, can_avoid: bool) -> bool:
        """A pool has come to nothing with a request; whether another one is to try it.

        Args:
            can_avoid: there is a pool that could.
        """
        record.flawed.append(pool_id)
        if len(record.flawed) >= MAX_POOLS_PER_REQUEST:
            return False
        if not can_avoid:
            self._blame(pool_id, record.fingerprint, now, is_proven=False)
        return can_avoid

    def on_tokens(self, record: Record, now: float) -> None:
        """It goes on where it had come to nothing: who failed it is to blame."""
        if len(record.flawed) == 1 and not record.is_flaw_proven:
            record.is_flaw_proven = True
            self._blame(record.flawed[0], record.fingerprint, now, is_proven=True)

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
