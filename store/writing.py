"""Write-behind: what a store has taken in goes to disk, and who waits for that. Pure.

The life of a write
1. ``keep`` takes blocks over from their offload, names them by their hashes, so that they can be
   lent from now on, and makes one job of each ``pack_blocks`` of them. Packs of less value make
   room.
2. ``on_written``: they are durable. The store lets go of the blocks; they stay in its memory until
   others need the room.
3. A disk that is full gives up what is worth least, once; after that the write has failed, and all
   who wait for it learn it.

Who brings what another offload is writing already waits for that write.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvcache.blocks import BlockPool
from kvcache.tiers.index import PackIndex
from kvcache.tiers.jobs import DeletePacks, DiskJob, PackWritten, WritePack
from protocol.kv import BlockRef
from protocol.request import RequestKey


@dataclass(slots=True)
class _Write:
    job: WritePack
    num_bytes: int
    waiters: set[RequestKey] = field(default_factory=set)
    is_retry: bool = False


@dataclass(frozen=True, slots=True)
class Chain:
    """Adjacent blocks of one prompt, from ``first_logical`` on, behind the block ``parent``."""

    first_logical: int
    parent: bytes
    hashes: tuple[bytes, ...]


class WriteBehind:
    """The writes under way.

    Args:
        pool: the store's memory.
        index: the store's disk.
        block_bytes: of one block, all layers.
        pack_blocks: of one pack at most.
    """

    def __init__(
        self, pool: BlockPool, index: PackIndex, block_bytes: int, pack_blocks: int
    ) -> None:
        self._pool = pool
        self._index = index
        self._block_bytes = block_bytes
        self._pack_blocks = pack_blocks
        self._writes: dict[int, _Write] = {}
        self._writing: dict[bytes, int] = {}
        self._waiting: dict[RequestKey, set[int]] = {}
        self._num_jobs = 0
        self._jobs: list[DiskJob] = []
        self._stored: list[bytes] = []
        self._evicted: list[bytes] = []
        self._damaged: list[bytes] = []
        self.num_written_bytes = 0

    def __len__(self) -> int:
        return len(self._writes)

    def covers(self, block_hash: bytes) -> bool:
        """Whether a block is durable, or will be in a moment."""
        return block_hash in self._index or block_hash in self._writing

    def keep(
        self, key: RequestKey | None, chain: Chain, blocks: Sequence[BlockRef], now: float
    ) -> str:
        """Take over ``blocks``, which their offload owns, and write what is not there yet.

        Args:
            key: who waits for it.
            chain: what the blocks hold, one hash for each.

        Returns:
            Why it cannot be written, or an empty string.
        """
        num_known = 0
        while num_known < len(chain.hashes) and self.covers(chain.hashes[num_known]):
            num_known += 1
        self._pool.release(blocks[:num_known])
        error = ""
        for start in range(num_known, len(chain.hashes), self._pack_blocks):
            end = min(start + self._pack_blocks, len(chain.hashes))
            part = Chain(
                chain.first_logical + start,
                chain.hashes[start - 1] if start else chain.parent,
                chain.hashes[start:end],
            )
            error = error or self._begin(part, tuple(blocks[start:end]), now)
        if error:
            self._pool.release(
                [block for block in blocks[num_known:] if not self._is_writing(block)]
            )
        if key is not None:
            self.wait(key, chain.hashes)
        return error

    def wait(self, key: RequestKey, hashes: Sequence[bytes]) -> None:
        """``key`` waits until these are durable, as far as they are being written."""
        for number in {self._writing[h] for h in hashes if h in self._writing}:
            self._writes[number].waiters.add(key)
            self._waiting.setdefault(key, set()).add(number)

    def is_waiting(self, key: RequestKey) -> bool:
        return key in self._waiting

    def forget(self, key: RequestKey) -> None:
        """It does not wait any more; what is being written will be."""
        for number in self._waiting.pop(key, ()):
            if number in self._writes:
                self._writes[number].waiters.discard(key)

    def _is_writing(self, block: BlockRef) -> bool:
        return any(block in write.job.blocks for write in self._writes.values())

    def _begin(self, chain: Chain, blocks: tuple[BlockRef, ...], now: float) -> str:
        num_bytes = len(blocks) * self._block_bytes
        victims = self._make_room(num_bytes, now)
        if victims is None:
            return "what is kept on disk is pinned, and the disk quota is used up"
        self._num_jobs += 1
        job = WritePack(
            number=self._num_jobs,
            first_logical=chain.first_logical,
            parent=chain.parent,
            hashes=chain.hashes,
            blocks=blocks,
            victims=victims,
        )
        for block, block_hash in zip(blocks, chain.hashes, strict=True):
            self._pool.set_hash(block, block_hash)
            self._writing[block_hash] = job.number
        self._writes[job.number] = _Write(job, num_bytes)
        self._index.num_reserved_bytes += num_bytes
        self._jobs.append(job)
        return ""

    def _make_room(self, num_bytes: int, now: float) -> tuple[str, ...] | None:
        victims = self._index.room_for(num_bytes, now)
        if victims is None:
            return None
        for name in victims:
            self._evicted += self._index.remove(name)
        self._index.num_evicted += len(victims)
        return tuple(victims)

    # -- what the disk says ------------------------------------------------------------------------

    def on_written(
        self, done: PackWritten, now: float
    ) -> tuple[list[RequestKey], list[RequestKey]]:
        """(who waits for nothing more, who waited for this in vain)."""
        write = self._writes[done.number]
        if done.error and done.is_full and not write.is_retry and self._retry(write, now):
            return [], []
        del self._writes[done.number]
        self._index.num_reserved_bytes -= write.num_bytes
        for block_hash in write.job.hashes:
            del self._writing[block_hash]
        self._pool.release(write.job.blocks)
        waiters = sorted(write.waiters)
        if done.header is None:
            for key in waiters:
                self.forget(key)
            return [], waiters
        self.num_written_bytes += write.num_bytes
        self._stored += self._index.add(done.name, done.header, now)
        ready = []
        for key in waiters:
            self._waiting[key].discard(done.number)
            if not self._waiting[key]:
                del self._waiting[key]
                ready.append(key)
        return ready, []

    def _retry(self, write: _Write, now: float) -> bool:
        """Once more, with something given up; False if there is nothing to give up."""
        index = self._index
        quota, reserved = index.quota_bytes, index.num_reserved_bytes
        # The disk holds less than the quota allows: what is there now is all that it takes.
        index.quota_bytes, index.num_reserved_bytes = min(quota, index.num_bytes), 0
        victims = self._make_room(write.num_bytes, now)
        index.quota_bytes, index.num_reserved_bytes = quota, reserved
        if victims is None:
            return False
        write.is_retry = True
        job = write.job
        self._jobs.append(
            WritePack(
                number=job.number,
                first_logical=job.first_logical,
                parent=job.parent,
                hashes=job.hashes,
                blocks=job.blocks,
                victims=victims,
            )
        )
        return True

    def delete(self, names: Sequence[str], *, are_damaged: bool = False) -> None:
        """Give packs up at once."""
        for name in names:
            gone = self._index.remove(name)
            self._evicted += gone
            self._damaged += gone if are_damaged else ()
        if names:
            self._jobs.append(DeletePacks(tuple(names)))

    # -- out ---------------------------------------------------------------------------------------

    def take_jobs(self) -> list[DiskJob]:
        jobs, self._jobs = self._jobs, []
        return jobs

    def take_damaged(self) -> tuple[bytes, ...]:
        """Hashes that were given up as damaged since the last call."""
        damaged = tuple(h for h in self._damaged if h not in self._index)
        self._damaged = []
        return damaged

    def take_changes(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Hashes that are on disk (newly, no longer) since the last call."""
        stored = tuple(h for h in self._stored if h in self._index)
        evicted = tuple(h for h in self._evicted if h not in self._index)
        self._stored, self._evicted = [], []
        return stored, evicted
