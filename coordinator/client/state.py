"""The cluster's state, and where one request's time went: both as their paths answer."""

from typing import Any

import msgspec


class BlockCounts(msgspec.Struct, frozen=True):
    """Blocks of one cache, by what they are used for."""

    total: int = 0
    free: int = 0
    owned: int = 0
    in_flight: int = 0
    quarantined: int = 0
    cached: int = 0


class RankState(msgspec.Struct, frozen=True):
    """One process of a pool."""

    rank: int
    cp_rank: int = 0
    tp_rank: int = 0
    transport: str = ""
    ready: bool = False
    silent_s: float = 0.0
    num_steps: int = 0
    step_age_s: float = 0.0
    rss_bytes: int = 0
    counters: dict[str, Any] = {}


class PoolState(msgspec.Struct, frozen=True):
    """A gang of ranks that computes together."""

    pool_id: str
    role: str = ""
    cp_size: int = 1
    tp_size: int = 1
    epoch: int = 0
    state: str = ""
    lost_reason: str | None = None
    serving: bool = False
    tokens_per_s: float = 0.0
    num_waiting: int = 0
    num_running: int = 0
    pending_tokens: int = 0
    blocks: list[BlockCounts] = []
    ranks: list[RankState] = []


class ClusterState(msgspec.Struct, frozen=True):
    """Pools, ranks and what they hold."""

    ready: bool
    model: str = ""
    unready_reason: str | None = None
    missing: str | None = None
    coordinator_epoch: int = 0
    max_model_len: int = 0
    block_size: int = 0
    num_active_requests: int = 0
    num_leaked: int = 0
    counters: dict[str, Any] = {}
    pools: list[PoolState] = []


class Transfer(msgspec.Struct, frozen=True):
    """How a request's KV moved."""

    transport: str = ""
    num_bytes: int = 0
    num_segments: int = 0
    num_layers_overlapped: int = 0
    num_layers: int = 0
    read_s: float = 0.0
    exposed_s: float = 0.0


class SequenceTimeline(msgspec.Struct, frozen=True):
    """One sequence's life; ``events`` are seconds after the arrival."""

    request_id: str = ""
    attempt: int = 1
    state: str = ""
    finish_reason: str | None = None
    error_code: str | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    decode_pool: str | None = None
    prefill_pool: str | None = None
    lost_attempts: list[dict[str, Any]] = []
    events: dict[str, float] = {}
    transfer: Transfer | None = None
    path: str = ""


class RequestTimeline(msgspec.Struct, frozen=True):
    """One HTTP request, and the sequences that it became."""

    id: str
    requests: list[SequenceTimeline]
    client_request_id: str = ""
    model: str = ""
    created: int = 0
