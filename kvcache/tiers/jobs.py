"""The jobs of a store's disk threads, and their results. Plain data."""

from dataclasses import dataclass

from kvcache.tiers.pack import PackHeader
from protocol.kv import BlockRef


@dataclass(frozen=True, slots=True)
class WritePack:
    """Make a pack of these blocks, after deleting ``victims``; PackWritten answers."""

    number: int
    first_logical: int
    parent: bytes
    hashes: tuple[bytes, ...]
    blocks: tuple[BlockRef, ...]
    victims: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReadPack:
    """Bring blocks ``indices`` of a pack into these blocks; PackRead answers."""

    number: int
    name: str
    indices: tuple[int, ...]
    blocks: tuple[BlockRef, ...]


@dataclass(frozen=True, slots=True)
class DeletePacks:
    """Delete packs; nothing answers."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PackWritten:
    """The result of WritePack. ``error`` is empty when the pack is durable."""

    number: int
    name: str = ""
    header: PackHeader | None = None
    error: str = ""
    is_full: bool = False  # the error is that the disk is full


@dataclass(frozen=True, slots=True)
class PackRead:
    """The result of ReadPack. ``error`` is empty when the blocks are in memory."""

    number: int
    error: str = ""


DiskJob = WritePack | ReadPack | DeletePacks
DiskDone = PackWritten | PackRead
