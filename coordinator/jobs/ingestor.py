"""What document jobs need of the cluster: KV computed, kept, looked for, and brought up again.

:class:`Ingestor` is implemented by ``coordinator/tiering.py`` on the service and its pools. A
document is computed in segments; each is a request of its own for the whole prompt up to the
segment's end, and when ``compute`` returns the segment is as durable as the cluster can make it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

# What ``compute`` may raise as a RequestError's code that another try can heal.
TRY_AGAIN = frozenset(
    {
        "worker_lost",
        "handoff_failed",
        "stale_target",
        "stalled",
        "no_workers",
        "overloaded",
        "starting",
        "shutting_down",
    }
)


@dataclass(frozen=True, slots=True)
class IngestRequest:
    """One segment: everything up to its end."""

    document_id: str
    request_id: str  # unique over all tries
    token_ids: tuple[int, ...]
    block_hashes: tuple[bytes, ...]  # of the full blocks of ``token_ids``
    tenant: str
    cache_salt: str
    ring_size: int = 0  # 0: the prefill pool's choice


@dataclass(frozen=True, slots=True)
class IngestResult:
    """What a segment took."""

    num_computed_tokens: int
    num_cached_tokens: int
    ring_size: int
    compute_s: float


@dataclass(frozen=True, slots=True)
class Residence:
    """Where blocks of a document lie."""

    tier: str  # "gpu", "cpu" or "disk"
    worker: str  # a pool
    num_blocks: int


class Ingestor(Protocol):
    """The cluster, as document jobs see it."""

    @property
    def is_ready(self) -> bool:
        """Whether a segment can be taken now."""
        ...

    @property
    def tiers(self) -> tuple[str, ...]:
        """From the fastest to the most durable one."""
        ...

    def max_tokens(self) -> int:
        """Of the largest document that can be computed."""
        ...

    def num_stored_blocks(self, block_hashes: Sequence[bytes]) -> int:
        """Leading blocks that lie in the most durable tier there is."""
        ...

    async def compute(
        self, request: IngestRequest, on_progress: Callable[[int], None]
    ) -> IngestResult:
        """Have a segment computed and kept; cancelling the awaiting task aborts it everywhere.

        Args:
            on_progress: told how many leading tokens are computed, rising.

        Raises:
            RequestError: with a code of ``TRY_AGAIN`` if it may succeed later.
        """
        ...

    def residency(self, block_hashes: Sequence[bytes]) -> list[Residence]:
        """Where they lie now, as far as the pools have told."""
        ...

    def pin(self, document_id: str, block_hashes: Sequence[bytes], mode: str) -> None:
        """Keep them: "hard", or "soft" if that is possible. Told again when a store comes back."""
        ...

    def unpin(self, document_id: str) -> None:
        """Idempotent."""
        ...

    async def forget(self, block_hashes: Sequence[bytes]) -> None:
        """Nobody will ask for these any more."""
        ...

    async def warm(self, request: IngestRequest) -> None:
        """Bring a document into the device memory of a decode pool.

        Raises:
            RequestError: as ``compute``.
        """
        ...
