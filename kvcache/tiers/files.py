"""Reading and writing packs, straight from and into the memory of a store.

The bytes of one block of one layer are one piece in memory and one in the file, so a mover
(:mod:`kvcache.tiers.movers`) needs no copy on the way. A write that fails leaves no pack behind,
and nothing that could be taken for one.
"""

import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvcache.pool import KVPool
from kvcache.tiers.movers import ByteRange, FileMover, VectoredMover
from kvcache.tiers.pack import (
    SUFFIX,
    UNFINISHED,
    KVShape,
    PackError,
    PackHeader,
    encode_header,
    read_header,
)
from protocol.process.crash_points import CrashPoints
from protocol.process.failpoints import PACK_DELETED, PACK_RENAMED, PACK_SYNCED, PACK_WRITTEN


class PackFiles:
    """The packs of one model in one folder. Any thread may call it.

    Args:
        folder: made if it is not there; unfinished files in it are removed.
        pool: the store's memory, on the host, with all heads.
        model_fingerprint: packs of other models are left alone.
        mover: of the pool's memory, and the caller closes it; vectored if none is given.
        crash_points: reached whenever something has become durable.
    """

    def __init__(
        self,
        folder: Path,
        pool: KVPool,
        model_fingerprint: str,
        mover: FileMover | None = None,
        crash_points: CrashPoints | None = None,
    ) -> None:
        self._crash_points = CrashPoints() if crash_points is None else crash_points
        self.folder = folder
        self.shape = KVShape.of(pool.layout)
        self.block_bytes = pool.layout.num_layers * pool.layout.block_bytes
        self._layout = pool.layout
        self._memory = pool.view()
        self._mover = mover if mover is not None else VectoredMover(self._memory)
        self._model_fingerprint = model_fingerprint
        self._numbers = itertools.count()
        self.damaged: list[tuple[bytes, str]] = []  # by ``scan``: a block's hash, and the reason
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in folder.glob(f"*{UNFINISHED}"):
            path.unlink(missing_ok=True)

    def scan(self) -> Iterator[tuple[str, PackHeader]]:
        """(name, header) of every usable pack; damaged ones are removed, they are only a cache."""
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            try:
                header, _ = read_header(path)
            except PackError as error:
                self.damaged.append((_first_hash(path), str(error)))
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
        """Make a pack of blocks, which must not change meanwhile. It is durable on return.

        Returns:
            The pack's name, and its header.

        Raises:
            OSError: the disk is full, or fails. No trace of the pack is left.
        """
        header = PackHeader(
            model_fingerprint=self._model_fingerprint,
            shape=self.shape,
            block_bytes=self.block_bytes,
            first_logical=first_logical,
            parent=parent,
            hashes=tuple(hashes),
            checksums=tuple(self.checksum(block_id) for block_id in block_ids),
        )
        name = f"{hashes[0].hex()}-{len(hashes)}-{os.getpid()}-{next(self._numbers)}"
        part = self.folder / f"{name}{UNFINISHED}"
        pack = self._path(name)
        try:
            with part.open("wb", buffering=0) as file:
                start = _write_all(file.fileno(), encode_header(header))
                self._mover.write(file.fileno(), start, self._pieces(block_ids))
                self._crash_points.reach(PACK_WRITTEN)
                os.fsync(file.fileno())
            self._crash_points.reach(PACK_SYNCED)
            part.rename(pack)
            self._crash_points.reach(PACK_RENAMED)
            _sync_folder(self.folder)
        except OSError:
            part.unlink(missing_ok=True)
            pack.unlink(missing_ok=True)  # it may be whole, but it is in no index
            raise
        return name, header

    def read(self, name: str, indices: Sequence[int], block_ids: Sequence[int]) -> None:
        """Bring blocks ``indices`` of a pack into memory as ``block_ids``, and check them.

        Raises:
            PackError: it is gone or damaged; the content of those blocks is then undefined.
        """
        path = self._path(name)
        header, start = read_header(path)
        try:
            with path.open("rb", buffering=0) as file:
                for first, count in _runs(indices):
                    offset = start + indices[first] * self.block_bytes
                    pieces = self._pieces(block_ids[first : first + count])
                    self._mover.read(file.fileno(), offset, pieces)
        except OSError as error:
            raise PackError(f"{name}: {error}") from error
        for index, block_id in zip(indices, block_ids, strict=True):
            if self.checksum(block_id) != header.checksums[index]:
                raise PackError(f"{name}: block {index} is damaged")

    def delete(self, name: str) -> None:
        """Delete a pack, if it is there."""
        self._path(name).unlink(missing_ok=True)
        self._crash_points.reach(PACK_DELETED)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def checksum(self, block_id: int) -> int:
        """CRC-32 of a block in memory."""
        value = 0
        for offset, num_bytes in self._pieces([block_id]):
            value = zlib.crc32(self._memory[offset : offset + num_bytes], value)
        return value

    def _pieces(self, block_ids: Sequence[int]) -> list[ByteRange]:
        """Where these blocks lie in memory, in the order in which a pack has them."""
        return [
            ByteRange(self._layout.offset(layer, block_id, 0), self._layout.block_bytes)
            for block_id in block_ids
            for layer in range(self.shape.num_layers)
        ]


def _first_hash(path: Path) -> bytes:
    """The hash of a damaged pack's first block, from its name: its header cannot be trusted."""
    try:
        return bytes.fromhex(path.name.partition("-")[0])
    except ValueError:
        return b""


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive numbers as (where it starts, how many)."""
    start = 0
    for position in range(1, len(indices) + 1):
        if position == len(indices) or indices[position] != indices[position - 1] + 1:
            yield start, position - start
            start = position


def _write_all(file: int, content: bytes) -> int:
    """Write at the file's beginning; returns the number of bytes."""
    done = 0
    while done < len(content):
        done += os.pwrite(file, content[done:], done)
    return done


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a rename alone may be lost in a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
