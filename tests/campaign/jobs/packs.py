"""A store of one process: the simulated ingestor on real packs, whose every byte is known."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from coordinator.jobs.engine.disk import insufficient_storage
from kvcache.pool import KVPool
from kvcache.tiers.files import PackFiles
from kvcache.tiers.pack import PackHeader
from protocol.kv import KVLayout
from protocol.process.crash_points import CrashPoints
from tests.coordinator.jobs.simulated_ingestor import SimulatedIngestor

NUM_LAYERS, NUM_BLOCKS = 2, 8  # more blocks than a segment has


class KnownPacks:
    """Packs of blocks whose KV follows from their hashes.

    Args:
        folder: where they lie.
        fingerprint: of the model.
        block_size: tokens of a block.
        crash_points: told of what becomes durable.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        block_size: int,
        crash_points: CrashPoints | None = None,
    ) -> None:
        self._layout = KVLayout(NUM_LAYERS, NUM_BLOCKS, 1, 0, 1, block_size, 4, "float32")
        pool = KVPool(self._layout, torch.device("cpu"))
        self._memory = pool.view()
        self._files = PackFiles(folder, pool, fingerprint, crash_points=crash_points)

    def scan(self) -> Iterator[tuple[str, PackHeader]]:
        """Names and headers of whole packs."""
        return self._files.scan()

    def write(self, first_logical: int, parent: bytes, hashes: Sequence[bytes]) -> str:
        """Make a pack; its name.

        Raises:
            OSError: the disk is full.
        """
        for block_id, block_hash in enumerate(hashes):
            for layer in range(NUM_LAYERS):
                self._view(layer, block_id)[:] = self._content(block_hash, layer)
        return self._files.write(first_logical, parent, hashes, range(len(hashes)))[0]

    def is_right(self, name: str, header: PackHeader) -> bool:
        """Whether a pack holds what its hashes say.

        Raises:
            PackError: it cannot be read.
        """
        block_ids = range(header.num_blocks)
        self._files.read(name, block_ids, block_ids)
        return all(
            self._view(layer, block_id) == self._content(header.hashes[block_id], layer)
            for layer in range(NUM_LAYERS)
            for block_id in block_ids
        )

    def delete(self, name: str) -> None:
        """Idempotent."""
        self._files.delete(name)

    def _view(self, layer: int, block_id: int) -> memoryview:
        start = self._layout.offset(layer, block_id, 0)
        return self._memory[start : start + self._layout.block_bytes]

    def _content(self, block_hash: bytes, layer: int) -> bytes:
        return hashlib.shake_128(block_hash + bytes([layer])).digest(self._layout.block_bytes)


class PackIngestor(SimulatedIngestor):
    """The simulated ingestor; what it stores lies in packs, and is found there by the next process.

    Args:
        folder: of the packs.
        fingerprint: of the model.
        block_size: tokens of a block.
        crash_points: told of what becomes durable.
    """

    def __init__(
        self, folder: Path, fingerprint: str, block_size: int, crash_points: CrashPoints
    ) -> None:
        super().__init__(block_size, fingerprint, chunk_tokens=block_size)
        self.tiers = ("gpu", "cpu", "disk")
        self._packs = KnownPacks(folder, fingerprint, block_size, crash_points)
        self._hashes: dict[str, tuple[bytes, ...]] = {}
        for name, header in self._packs.scan():
            self._hashes[name] = header.hashes
            self.stored.update(dict.fromkeys(header.hashes))

    def _store(self, block_hashes: Sequence[bytes]) -> None:
        first = self.num_stored_blocks(block_hashes)
        new = tuple(block_hashes[first:])
        if not new:
            return
        parent = block_hashes[first - 1] if first else b""
        try:
            name = self._packs.write(first, parent, new)
        except OSError as error:  # as a real store refuses an offload
            raise insufficient_storage("the store's disk is full") from error
        self._hashes[name] = new
        self.stored.update(dict.fromkeys(new))

    def evict(self, block_hashes: Iterable[bytes]) -> None:
        gone = set(block_hashes)
        for name, hashes in list(self._hashes.items()):
            if gone.issuperset(hashes):  # documents have whole packs in common, or nothing
                del self._hashes[name]
                self._packs.delete(name)
                for block_hash in hashes:
                    del self.stored[block_hash]
