"""Movers bring the bytes of a pack from memory into a file and back: one interface, two ways.

A mover's constructor gets the whole memory of a store. A call names pieces of it, which lie end to
end in the file: for a pack, block after block, layer after layer. A mover does not know what a
block is, and its caller does not know how the bytes move.

:class:`VectoredMover` uses system calls. :class:`store.nixl_mover.NixlMover`, which is not in this
layer, uses a backend of NIXL.
"""

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple, final

_MAX_VECTOR = 1024  # IOV_MAX of Linux


class ByteRange(NamedTuple):
    """Bytes that lie in one piece in memory; ``offset`` is from the memory's first byte."""

    offset: int
    num_bytes: int


class FileMover(ABC):
    """Moves pieces of one memory into files and back. Any thread may call it.

    A call blocks until all has been moved or nothing moves any more. Even if it raises, no byte
    lands afterwards in memory, which the caller may have given to another block by then. The file
    may be closed as soon as a call returns. After a failed call the content of the memory, or of
    the file behind ``offset``, is undefined. The caller syncs the file.

    Args:
        memory: writable; it must outlive the mover.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    @final
    def read(self, file: int, offset: int, pieces: Sequence[ByteRange]) -> None:
        """Fill ``pieces`` with what lies in ``file`` from ``offset`` on.

        Raises:
            OSError: the file ends early, or cannot be read.
        """
        self._check(pieces)
        if pieces:
            self._read(file, offset, pieces)

    @final
    def write(self, file: int, offset: int, pieces: Sequence[ByteRange]) -> None:
        """Lay ``pieces`` end to end into ``file`` from ``offset`` on.

        Raises:
            OSError: the disk is full (``errno`` says so), or the file cannot be written.
        """
        self._check(pieces)
        if pieces:
            self._write(file, offset, pieces)

    @abstractmethod
    def close(self) -> None:
        """Free what it holds. No call may be under way, or come later. Idempotent."""

    @abstractmethod
    def _read(self, file: int, offset: int, pieces: Sequence[ByteRange]) -> None: ...

    @abstractmethod
    def _write(self, file: int, offset: int, pieces: Sequence[ByteRange]) -> None: ...

    def _check(self, pieces: Sequence[ByteRange]) -> None:
        size = self._memory.nbytes
        for offset, num_bytes in pieces:
            assert 0 <= offset <= offset + num_bytes <= size, (offset, num_bytes, size)


def ends_early() -> OSError:
    """The error of a read of a file that is shorter than it should be."""
    return OSError(errno.EIO, "the file ends early")


class VectoredMover(FileMover):
    """``preadv`` and ``pwritev``: no copy on the way, and up to 1024 pieces in one call."""

    def _read(self, file: int, offset: int, pieces: Sequence[ByteRange]) -> None:
        for views in self._vectors(pieces):
            while views:
                num_bytes = os.preadv(file, views, offset)
                if num_bytes == 0:
                    raise ends_early()
                offset += num_bytes
                views = _after(views, num_bytes)

    def _write(self, file: int, offset: int, pieces: Sequence[ByteRange]) -> None:
        for views in self._vectors(pieces):
            while views:
                num_bytes = os.pwritev(file, views, offset)
                offset += num_bytes
                views = _after(views, num_bytes)

    def close(self) -> None:
        pass  # it holds nothing

    def _vectors(self, pieces: Sequence[ByteRange]) -> Iterator[list[memoryview]]:
        for start in range(0, len(pieces), _MAX_VECTOR):
            yield [
                self._memory[offset : offset + num_bytes]
                for offset, num_bytes in pieces[start : start + _MAX_VECTOR]
            ]


def _after(views: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of ``views`` when the first ``num_bytes`` are done."""
    for index, view in enumerate(views):
        if num_bytes < len(view):
            return [view[num_bytes:], *views[index + 1 :]]
        num_bytes -= len(view)
    return []
