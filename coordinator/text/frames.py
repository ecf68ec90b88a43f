"""Frames between the coordinator and a text worker: one message each way, with at most one file.

What is short travels in the message itself; what is long lies in a file that has no name and is
nobody's heap (memfd), of which only the descriptor travels.
"""

import mmap
import os
import socket
import sys
from typing import Any

import msgspec

INLINE_BYTES = 32 << 10  # more is put into a file; a message of this size always fits the socket
MEMORY_FILES = sys.platform == "linux"  # else a file without a name is made on the disk
_FRAME_BYTES = 128 << 10
_ENCODER = msgspec.msgpack.Encoder()
_IN_FILE = b"\xc1"  # msgpack never uses it: the message is in the file


def memory_file(data: bytes | memoryview = b"") -> int:
    """A file without a name, whose memory is given back when the last who has it closes it."""
    if MEMORY_FILES:
        file = os.memfd_create("baton-text", os.MFD_CLOEXEC)
    else:
        import tempfile

        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    write_all(file, data)
    return file


def write_all(file: int, data: bytes | memoryview) -> None:
    """All of it at the end of a file."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def send(connection: socket.socket, message: Any, file: int | None = None) -> None:  # noqa: ANN401 - a Struct of tasks.py
    """Say it. A message too long for a frame must come without a file of its own.

    Raises:
        OSError: the other side is gone.
    """
    frame = _ENCODER.encode(message)
    if len(frame) <= INLINE_BYTES + 4096:
        socket.send_fds(connection, [frame], [] if file is None else [file])
        return
    assert file is None, "a task's bytes are in its file, so that the task itself is short"
    long = memory_file(frame)
    try:
        socket.send_fds(connection, [_IN_FILE], [long])
    finally:
        os.close(long)


def receive(connection: socket.socket) -> tuple[bytes | memoryview, int | None]:
    """(A message, the file that came with it); no message is the end. A long one is mapped."""
    frame, files, _, _ = socket.recv_fds(connection, _FRAME_BYTES, 1)
    file = files[0] if files else None
    if frame != _IN_FILE:
        return frame, file
    assert file is not None, "the message is in a file"
    try:
        return memoryview(mmap.mmap(file, 0, prot=mmap.PROT_READ)), None
    finally:
        os.close(file)
