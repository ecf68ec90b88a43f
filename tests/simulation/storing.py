"""A store: the real node over a simulated memory, and a disk that survives it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Never, assert_never

from bench.simulate.gangs import Site
from kvcache.blocks import BlockPool
from kvcache.tiers.index import PackIndex
from kvcache.tiers.jobs import (
    DeletePacks,
    DiskDone,
    DiskJob,
    PackRead,
    PackWritten,
    ReadPack,
    WritePack,
)
from kvcache.tiers.pack import KVShape, PackHeader
from kvtransfer.events import Command
from protocol.kv import KVLayout
from protocol.plans import StepResult
from store.facts import StoreFacts
from store.scheduler import StoreScheduler
from tests.simulation.gangs import FINGERPRINT, CheckedGang
from tests.simulation.model import BLOCK_SIZE, NUM_HEADS, NUM_LAYERS

DISK_S = 0.02
PACK_BLOCKS = 4
SHAPE = KVShape(NUM_LAYERS, NUM_HEADS, BLOCK_SIZE, 1, "float32")


@dataclass
class SimulatedDisk:
    """What is durable: a pack is there as a whole or not at all."""

    quota_blocks: int
    packs: dict[str, tuple[PackHeader, list[list[bytes]]]] = field(default_factory=dict)
    num_written: int = 0


class StoreGang(CheckedGang[Never]):
    """A store.

    Args:
        disk: of all its lives.
    """

    def __init__(self, disk: SimulatedDisk, site: Site, layouts: Sequence[KVLayout]) -> None:
        self._disk = disk
        super().__init__(site, layouts)

    def _make_node(self) -> StoreScheduler:
        memory = self.ranks[0].memory
        self._block_bytes = NUM_LAYERS * memory.layout.block_bytes
        index = PackIndex(self._disk.quota_blocks * self._block_bytes)
        for name, (header, _) in self._disk.packs.items():
            index.add(name, header, self.world.now)
        facts = StoreFacts(
            model_fingerprint=FINGERPRINT,
            block_size=BLOCK_SIZE,
            block_bytes=self._block_bytes,
            pack_blocks=PACK_BLOCKS,
        )
        return StoreScheduler(facts, BlockPool(memory.layout.num_blocks, BLOCK_SIZE), index)

    def _execute(self, plan: Never) -> list[StepResult]:
        assert_never(plan)

    def _do(self, command: Command) -> None:
        if isinstance(command, DiskJob):
            self.world.at(self.world.delay(DISK_S), partial(self._use_disk, command))
        else:
            super()._do(command)

    # -- the disk ----------------------------------------------------------------------------------

    def _use_disk(self, job: DiskJob) -> None:
        if not self.is_alive:
            return
        done: DiskDone
        match job:
            case DeletePacks():
                for name in job.names:
                    self._disk.packs.pop(name, None)
                return
            case WritePack():
                done = self._write(job)
            case ReadPack():
                done = self._read(job)
        self.on_event(done)

    def _write(self, job: WritePack) -> PackWritten:
        for name in job.victims:
            self._disk.packs.pop(name, None)
        if self.world.happens(self.world.model.failed, "disk full"):
            return PackWritten(job.number, error="no space left", is_full=True)
        memory = self.ranks[0].memory
        saved = [memory.save(block.block_id) for block in job.blocks]
        header = PackHeader(
            FINGERPRINT,
            SHAPE,
            self._block_bytes,
            job.first_logical,
            job.parent,
            job.hashes,
            (0,) * len(job.hashes),
        )
        self._disk.num_written += 1
        name = f"pack{self._disk.num_written}"
        self._disk.packs[name] = (header, saved)
        return PackWritten(job.number, name, header)

    def _read(self, job: ReadPack) -> PackRead:
        found = self._disk.packs.get(job.name)
        memory = self.ranks[0].memory
        if found is None or self.world.happens(self.world.model.corrupted, "pack damaged"):
            for block in job.blocks:  # what is there now is nothing
                parts = memory.save(block.block_id)
                memory.restore(block.block_id, [b"\x5a" * len(part) for part in parts])
            return PackRead(job.number, "damaged")
        for index, block in zip(job.indices, job.blocks, strict=True):
            memory.restore(block.block_id, found[1][index])
        return PackRead(job.number)
