"""How a document's KV is computed, kept and found: what the jobs need of the cluster.

1. ``compute`` takes one segment: the document's tokens up to some end, as one request like others.
   When it returns, every full block of them is durable. Cancelling it aborts it everywhere.
2. ``num_stored_blocks`` says how far a document got, whatever has ended meanwhile.
3. ``pin`` and ``forget`` say what is to be kept, and what nobody refers to any more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

# Of a segment, these say nothing about the document: it is tried again, for however long.
TRY_AGAIN = frozenset(
    {
        "worker_lost",
        "handoff_failed",
        "stale_target",
        "no_workers",
        "model_files_changed",
        "overloaded",
        "too_many_requests",
        "stalled",
        "starting",
        "shutting_down",
    }
)


@dataclass(frozen=True, slots=True)
class IngestRequest:
    """One segment of a document: everything up to its end."""

    document_id: str
    request_id: str
    token_ids: Sequence[int]
    block_hashes: tuple[bytes, ...]
    tenant: str
    cache_salt: str
    ring_size: int = 0  # 0: auto


@dataclass(frozen=True, slots=True)
class IngestResult:
    """What a segment took."""

    num_computed_tokens: int
    num_cached_tokens: int
    ring_size: int
    compute_s: float


@dataclass(frozen=True, slots=True)
class Residence:
    """Some of a document's blocks lie here."""

    tier: str  # "gpu", "cpu" or "disk"
    worker: str  # a pool's id
    num_blocks: int


class Ingestor(Protocol):
    """The cluster and its store. Nothing but the coroutines waits."""

    @property
    def is_ready(self) -> bool:
        """Whether a segment can be taken now, and what is stored is known."""
        ...

    @property
    def tiers(self) -> tuple[str, ...]:
        """("gpu",), or ("gpu", "cpu", "disk")."""
        ...

    def max_tokens(self) -> int:
        """Of the largest document that can be held."""
        ...

    def num_stored_blocks(self, block_hashes: Sequence[bytes]) -> int:
        """Leading blocks that are durable; without a store, that a decode pool has cached."""
        ...

    def has_damaged(self, block_hashes: Sequence[bytes]) -> bool:
        """Whether some of these were found damaged where they were stored, and are gone."""
        ...

    async def compute(
        self, request: IngestRequest, on_progress: Callable[[int], None]
    ) -> IngestResult:
        """Have every block of a segment computed and stored; returns when it is durable.

        Args:
            request: the segment.
            on_progress: told the tokens done so far, cached ones included.

        Raises:
            RequestError: a code of ``TRY_AGAIN``, or one that says what is wrong with it.
        """
        ...

    def residency(self, block_hashes: Sequence[bytes]) -> list[Residence]:
        """Where the blocks lie."""
        ...

    def pin(self, document_id: str, block_hashes: Sequence[bytes], mode: str) -> None:
        """Keep blocks, "soft" or "hard". Idempotent; told again after a restart."""
        ...

    def unpin(self, document_id: str) -> None:
        """The opposite. Idempotent."""
        ...

    async def forget(self, block_hashes: Sequence[bytes]) -> None:
        """Drop blocks of a deleted document, to which nothing else refers."""
        ...

    async def warm(self, request: IngestRequest) -> None:
        """Bring blocks into a decode pool's device memory."""
        ...
