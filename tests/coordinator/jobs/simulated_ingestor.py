"""An ingestor without a cluster."""

import asyncio
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from coordinator.jobs.documents.ingestor import IngestRequest, IngestResult, Residence
from kvcache.prefix import block_salt, hash_blocks


class SimulatedIngestor:
    """An ingestor without a cluster, exact: it stores the hashes that it was told to compute.

    Args:
        block_size: tokens of a block.
        fingerprint: of the model.
        max_tokens: of the largest document.
        max_blocks: that are stored at one time; the oldest unpinned make room. None: any number.
        chunk_tokens: tokens between two calls of ``on_progress``.
        folder: keeps what is stored across processes, as durable as the real one.
    """

    def __init__(
        self,
        block_size: int,
        fingerprint: str,
        *,
        max_tokens: int = 1 << 20,
        max_blocks: int | None = None,
        chunk_tokens: int = 512,
        folder: Path | None = None,
    ) -> None:
        self.is_ready = True
        self.tiers: tuple[str, ...] = ("gpu",) if folder is None else ("gpu", "cpu", "disk")
        self.requests: list[IngestRequest] = []
        self.num_aborted = 0
        self.failures: list[Exception] = []  # raised by the next segments, halfway
        self.gate = asyncio.Event()  # closed, a segment waits at its first chunk
        self.gate.set()
        self.stored: dict[bytes, None] = {}  # in the order of their coming
        self.damaged: set[bytes] = set()
        self.pins: dict[str, tuple[tuple[bytes, ...], str]] = {}
        self.warmed: list[str] = []
        self._block_size = block_size
        self._fingerprint = fingerprint
        self._max_tokens = max_tokens
        self._max_blocks = max_blocks
        self._chunk_tokens = chunk_tokens
        self._path = None if folder is None else folder / "simulated-store"
        if self._path is not None and self._path.exists():
            self.stored = dict.fromkeys(_whole_hashes(self._path.read_bytes()))

    def max_tokens(self) -> int:
        return self._max_tokens

    def num_stored_blocks(self, block_hashes: Sequence[bytes]) -> int:
        for number, block_hash in enumerate(block_hashes):
            if block_hash not in self.stored:
                return number
        return len(block_hashes)

    def has_damaged(self, block_hashes: Sequence[bytes]) -> bool:
        return not self.damaged.isdisjoint(block_hashes)

    async def compute(
        self, request: IngestRequest, on_progress: Callable[[int], None]
    ) -> IngestResult:
        salt = block_salt(self._fingerprint, request.cache_salt)
        assert tuple(hash_blocks(request.token_ids, self._block_size, salt)) == request.block_hashes
        self.requests.append(request)
        num_cached = self.num_stored_blocks(request.block_hashes) * self._block_size
        total = len(request.token_ids)
        failure = self.failures.pop(0) if self.failures else None
        try:
            for done in range(num_cached, total, self._chunk_tokens):
                await self.gate.wait()
                await asyncio.sleep(0)
                on_progress(done)
                if failure is not None and done >= (num_cached + total) // 2 - self._chunk_tokens:
                    raise failure
        except asyncio.CancelledError:
            self.num_aborted += 1
            raise
        self._store(request.block_hashes)
        on_progress(total)
        return IngestResult(total - num_cached, num_cached, request.ring_size or 1, 0.0)

    def residency(self, block_hashes: Sequence[bytes]) -> list[Residence]:
        num_blocks = sum(block_hash in self.stored for block_hash in block_hashes)
        return [Residence(self.tiers[-1], "simulated", num_blocks)] if num_blocks else []

    def pin(self, document_id: str, block_hashes: Sequence[bytes], mode: str) -> None:
        self.pins[document_id] = (tuple(block_hashes), mode)

    def unpin(self, document_id: str) -> None:
        self.pins.pop(document_id, None)

    async def forget(self, block_hashes: Sequence[bytes]) -> None:
        self.evict(block_hashes)

    async def warm(self, request: IngestRequest) -> None:
        self.warmed.append(request.document_id)

    def evict(self, block_hashes: Iterable[bytes]) -> None:
        """Lose blocks, as a full store would."""
        for block_hash in block_hashes:
            self.stored.pop(block_hash, None)
        if self._path is not None:
            # A new file in place of the old one: nobody ever sees half of it.
            new = self._path.with_suffix(".new")
            new.write_bytes(b"".join(self.stored))
            new.replace(self._path)

    def _store(self, block_hashes: Sequence[bytes]) -> None:
        self.damaged.difference_update(block_hashes)
        new = [block_hash for block_hash in block_hashes if block_hash not in self.stored]
        self.stored.update(dict.fromkeys(new))
        if self._path is not None:
            with self._path.open("ab") as file:
                file.seek(0, os.SEEK_END)
                file.truncate(file.tell() // 16 * 16)  # a write that was cut off
                file.write(b"".join(new))
                file.flush()
                os.fsync(file.fileno())
        excess = 0 if self._max_blocks is None else len(self.stored) - self._max_blocks
        if excess > 0:
            kept = {h for hashes, _ in self.pins.values() for h in hashes} | set(block_hashes)
            self.evict([h for h in self.stored if h not in kept][:excess])


def _whole_hashes(data: bytes) -> list[bytes]:
    return [data[start : start + 16] for start in range(0, len(data) // 16 * 16, 16)]
