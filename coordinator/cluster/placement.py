"""Which pools take a request: what the router has to choose from. Pure.

1. The decode pool: where the last attempt has left something, the session's home, or the router's
   choice among those that serve. A pool that has refused the request for its size is out; one that
   is to blame for a lost attempt is the last resort.
2. The prefill pool, once the decode pool has said what it holds: among those that reach it.
"""

from collections.abc import Sequence

from coordinator.cluster.pools import Pool
from coordinator.cluster.registry import Registry
from coordinator.cluster.router import (
    Candidate,
    PrefixMap,
    SessionTable,
    choose_decode,
    choose_prefill,
    computes_here,
)
from coordinator.config import CoordinatorConfig
from coordinator.request import Loads, Request, RequestState
from protocol.messages import CacheUpdate

STORE_TIERS = ("cpu", "disk")
NO_STORE = ("", 0, 0)
MAX_DAMAGED = 100_000  # blocks that are remembered


def tier_name(pool_id: str, tier: str) -> str:
    """What the map of prefixes calls a tier of a pool."""
    return f"{pool_id}:{tier}" if tier else pool_id


class Placement:
    """Knows what the pools have cached and where sessions live.

    Args:
        config: thresholds.
        registry: which pools serve.
    """

    def __init__(self, config: CoordinatorConfig, registry: Registry) -> None:
        self._config = config
        self._registry = registry
        self._sessions = SessionTable(config.session_ttl_s)
        self._prefixes = PrefixMap()
        self._damaged: dict[bytes, None] = {}  # on the store's disk; the latest

    def on_cache_update(self, pool_id: str, update: CacheUpdate) -> None:
        name = tier_name(pool_id, update.tier)
        self._prefixes.update(name, update.stored, update.evicted)
        self._damaged.update(dict.fromkeys(update.damaged))
        for block_hash in update.stored if update.tier == "disk" else ():
            self._damaged.pop(block_hash, None)
        for block_hash in list(self._damaged)[:-MAX_DAMAGED]:
            del self._damaged[block_hash]

    def has_damaged(self, block_hashes: Sequence[bytes]) -> bool:
        """Whether the store has lost some of these since they did not hold what was written."""
        return bool(self._damaged) and not self._damaged.keys().isdisjoint(block_hashes)

    def forget_pool(self, pool_id: str) -> None:
        """What it held is gone."""
        for tier in ("", *STORE_TIERS):
            self._prefixes.forget_pool(tier_name(pool_id, tier))
        self._sessions.forget_pool(pool_id)

    def store(self) -> Pool | None:
        """The store that serves, if one does."""
        return next(iter(self._registry.serving("store")), None)

    def num_stored_blocks(self, block_hashes: Sequence[bytes], tiers: Sequence[str]) -> int:
        """Leading blocks of a prompt that lie in these tiers of the store."""
        store = self.store()
        if store is None:
            return 0
        names = [tier_name(store.pool_id, tier) for tier in tiers]
        return self._prefixes.num_leading(names, block_hashes)

    def num_held(self, pool: Pool, tier: str, block_hashes: Sequence[bytes]) -> int:
        """Blocks of a prompt that a tier of a pool holds, wherever they stand in it."""
        return self._prefixes.num_held(tier_name(pool.pool_id, tier), block_hashes)

    def num_cached(self, pool: Pool, block_hashes: Sequence[bytes]) -> int:
        """Leading blocks of a prompt in a pool's device memory."""
        return self._prefixes.num_cached_blocks(pool.pool_id, block_hashes)

    def store_hint(self, request: Request) -> tuple[str, int, int]:
        """(store, its epoch, tokens of the prompt that it has), if its decode pool has fewer."""
        store = self.store()
        if store is None or request.is_offload:
            return NO_STORE
        num_blocks = self.num_stored_blocks(request.block_hashes, STORE_TIERS)
        if num_blocks <= self._prefixes.num_cached_blocks(
            request.decode_pool, request.block_hashes
        ):
            return NO_STORE
        return store.pool_id, store.epoch, num_blocks * self._config.block_size

    def epoch(self, pool_id: str) -> int:
        return self._registry.pools[pool_id].epoch

    def is_serving(self, pool_id: str) -> bool:
        pool = self._registry.pools.get(pool_id)
        return pool is not None and pool.is_serving

    def choose_decode(self, request: Request, loads: Loads, now: float) -> str | None:
        """The pool for its next attempt, where its session lives from now on; None if none serves.

        Args:
            loads: what the pools have to do for all others.
        """
        if request.is_offload:
            store = self.store()  # which is no use without somebody who computes
            is_served = store is not None and bool(self._registry.serving("prefill"))
            return store.pool_id if store is not None and is_served else None
        unfit = {*request.too_small, *request.flawed}
        serving = [p for p in self._registry.serving("decode") if p.pool_id not in unfit]
        blameless = [pool for pool in serving if pool.pool_id not in request.blamed]
        candidates = [
            self._candidate(pool, request, loads.decode_tokens(pool.pool_id))
            for pool in blameless or serving
        ]
        home = self._sessions.home(request.session, now) if request.session else None
        if request.wait is not None and self.is_serving(request.wait.home):
            home = request.wait.home
        chosen = choose_decode(candidates, home)
        if chosen is None:
            return None
        if request.session:
            self._sessions.settle(request.session, chosen.pool_id, now)
        return chosen.pool_id

    def is_too_large(self, request: Request) -> bool:
        """Whether every decode pool that serves has refused it for its size."""
        serving = {pool.pool_id for pool in self._registry.serving("decode")}
        return bool(serving) and serving <= request.too_small

    def choose_prefill(self, request: Request, loads: Loads) -> str | None:
        """The prefill pool for what its decode pool misses; None if that computes it itself."""
        num_cached = request.num_target_cached_tokens or 0
        threshold = self._config.local_prefill_threshold
        is_short = computes_here(request.num_attempt_tokens, num_cached, threshold)
        if is_short and not request.is_offload:
            return None
        target = self._registry.pools[request.decode_pool]
        reaching = [
            pool
            for pool in self._registry.serving("prefill")
            if self._registry.can_hand_over(pool, target)
            and pool.pool_id not in (*request.too_small, *request.flawed)
        ]
        blameless = [pool for pool in reaching if pool.pool_id not in request.blamed]
        chosen = choose_prefill(
            [
                self._candidate(pool, request, loads.prefill_tokens(pool.pool_id))
                for pool in blameless or reaching
            ]
        )
        return None if chosen is None else chosen.pool_id

    def is_cut(self, request: Request) -> bool:
        """Whether the two pools that work on it have lost sight of each other."""
        pools = self._registry.pools
        decode, prefill = pools.get(request.decode_pool), pools.get(request.prefill_pool)
        if decode is None or prefill is None:
            return False
        return decode.pool_id in prefill.cut_off or prefill.pool_id in decode.cut_off

    def can_avoid(self, request: Request, pool_id: str) -> bool:
        """Whether another pool that serves could do for it what this one did."""
        roles = [self._registry.pools[pool_id].spec.role]
        if "prefill" in roles and not request.is_offload:
            roles.append("decode")  # which can compute a prompt as well
        others = (pool.pool_id for role in roles for pool in self._registry.serving(role))
        return any(other not in (pool_id, *request.flawed) for other in others)

    def has_blameless(self, request: Request) -> bool:
        """Whether there is a prefill pool that has not lost an attempt of it."""
        serving = self._registry.serving("prefill")
        return any(pool.pool_id not in request.blamed for pool in serving)

    def _cached_tokens(self, pool: Pool, hashes: tuple[bytes, ...]) -> int:
        return self._prefixes.num_cached_blocks(pool.pool_id, hashes) * self._config.block_size

    def _candidate(self, pool: Pool, request: Request, pending_tokens: int) -> Candidate:
        cached = self._cached_tokens(pool, request.block_hashes)
        return Candidate(pool.pool_id, cached, pending_tokens, pool.tokens_per_s)


def computed_by(request: Request, pool_id: str) -> bool:
    """Whether the pool was computing it, as far as is known: it may be what has killed the pool."""
    if pool_id == request.decode_pool:
        return request.state in (RequestState.COMPUTING, RequestState.DECODING)
    return (
        pool_id == request.prefill_pool
        and request.state is RequestState.PREFILLING
        and request.is_prefill_begun
        and request.path is None
    )


def needs(request: Request, pool_id: str) -> bool:
    """Whether its attempt cannot go on without the pool."""
    if pool_id == request.decode_pool:
        return True
    if pool_id != request.prefill_pool:
        return False
    # The first token of the attempt may have been lost with the pool although all was committed.
    return request.state is RequestState.PREFILLING or request.path is None
