"""The health of a running cluster: its pools, and the conservation of its blocks."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from baton_client import BlockCounts, ClusterState

SETTLE_S = 5.0  # released blocks are reported by the next heartbeats; an abort takes two seconds
_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``advice`` says what to do when it is not well."""

    name: str
    is_well: bool
    found: str
    advice: str = ""

    def line(self) -> str:
        """As it is printed."""
        advice = f" ({self.advice})" if self.advice and not self.is_well else ""
        return f"  {'ok' if self.is_well else 'NO'} {self.name:<14} {self.found}{advice}"


class Observed(Protocol):
    """The client of a cluster."""

    def cluster(self) -> ClusterState: ...


def settled_state(client: Observed, pause: Callable[[float], None] = time.sleep) -> ClusterState:
    """The state of a cluster, after a few seconds at most in which idle pools release all blocks.

    Raises:
        ClientError: no server answers there, or not as Baton does.
    """
    state = client.cluster()
    waited_s = 0.0
    while num_held(state) and not state.num_active_requests and waited_s < SETTLE_S:
        pause(_POLL_S)
        state = client.cluster()
        waited_s += _POLL_S
    return state


def judge(state: ClusterState) -> list[Finding]:
    """A finding about the pools, one about requests, one about blocks. Pure."""
    return [_pools(state), _requests(state), _blocks(state)]


def num_held(state: ClusterState) -> int:
    """Blocks that are neither free nor only cached."""
    return sum(_held(counts) for pool in state.pools for counts in pool.blocks)


def _held(counts: BlockCounts) -> int:
    return counts.owned + counts.in_flight


def _pools(state: ClusterState) -> Finding:
    absent = [pool for pool in state.pools if not pool.serving]
    found = f"{len(state.pools) - len(absent)} of {len(state.pools)} pools serve"
    reasons = [f"{pool.pool_id} is {pool.state}: {pool.lost_reason or '?'}" for pool in absent]
    is_well = state.ready and not absent
    return Finding("pools", is_well, "; ".join([found, *reasons]), "" if is_well else "see its log")


def _requests(state: ClusterState) -> Finding:
    found = f"{state.num_active_requests} active, {state.num_leaked} ended but still held"
    return Finding("requests", state.num_leaked == 0, found, "report this: it is a leak")


def _blocks(state: ClusterState) -> Finding:
    lost = [
        f"{pool.pool_id} accounts for {total} of {counts.total}"
        for pool in state.pools
        for counts in pool.blocks
        if (total := counts.free + counts.cached + _held(counts)) != counts.total
    ]
    if lost:
        return Finding("blocks", False, "; ".join(lost), "report this: it is a leak")
    total = sum(counts.total for pool in state.pools for counts in pool.blocks)
    found = f"all {total} accounted for, {num_held(state)} held"
    is_leak = num_held(state) > 0 and state.num_active_requests == 0
    return Finding("blocks", not is_leak, found, "with no request: report this, it is a leak")
