"""What a store asks of its disk threads, and what they answer. Plain data."""

from dataclasses import dataclass

from kvcache.tiers.pack import PackHeader
from protocol.kv import BlockRef


@dataclass(frozen=True, slots=True)
class WritePack:
    """Make a pack of these blocks, after giving up ``victims``; answered by PackWritten."""

    number: int
    first_logical: int
    parent: bytes
    hashes: tuple[bytes, ...]
    blocks: tuple[BlockRef, ...]
    victims: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReadPack:
    """Bring blocks ``indices`` of a pack into these blocks; answered by PackRead."""

    number: int
    name: str
    indices: tuple[int, ...]
    blocks: tuple[BlockRef, ...]


@dataclass(frozen=True, slots=True)
class DeletePacks:
    """Answered by nothing."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PackWritten:
    """``error`` is empty when it is durable."""

    number: int
    name: str = ""
    header: PackHeader | None = None
    error: str = ""
    is_full: bool = False  # of an error: the disk is


@dataclass(frozen=True, slots=True)
class PackRead:
    number: int
    error: str = ""


DiskJob = WritePack | ReadPack | DeletePacks
DiskDone = PackWritten | PackRead
