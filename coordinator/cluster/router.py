"""Where a request goes. Pure: candidates in, a choice out; time comes as an argument.

1. ``SessionTable`` remembers on which decode pool a session's KV lies, for a while.
2. ``PrefixMap`` knows which block hashes each pool has said that it can hit.
3. ``choose_decode``: the session's home, else the most cached prefix, else the shortest wait.
4. When the decode pool has granted blocks and said what it holds, ``computes_here`` decides whether
   what is left is worth a journey, and ``choose_prefill`` where to.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from coordinator.cluster.hash_set import HashSet
from coordinator.request import SessionKey

MAX_SESSIONS = 100_000


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pool that could take a request."""

    pool_id: str
    num_cached_tokens: int  # of the prompt, as far as the pool has told
    pending_tokens: int  # that it has still to compute for others
    tokens_per_s: float = 0.0  # measured; 0 is not known

    def wait_s(self, typical_tokens_per_s: float) -> float:
        """How long what is pending takes; an unmeasured pool is taken to be like the others."""
        return self.pending_tokens / (self.tokens_per_s or typical_tokens_per_s)


def _typical(candidates: Sequence[Candidate]) -> float:
    speeds = [c.tokens_per_s for c in candidates if c.tokens_per_s > 0]
    return sum(speeds) / len(speeds) if speeds else 1.0


def _best(candidates: Sequence[Candidate]) -> Candidate:
    typical = _typical(candidates)
    return min(candidates, key=lambda c: (-c.num_cached_tokens, c.wait_s(typical), c.pool_id))


def choose_decode(candidates: Sequence[Candidate], home: str | None) -> Candidate | None:
    """The pool that decodes a request, or None when there is no candidate.

    Args:
        candidates: the decode pools that serve, in any order.
        home: where the session's KV lies, if it has one.
    """
    if not candidates:
        return None
    return next((c for c in candidates if c.pool_id == home), None) or _best(candidates)


def choose_prefill(candidates: Sequence[Candidate]) -> Candidate | None:
    """The prefill pool for a request: the most cached prefix, then the shortest wait."""
    return _best(candidates) if candidates else None


def computes_here(num_prompt_tokens: int, num_cached_tokens: int, threshold: int) -> bool:
    """Whether the decode pool computes the rest of the prompt itself."""
    return num_prompt_tokens - num_cached_tokens <= threshold


class SessionTable:
    """Each session's decode home; forgotten ``ttl_s`` after its last use, the oldest first.

    Args:
        ttl_s: seconds from the last use.
        max_sessions: a caller who invents sessions cannot fill the memory.
    """

    def __init__(self, ttl_s: float, max_sessions: int = MAX_SESSIONS) -> None:
        self._ttl_s = ttl_s
        self._max_sessions = max_sessions
        self._homes: OrderedDict[SessionKey, tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._homes)

    def home(self, key: SessionKey, now: float) -> str | None:
        """The pool that holds the session's KV, as far as we know. Changes nothing."""
        pool_id, expires = self._homes.get(key, (None, 0.0))
        return pool_id if now < expires else None

    def settle(self, key: SessionKey, pool_id: str, now: float) -> None:
        """The session's KV lies on ``pool_id`` from now on."""
        self._homes[key] = (pool_id, now + self._ttl_s)
        self._homes.move_to_end(key)
        # Uses are in order of time, so the front of the table expires first.
        while self._homes:
            oldest, (_, expires) = next(iter(self._homes.items()))
            if expires > now and len(self._homes) <= self._max_sessions:
                return
            del self._homes[oldest]

    def forget_pool(self, pool_id: str) -> None:
        """The pool is gone, and the sessions' KV with it."""
        for key in [key for key, (home, _) in self._homes.items() if home == pool_id]:
            del self._homes[key]


class PrefixMap:
    """Which blocks a prompt can hit where, from what the pools have told."""

    def __init__(self) -> None:
        self._hashes: dict[str, HashSet] = {}

    def update(self, pool_id: str, stored: Sequence[bytes], evicted: Sequence[bytes]) -> None:
        hashes = self._hashes.setdefault(pool_id, HashSet())
        hashes.difference_update(evicted)
        hashes.update(stored)

    def forget_pool(self, pool_id: str) -> None:
        self._hashes.pop(pool_id, None)

    def num_cached_blocks(self, pool_id: str, block_hashes: Sequence[bytes]) -> int:
        """Leading blocks of a prompt that the pool holds."""
        return self.num_leading([pool_id], block_hashes)

    def num_leading(self, pool_ids: Sequence[str], block_hashes: Sequence[bytes]) -> int:
        """Leading blocks of a prompt that these hold between them.

        A prompt of a million tokens has 31 thousand blocks: each takes a fraction of a microsecond.
        """
        held = [hashes for pool_id in pool_ids if (hashes := self._hashes.get(pool_id))]
        number, is_further = 0, True
        while is_further and number < len(block_hashes):
            before = number
            for hashes in held:
                number += hashes.num_leading(islice(block_hashes, number, None))
            is_further = number > before
        return number

    def num_held(self, pool_id: str, block_hashes: Sequence[bytes]) -> int:
        """Blocks of a prompt that the pool holds, wherever they stand in it."""
        hashes = self._hashes.get(pool_id, HashSet())
        return sum(block_hash in hashes for block_hash in block_hashes)
