"""An eye on ``/v1/cluster``: which pools serve, what was counted, and whether all blocks are back.

Counters of a rank start anew with its process, so the last ones of every epoch are kept.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from baton_client import BlockCounts, ClusterState
from protocol.process.failpoints import COUNTER_PREFIX
from tests.campaign.cluster import RunningCluster
from tests.campaign.tally import FREE_WITHIN_S, Tally

HEARTBEAT_S = 1.0
SETTLE_S = 60.0


class Watch:
    """The latest state of a cluster, and the counters of all its ranks so far."""

    def __init__(self, cluster: RunningCluster, interval_s: float) -> None:
        self.state: ClusterState | None = None
        self._cluster = cluster
        self._interval_s = interval_s
        self._counters: dict[tuple[str, int, int], dict[str, float]] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(self._interval_s)

    async def look(self) -> ClusterState | None:
        """The state now; None when nobody answers."""
        self.state = await self._cluster.state()
        if self.state is None:
            return None
        for pool in self.state.pools:
            for rank in pool.ranks:
                if rank.counters:
                    self._counters[pool.pool_id, pool.epoch, rank.rank] = rank.counters
        self._counters["coordinator", 0, 0] = self.state.counters
        return self.state

    def total(self, counter: str) -> int:
        """A counter's sum over all ranks that there have been."""
        return int(sum(counters.get(counter, 0) for counters in self._counters.values()))

    def failpoint_hits(self) -> Counter[str]:
        """How often each failpoint took effect."""
        hits: Counter[str] = Counter()
        for counters in self._counters.values():
            for name, count in counters.items():
                if name.startswith(COUNTER_PREFIX):
                    hits[name.removeprefix(COUNTER_PREFIX)] += int(count)
        return hits

    def epochs(self) -> dict[str, int]:
        """The epoch of every pool that serves."""
        pools = self.state.pools if self.state is not None else []
        return {pool.pool_id: pool.epoch for pool in pools if pool.serving}


@asynccontextmanager
async def watching(cluster: RunningCluster, interval_s: float = 0.5) -> AsyncIterator[Watch]:
    """A watch that runs while the block does."""
    watch = Watch(cluster, interval_s)
    task = asyncio.create_task(watch.run())
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.wait([task])


async def audit(watch: Watch, tally: Tally) -> float:
    """Seconds until a cluster without requests holds nothing, told by heartbeats of each second.

    Only what a heartbeat says that was sent after the call counts, so it takes one at least. What
    is still held FREE_WITHIN_S and a heartbeat later is leaked, as is whatever does not add up to
    the total. A pool that is being restarted is waited for: it holds nothing, but must come.
    """
    started = time.monotonic()
    held, is_whole = -1, False
    while True:
        state = await watch.look()
        if state is not None:
            is_whole = all(pool.serving and pool.blocks for pool in state.pools)
            held = sum(_held(counts) for pool in state.pools for counts in pool.blocks)
        waited = time.monotonic() - started
        is_clean = state is not None and held == 0 and state.num_active_requests == 0
        if is_whole and is_clean and waited > 1.2 * HEARTBEAT_S:
            break
        if waited > (FREE_WITHIN_S + HEARTBEAT_S if is_whole else SETTLE_S):
            break
        await asyncio.sleep(0.05)
    tally.num_audits += 1
    if held != 0 or not is_whole or state is None:
        tally.num_leaked_blocks += max(0, held)
        tally.problem(f"the audit finds {held} blocks held, pools {'whole' if is_whole else 'bad'}")
    elif state.num_leaked:
        tally.problem(f"{state.num_leaked} requests are leaked")
    return time.monotonic() - started


def _held(counts: BlockCounts) -> int:
    """Blocks that somebody holds, or that have got lost."""
    every: dict[str, int] = msgspec.structs.asdict(counts)
    accounted = sum(every.values()) - counts.total
    return counts.total - counts.free - counts.cached + abs(counts.total - accounted)
