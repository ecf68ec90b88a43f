"""Write-behind: new blocks of a store go to disk, and offloads wait until they are durable. Pure.

The life of a write
1. ``keep`` takes blocks over from their offload, names them by their hashes, so that other pools
   can have them from now on, and makes one job of each ``pack_blocks`` of them. Packs of less value
   make room.
2. ``on_written``: the blocks are durable. They are released, and stay in memory until others need
   the room.
3. When the disk is full, the packs of least value are evicted, once. After that the write has
   failed, and so have all offloads that wait for it.

An offload of blocks that another one is writing already waits for that write.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from engine.leader_node import Commands
from kvcache.blocks import BlockPool
from kvcache.tiers.index import PackIndex
from kvcache.tiers.jobs import DeletePacks, PackWritten, WritePack
from protocol.kv import BlockRef
from protocol.request import RequestKey
from store.facts import StoreFacts


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
        blocks: the store's memory.
        index: the store's disk.
        facts: of the store.
        commands: takes what follows.
    """

    def __init__(
        self, blocks: BlockPool, index: PackIndex, facts: StoreFacts, commands: Commands
    ) -> None:
        self._blocks = blocks
        self._index = index
        self._facts = facts
        self._commands = commands
        self._writes: dict[int, _Write] = {}  # by job
        self._writing: dict[bytes, int] = {}  # the job that writes a block
        self._waiting: dict[RequestKey, set[int]] = {}  # the jobs that an offload waits for
        self._num_jobs = 0
        self._stored: list[bytes] = []
        self._evicted: list[bytes] = []
        self._damaged: list[bytes] = []
        self.num_written_bytes = 0

    def __len__(self) -> int:
        return len(self._writes)

    def covers(self, block_hash: bytes) -> bool:
        """Whether a block is durable, or is being written."""
        return block_hash in self._index or block_hash in self._writing

    def keep(
        self, key: RequestKey | None, chain: Chain, blocks: Sequence[BlockRef], now: float
    ) -> str:
        """Take over ``blocks``, which their offload owns, and write what is not there yet.

        Args:
            key: of the offload that waits for it, if one does.
            chain: the content of the blocks, one hash for each.
            blocks: in the order of ``chain``.
            now: for the value of packs.

        Returns:
            Why it cannot be written, or an empty string.
        """
        num_known = 0
        while num_known < len(chain.hashes) and self.covers(chain.hashes[num_known]):
            num_known += 1
        self._blocks.release(blocks[:num_known])
        error = ""
        for start in range(num_known, len(chain.hashes), self._facts.pack_blocks):
            end = min(start + self._facts.pack_blocks, len(chain.hashes))
            part = Chain(
                first_logical=chain.first_logical + start,
                parent=chain.hashes[start - 1] if start else chain.parent,
                hashes=chain.hashes[start:end],
            )
            error = error or self._begin(part, tuple(blocks[start:end]), now)
        if error:
            self._blocks.release(
                [block for block in blocks[num_known:] if not self._is_writing(block)]
            )
        if key is not None:
            self.wait(key, chain.hashes)
        return error

    def wait(self, key: RequestKey, hashes: Sequence[bytes]) -> None:
        """Have an offload wait until these blocks are durable, as far as they are being written."""
        for number in {self._writing[h] for h in hashes if h in self._writing}:
            self._writes[number].waiters.add(key)
            self._waiting.setdefault(key, set()).add(number)

    def is_waiting(self, key: RequestKey) -> bool:
        return key in self._waiting

    def forget(self, key: RequestKey) -> None:
        """Let an offload wait no more. The writes go on."""
        for number in self._waiting.pop(key, ()):
            if number in self._writes:
                self._writes[number].waiters.discard(key)

    def _is_writing(self, block: BlockRef) -> bool:
        return any(block in write.job.blocks for write in self._writes.values())

    def _begin(self, chain: Chain, blocks: tuple[BlockRef, ...], now: float) -> str:
        num_bytes = len(blocks) * self._facts.block_bytes
        victims = self._make_room(num_bytes, now)
        if victims is None:
            return "the disk quota is used up, and all packs are pinned or in use"
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
            self._blocks.set_hash(block, block_hash)
            self._writing[block_hash] = job.number
        self._writes[job.number] = _Write(job, num_bytes)
        self._index.num_reserved_bytes += num_bytes
        self._commands.add(job)
        return ""

    def _make_room(self, num_bytes: int, now: float) -> tuple[str, ...] | None:
        victims = self._index.room_for(num_bytes, now)
        if victims is None:
            return None
        for name in victims:
            self._evicted += self._index.remove(name)
        self._index.num_evicted += len(victims)
        return tuple(victims)

    # -- results -----------------------------------------------------------------------------------

    def on_written(
        self, done: PackWritten, now: float
    ) -> tuple[list[RequestKey], list[RequestKey]]:
        """Take in the end of a job.

        Returns:
            (offloads that wait for nothing more, offloads whose write has failed).
        """
        write = self._writes[done.number]
        if done.error and done.is_full and not write.is_retry and self._retry(write, now):
            return [], []
        del self._writes[done.number]
        self._index.num_reserved_bytes -= write.num_bytes
        for block_hash in write.job.hashes:
            del self._writing[block_hash]
        self._blocks.release(write.job.blocks)
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
        """Write once more, after evicting packs; False if there is none to evict."""
        index = self._index
        quota = index.quota_bytes
        reserved = index.num_reserved_bytes
        # The disk is smaller than the quota. So for this choice the bytes that are there now count
        # as the quota, and only evicting packs makes room.
        index.quota_bytes = min(quota, index.num_bytes)
        index.num_reserved_bytes = 0
        victims = self._make_room(write.num_bytes, now)
        index.quota_bytes = quota
        index.num_reserved_bytes = reserved
        if victims is None:
            return False
        write.is_retry = True
        self._commands.add(replace(write.job, victims=victims))
        return True

    def delete(self, names: Sequence[str], *, are_damaged: bool = False) -> None:
        """Delete packs at once."""
        for name in names:
            gone = self._index.remove(name)
            self._evicted += gone
            self._damaged += gone if are_damaged else ()
        if names:
            self._commands.add(DeletePacks(tuple(names)))

    # -- out ---------------------------------------------------------------------------------------

    def take_damaged(self) -> tuple[bytes, ...]:
        """Hashes that were found damaged since the last call, and are not on disk any more."""
        damaged = tuple(h for h in self._damaged if h not in self._index)
        self._damaged = []
        return damaged

    def take_changes(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Hashes that are on disk (newly, no longer) since the last call."""
        stored = tuple(h for h in self._stored if h in self._index)
        evicted = tuple(h for h in self._evicted if h not in self._index)
        self._stored = []
        self._evicted = []
        return stored, evicted
