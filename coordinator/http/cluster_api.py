"""The cluster's state for people and tools: ``/v1/cluster`` and ``/version``."""

import importlib.metadata
from typing import Any

import msgspec

from coordinator.cluster.pools import Pool, Rank
from coordinator.http.frontend import Frontend
from coordinator.http.metrics import BLOCK_STATES
from protocol.messages import PROTOCOL_VERSION

DISTRIBUTION = "baton-serve"


def version_info() -> dict[str, Any]:
    """Which Baton this is."""
    try:
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        version = "source"
    return {"version": version, "protocol": PROTOCOL_VERSION}


def describe_cluster(frontend: Frontend, now: float) -> dict[str, Any]:
    """Pools, ranks and what they hold. No addresses and no names of tenants."""
    registry, service, lag = frontend.registry, frontend.service, frontend.lag
    unready = frontend.unready(now)
    return {
        "object": "cluster",
        "ready": unready is None,
        "unready_reason": None if unready is None else unready.message,
        "coordinator_epoch": registry.coordinator_epoch,
        "missing": registry.missing() or None,
        "model": frontend.config.model_name,
        "serving": msgspec.to_builtins(frontend.report()),
        "model_fingerprint": frontend.model.fingerprint,
        "max_model_len": frontend.max_model_len,
        "block_size": frontend.config.block_size,
        "topology_version": registry.version,
        "num_active_requests": service.loads.num_active,
        "num_leaked": service.num_leaked(now),
        "loop": {
            "lag_s": round(lag.largest(now), 6),
            "step_s": round(lag.longest_step_s(now), 6),
            "num_stalls": lag.num_stalls,
        },
        "counters": dict(frontend.counters),
        "storage": frontend.jobs.disk.describe(),
        "pools": [_describe_pool(pool, lag.observed(now)) for pool in registry.pools.values()],
    }


def _describe_pool(pool: Pool, now: float) -> dict[str, Any]:
    leader = pool.ranks.get(0)
    heartbeat = leader.heartbeat if leader is not None else None
    return {
        "pool_id": pool.pool_id,
        "role": pool.spec.role,
        "cp_size": pool.spec.cp_size,
        "tp_size": pool.spec.tp_size,
        "epoch": pool.epoch,
        "gang_start": pool.gang_start,
        "state": pool.state.value,
        "lost_reason": pool.reason or None,
        "serving": pool.is_serving,
        "tokens_per_s": leader.tokens_per_s if leader is not None else 0.0,
        "num_waiting": heartbeat.num_waiting if heartbeat else 0,
        "num_running": heartbeat.num_running if heartbeat else 0,
        "pending_tokens": heartbeat.pending_tokens if heartbeat else 0,
        "blocks": [
            {state: getattr(counts, state) for state in BLOCK_STATES}
            for counts in (heartbeat.blocks if heartbeat else ())
        ],
        "ranks": [_describe_rank(number, rank, now) for number, rank in sorted(pool.ranks.items())],
    }


def _describe_rank(number: int, rank: Rank, now: float) -> dict[str, Any]:
    endpoint, heartbeat = rank.hello.endpoint, rank.heartbeat
    return {
        "rank": number,
        "cp_rank": endpoint.cp_rank,
        "tp_rank": endpoint.tp_rank,
        "transport": endpoint.transport,
        "ready": rank.is_ready,
        "connected_version": rank.connected_version,
        "silent_s": round(now - rank.last_seen, 3),
        "num_steps": heartbeat.num_steps if heartbeat else 0,
        "step_age_s": heartbeat.step_age_s if heartbeat else 0.0,
        "rss_bytes": heartbeat.rss_bytes if heartbeat else 0,
        "counters": dict(heartbeat.counters) if heartbeat else {},
    }
