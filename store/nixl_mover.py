"""Packs through NIXL: its POSIX backend, or GPUDirect Storage; the same code for both.

The life of a call
1. an idle agent is taken, or a new one is made: NIXL's agents are for one thread at a time, and
   there are as many as there are disk threads;
2. the file is registered with it, by its descriptor;
3. the pieces are posted, a bounded number at a time, and each post is polled to its end;
4. the file is deregistered, for its descriptor's number will be another file's, and the agent is
   idle again.

An agent whose post has failed is not used again. NIXL does not cancel; its POSIX backend says that
a post has failed when all of it has ended, and ending the agent ends its kernel queue, which waits
for what a failed queue left behind. Its GDS backend has cuFile cancel the batch.

The store's memory is of kind DRAM for both: GDS is for devices, but takes host memory too.
"""

import errno
import itertools
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from nixl import nixl_agent, nixl_agent_config

from kvcache.tiers.movers import ByteRange, FileMover, ends_early
from kvtransfer.transport.nixl_library import NIXL_ERRORS, route_library_log
from protocol.errors import ConfigError

# The POSIX backend hands so many to the kernel at once, and the rest only when it is polled. The
# GDS backend tells of a failure for certain only if a post is one batch of cuFile, of up to 128.
_POST_PIECES = 64
_EAGER_POLLS = 100  # what lies in the page cache has ended after one
_POLL_PAUSE_S = 1e-4

_FAILURES = (*NIXL_ERRORS, RuntimeError)
_Rows = npt.NDArray[np.uint64]  # [n, 3]: address or offset, bytes, device or file
_log = logging.getLogger(__name__)


class NixlMover(FileMover):
    """Moves with one of NIXL's storage backends.

    Args:
        memory: see FileMover; it is registered as a whole.
        backend: "POSIX" or "GDS".

    Raises:
        ConfigError: this NIXL has no such backend, or it does not start on this machine.
    """

    def __init__(self, memory: memoryview, backend: str) -> None:
        super().__init__(memory)
        self._backend = backend
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        try:
            self._idle = [self._open_agent()]
        except _FAILURES as error:
            raise ConfigError(
                f"NIXL cannot start its {backend} backend here ({error}): "
                "the plugin, or a library or driver that it needs, is missing"
            ) from error

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _read(self, file: int, offset: int, pieces: Sequence[ByteRange]) -> None:
        if os.fstat(file).st_size < offset + _size(pieces):
            raise ends_early()
        self._move("READ", file, offset, pieces)

    def _write(self, file: int, offset: int, pieces: Sequence[ByteRange]) -> None:
        # NIXL's errors have no errno, and a full disk is not like any other: it is noticed here.
        os.posix_fallocate(file, offset, _size(pieces))
        self._move("WRITE", file, offset, pieces)

    def _move(self, operation: str, file: int, offset: int, pieces: Sequence[ByteRange]) -> None:
        try:
            agent = self._take()
        except _FAILURES as error:
            raise self._failed(error) from error
        try:
            agent.move(operation, file, offset, pieces)
        except _FAILURES as error:
            failure = self._failed(error)
        else:
            with self._lock:
                self._idle.append(agent)
            return
        # Behind the handler, whose traceback held the agent: it ends here and waits.
        agent.close()
        del agent
        raise failure

    def _take(self) -> "_Agent":
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return self._open_agent()

    def _open_agent(self) -> "_Agent":
        name = f"files-{os.getpid()}-{next(self._numbers)}"
        return _Agent(name, self._backend, self._memory)

    def _failed(self, error: Exception) -> OSError:
        return OSError(errno.EIO, f"NIXL {self._backend}: {error}")


class _Agent:
    """One NIXL agent with one backend, for one thread at a time."""

    def __init__(self, name: str, backend: str, memory: memoryview) -> None:
        route_library_log()
        self._name = name
        self._backends = [backend]
        self._nixl = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=[]))
        # Asked beforehand, because to create what is not there prints lines of its own.
        self._nixl.agent.getPluginParams(backend)
        self._nixl.create_backend(backend)
        self._base_address = int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)
        region = (self._base_address, memory.nbytes, 0, "")
        self._memory = self._nixl.register_memory([region], "DRAM", backends=self._backends)

    def move(self, operation: str, file: int, offset: int, pieces: Sequence[ByteRange]) -> None:
        """Returns when it is done; raises one of ``_FAILURES``, and must be closed then."""
        in_memory = np.zeros((len(pieces), 3), dtype=np.uint64)
        in_memory[:, :2] = pieces
        in_file = in_memory.copy()
        in_memory[:, 0] += np.uint64(self._base_address)
        in_file[1:, 0] = np.cumsum(in_file[:-1, 1])
        in_file[0, 0] = 0
        in_file[:, 0] += np.uint64(offset)
        in_file[:, 2] = file
        with self._registered(file, offset + _size(pieces)):
            for start in range(0, len(pieces), _POST_PIECES):
                rows = slice(start, start + _POST_PIECES)
                self._post(operation, in_memory[rows], in_file[rows])

    @contextmanager
    def _registered(self, file: int, num_bytes: int) -> Iterator[None]:
        region = (0, num_bytes, file, "")
        registered = self._nixl.register_memory([region], "FILE", backends=self._backends)
        try:
            yield
        finally:
            self._nixl.deregister_memory(registered, backends=self._backends)

    def _post(self, operation: str, in_memory: _Rows, in_file: _Rows) -> None:
        local = self._nixl.get_xfer_descs(in_memory, "DRAM")
        remote = self._nixl.get_xfer_descs(in_file, "FILE")
        handle = self._nixl.initialize_xfer(
            operation, local, remote, self._name, backends=self._backends
        )
        try:
            state = self._nixl.transfer(handle)
            num_polls = 0
            while state == "PROC":  # NIXL has nothing to wait on
                if num_polls > _EAGER_POLLS:
                    time.sleep(_POLL_PAUSE_S)
                state = self._nixl.check_xfer_state(handle)
                num_polls += 1
            if state != "DONE":
                raise RuntimeError(f"a transfer ended as {state}")
        finally:
            self._nixl.release_xfer_handle(handle)

    def close(self) -> None:
        try:
            self._nixl.deregister_memory(self._memory, backends=self._backends)
        except NIXL_ERRORS as error:
            _log.debug("deregistering the memory of %s: %s", self._name, error)
        del self._nixl


def _size(pieces: Sequence[ByteRange]) -> int:
    return sum(num_bytes for _, num_bytes in pieces)
