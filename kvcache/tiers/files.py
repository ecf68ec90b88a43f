"""Reading and writing packs, straight from and into the memory of a store.

The bytes of one block of one layer are one run in memory and one run in the file, so a vectored
read or write moves them without a copy on the way. What fails leaves no pack behind, and nothing
that anybody would take for one.
"""

import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvcache.pool import KVPool
from kvcache.tiers.pack import (
    SUFFIX,
    UNFINISHED,
    KVShape,
    PackError,
    PackHeader,
    encode_header,
    read_header,
)
from protocol.failpoints import PACK_DELETED, PACK_RENAMED, PACK_SYNCED, PACK_WRITTEN
from protocol.places import Places

_MAX_VECTOR = 1024  # IOV_MAX of Linux


class PackFiles:
    """The packs of one model in one folder. Any thread may call it.

    Args:
        folder: made if it is not there; unfinished files in it are removed.
        pool: the store's memory, on the host, with all heads.
        model_fingerprint: packs of other models are left alone.
        places: told of what becomes durable.
    """

    def __init__(
        self, folder: Path, pool: KVPool, model_fingerprint: str, places: Places | None = None
    ) -> None:
        self._places = Places() if places is None else places
        self.folder = folder
        self.shape = KVShape.of(pool.layout)
        self.block_bytes = pool.layout.num_layers * pool.layout.block_bytes
        self._layout = pool.layout
        self._memory = pool.view()
        self._model_fingerprint = model_fingerprint
        self._numbers = itertools.count()
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"*{UNFINISHED}"):
            path.unlink(missing_ok=True)

    def scan(self) -> Iterator[tuple[str, PackHeader]]:
        """(name, header) of every usable pack; damaged ones are removed, they are only a cache."""
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            try:
                header, _ = read_header(path)
            except PackError:
                path.unlink(missing_ok=True)
                continue
            if (header.model_fingerprint, header.shape) == (self._model_fingerprint, self.shape):
                yield path.stem, header

    def write(
        self,
        first_logical: int,
        parent: bytes,
        hashes: Sequence[bytes],
        block_ids: Sequence[int],
    ) -> tuple[str, PackHeader]:
        """Make a pack of blocks that nobody changes meanwhile; it is durable when this returns.

        Raises:
            OSError: the disk is full, or fails. No trace of the pack is left.
        """
        header = PackHeader(
            self._model_fingerprint,
            self.shape,
            self.block_bytes,
            first_logical,
            parent,
            tuple(hashes),
            tuple(self.checksum(block_id) for block_id in block_ids),
        )
        name = f"{hashes[0].hex()}-{len(hashes)}-{os.getpid()}-{next(self._numbers)}"
        part, pack = self.folder / f"{name}{UNFINISHED}", self._path(name)
        try:
            with part.open("wb", buffering=0) as file:
                views = [memoryview(encode_header(header))]
                views += [view for block_id in block_ids for view in self._views(block_id)]
                _write_all(file.fileno(), views)
                self._places.reach(PACK_WRITTEN)
                os.fsync(file.fileno())
            self._places.reach(PACK_SYNCED)
            part.rename(pack)
            self._places.reach(PACK_RENAMED)
            _sync_folder(self.folder)
        except OSError:
            part.unlink(missing_ok=True)
            pack.unlink(missing_ok=True)  # nobody will know of it
            raise
        return name, header

    def read(self, name: str, indices: Sequence[int], block_ids: Sequence[int]) -> None:
        """Bring blocks ``indices`` of a pack into memory as ``block_ids``, and check them.

        Raises:
            PackError: it is gone or damaged; what is in those blocks now is nothing.
        """
        path = self._path(name)
        header, start = read_header(path)
        try:
            with path.open("rb", buffering=0) as file:
                for first, count in _runs(indices):
                    ids = block_ids[first : first + count]
                    views = [view for block_id in ids for view in self._views(block_id)]
                    offset = start + indices[first] * self.block_bytes
                    _read_all(file.fileno(), views, offset)
        except OSError as error:
            raise PackError(f"{name}: {error}") from error
        for index, block_id in zip(indices, block_ids, strict=True):
            if self.checksum(block_id) != header.checksums[index]:
                raise PackError(f"{name}: block {index} is damaged")

    def delete(self, name: str) -> None:
        """Idempotent."""
        self._path(name).unlink(missing_ok=True)
        self._places.reach(PACK_DELETED)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def checksum(self, block_id: int) -> int:
        """CRC-32 of a block in memory."""
        value = 0
        for view in self._views(block_id):
            value = zlib.crc32(view, value)
        return value

    def _views(self, block_id: int) -> list[memoryview]:
        size = self._layout.block_bytes
        offsets = (
            self._layout.offset(layer, block_id, 0) for layer in range(self.shape.num_layers)
        )
        return [self._memory[offset : offset + size] for offset in offsets]


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive numbers as (where it starts, how many)."""
    start = 0
    for position in range(1, len(indices) + 1):
        if position == len(indices) or indices[position] != indices[position - 1] + 1:
            yield start, position - start
            start = position


def _write_all(file: int, views: list[memoryview]) -> None:
    for chunk in _chunks(views):
        while chunk:
            chunk = _after(chunk, os.writev(file, chunk))


def _read_all(file: int, views: list[memoryview], offset: int) -> None:
    for chunk in _chunks(views):
        while chunk:
            num_bytes = os.preadv(file, chunk, offset)
            if num_bytes == 0:
                raise OSError("the file ends early")
            offset += num_bytes
            chunk = _after(chunk, num_bytes)


def _chunks(views: list[memoryview]) -> Iterator[list[memoryview]]:
    for start in range(0, len(views), _MAX_VECTOR):
        yield views[start : start + _MAX_VECTOR]


def _after(views: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of ``views`` when the first ``num_bytes`` are done."""
    for index, view in enumerate(views):
        if num_bytes < len(view):
            return [view[num_bytes:], *views[index + 1 :]]
        num_bytes -= len(view)
    return []


def _sync_folder(folder: Path) -> None:
    """Make the names in it durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
