"""Tensor parallelism: the collectives of a layer with the ranks that hold its other shards.

1. The leader opens the gang's meeting point (``open_gang_store``); its address travels in HELLO and
   WELCOME.
2. Every rank joins (``init_gang``) and builds its tensor-parallel group (``make_tensor_parallel``):
   shared memory for ranks of one host, else gloo or NCCL.
3. Each forward pass calls ``all_reduce_`` twice a layer and ``all_gather`` once for the logits.

Every rank of a group calls the same methods in the same order with the same shapes. After
``all_reduce_`` all ranks hold identical bits.
"""

import ctypes
import secrets
import socket
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from modeling.kernels.native_build import load_native
from protocol.errors import PeerError

TIMEOUT_S = 60.0  # a rank that is this late is taken for dead
SLOT_BYTES = 512 * 1024  # of one rank's part of a round: larger tensors take several rounds
_NAME_BYTES = 32


class TensorParallel(ABC):
    """One rank's view of its tensor-parallel group."""

    rank: int
    size: int

    @abstractmethod
    def all_reduce_(self, x: torch.Tensor) -> None:
        """Sum ``x`` over the group, in place and in fp32, to identical bits on every rank.

        Args:
            x: contiguous, floating point, the same shape on every rank.

        Raises:
            PeerError: a rank did not come within the group's timeout.
        """

    @abstractmethod
    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Concatenate every rank's ``x`` along ``dim`` in rank order.

        Args:
            x: the same shape and dtype on every rank. A group of one returns it as it is.

        Raises:
            PeerError: a rank did not come within the group's timeout.
        """

    def close(self) -> None:  # noqa: B027 - most groups hold nothing
        """Free the resources of the group; idempotent."""


class SingleRank(TensorParallel):
    """No tensor parallelism: the rank holds every shard."""

    rank = 0
    size = 1

    def all_reduce_(self, x: torch.Tensor) -> None:
        pass

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:  # noqa: ARG002 - one shard
        return x


class UnconnectedRank(TensorParallel):
    """A rank whose group has not formed: it has the shapes of its part, and sums nothing.

    A dry run with it shows the memory that a shard takes; its numbers mean nothing.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def all_reduce_(self, x: torch.Tensor) -> None:
        pass

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat([x] * self.size, dim)


class GroupTensorParallel(TensorParallel):
    """Over a torch.distributed group: NCCL between GPUs, gloo between hosts and as fallback.

    gloo's sums are identical on every rank, because each part is summed by one rank and sent on.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._group = group
        self._needs_host = dist.get_backend(group) == "gloo"

    def all_reduce_(self, x: torch.Tensor) -> None:
        device = torch.device("cpu") if self._needs_host else x.device
        total = x.to(device, torch.float32)  # x itself when it is fp32 and at home there
        with _as_peer_error("all-reduce"):
            dist.all_reduce(total, group=self._group)
        if total is not x:
            x.copy_(total)

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        part = (x.cpu() if self._needs_host else x).contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)]
        with _as_peer_error("all-gather"):
            dist.all_gather(parts, part, group=self._group)
        return torch.cat(parts, dim).to(x.device)


class SharedMemoryTensorParallel(TensorParallel):
    """Between the processes of one host, in POSIX shared memory; see kernels/cpp/shared_reduce.cpp.

    Args:
        name: of the shared memory; rank 0 creates it and the others open it after that. The
            caller unlinks it once all have opened it (:func:`unlink_shared_memory`).
        rank, size: of the group.
        timeout_s: how long a rank waits for the others.
        cache_dir: of the compiled library; None is the user's.

    Raises:
        PeerError: the library or the memory cannot be had.
    """

    def __init__(
        self,
        name: str,
        rank: int,
        size: int,
        timeout_s: float = TIMEOUT_S,
        cache_dir: Path | None = None,
    ) -> None:
        library = _load_library(cache_dir)
        if library is None:
            raise PeerError("the shared-memory library cannot be built here")
        handle = library.group_open(name.encode(), rank == 0, rank, size, SLOT_BYTES, timeout_s)
        if not handle:
            raise PeerError(f"shared memory {name} cannot be opened: is /dev/shm full?")
        self.rank = rank
        self.size = size
        self._library = library
        self._handle = handle
        self._finalize = weakref.finalize(self, library.group_close, handle)
        self._timeout_s = timeout_s

    def all_reduce_(self, x: torch.Tensor) -> None:
        assert x.is_contiguous() and x.device.type == "cpu" and self._finalize.alive
        if x.dtype == torch.float16:  # the library has no sum of these: wider, and back
            wide = x.float()
            self.all_reduce_(wide)
            x.copy_(wide)
            return
        if x.dtype == torch.float32:
            code = self._library.all_reduce_float32(self._handle, x.data_ptr(), x.numel())
        else:
            assert x.dtype == torch.bfloat16, f"cannot sum {x.dtype}"
            code = self._library.all_reduce_bfloat16(self._handle, x.data_ptr(), x.numel())
        self._check(code, "all-reduce")

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        assert self._finalize.alive
        part = x.contiguous()
        parts = torch.empty((self.size, *part.shape), dtype=x.dtype)
        code = self._library.all_gather_bytes(
            self._handle, part.data_ptr(), parts.data_ptr(), part.nbytes
        )
        self._check(code, "all-gather")
        return torch.cat(parts.unbind(0), dim)

    def close(self) -> None:
        """Unmap the memory; the others' next call raises PeerError."""
        self._finalize()

    def _check(self, code: int, what: str) -> None:
        if code == 0:
            return
        reasons = {
            -1: f"a rank has not come within {self._timeout_s:g} s",
            -2: "a rank has left the group",
            -3: "the ranks disagree on the size",
        }
        raise PeerError(f"{what} of rank {self.rank} of {self.size}: {reasons[code]}")


def unlink_shared_memory(name: str, cache_dir: Path | None = None) -> None:
    """Remove the name. The memory itself lasts until the last rank has closed it."""
    library = _load_library(cache_dir)
    assert library is not None, "rank 0 has created it with this library"
    library.group_unlink(name.encode())


def _load_library(cache_dir: Path | None) -> ctypes.CDLL | None:
    library = load_native("shared_reduce", cache_dir)
    if library is None:
        return None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.group_open.restype = pointer
    library.group_open.argtypes = (
        *(ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        *(count, ctypes.c_double),
    )
    library.group_unlink.argtypes = (ctypes.c_char_p,)
    library.group_close.argtypes = (pointer,)
    library.all_reduce_float32.argtypes = (pointer, pointer, count)
    library.all_reduce_bfloat16.argtypes = (pointer, pointer, count)
    library.all_gather_bytes.argtypes = (pointer, pointer, pointer, count)
    return library


# -- the gang --------------------------------------------------------------------------------------


def open_gang_store(host: str) -> tuple[str, int]:
    """Bind the socket at which a gang of several hosts will meet, on ``host`` alone.

    torch's TCPStore does not authenticate its clients. So a gang on one host does not use it: it
    meets in a file (``file://PATH``), in a folder that other users cannot enter.

    Returns:
        (address ``tcp://HOST:PORT``, listening file descriptor). The descriptor goes to
        :func:`init_gang`; connections made before that wait in its backlog.
    """
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    return f"tcp://{host}:{port}", listener.detach()


def _open_store(
    address: str, rank: int, world_size: int, timeout: timedelta, listen_fd: int
) -> dist.Store:  # type: ignore[name-defined]  # torch re-exports it silently
    where = urlsplit(address)
    if where.scheme == "file":
        store = dist.FileStore(where.path, world_size)  # type: ignore[attr-defined]
        store.set_timeout(timeout)
        return store
    assert where.hostname is not None and where.port is not None, address
    return dist.TCPStore(  # type: ignore[attr-defined]
        where.hostname,
        where.port,
        world_size,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listen_fd if rank == 0 else None,
    )


def init_gang(
    store_address: str,
    rank: int,
    world_size: int,
    backend: str,
    timeout_s: float,
    listen_fd: int = -1,
) -> None:
    """Form torch.distributed's default group over the gang; blocks until all ranks have come.

    gloo listens where GLOO_SOCKET_IFNAME of the process's environment says; the launcher sets it.

    Args:
        store_address: ``file://PATH`` of a file that is not there yet, or of
            :func:`open_gang_store`.
        listen_fd: of the latter, on rank 0 only.
        backend: "gloo", or "nccl" (then gloo still carries CPU tensors).
        timeout_s: for this, and for every later collective of the default group.

    Raises:
        PeerError: a rank has not come in time.
    """
    timeout = timedelta(seconds=timeout_s)
    device = None
    if backend == "nccl":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    with _as_peer_error(f"forming the gang at {store_address}"):
        store = _open_store(store_address, rank, world_size, timeout, listen_fd)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device,
        )
        dist.barrier()


def make_tensor_parallel(
    rank: int,
    cp_size: int,
    tp_size: int,
    device: torch.device,
    *,
    same_host: bool,
    timeout_s: float = TIMEOUT_S,
) -> TensorParallel:
    """This rank's tensor-parallel group in a (cp, tp) mesh, rank = cp_rank * tp_size + tp_rank.

    Collective over the whole gang, after :func:`init_gang`; with ``tp_size`` 1 nothing is needed.

    Args:
        same_host: all ranks can see one another's shared memory.

    Raises:
        PeerError: a rank has not come in time.
    """
    if tp_size == 1:
        return SingleRank()
    groups = []
    with _as_peer_error("building the tensor-parallel groups"):
        for cp_rank in range(cp_size):  # every rank must build every group, in this order
            members = list(range(cp_rank * tp_size, (cp_rank + 1) * tp_size))
            groups.append(dist.new_group(members, timeout=timedelta(seconds=timeout_s)))
        group = groups[rank // tp_size]
        shared = None
        if same_host and device.type == "cpu":
            shared = _open_shared(group, timeout_s)
    return shared or GroupTensorParallel(group)


def _open_shared(group: dist.ProcessGroup, timeout_s: float) -> TensorParallel | None:
    """All ranks of the group open the same memory, or all do without."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    name = f"/baton-{secrets.token_hex(8)}"
    name_bytes = torch.tensor(list(name.ljust(_NAME_BYTES).encode()), dtype=torch.uint8)
    shared: TensorParallel | None = None
    if rank == 0:
        shared = _try_shared(name, rank, size, timeout_s)
    try:
        dist.broadcast(name_bytes, group=group, group_src=0)  # the others open it after this
        if rank > 0:
            name = bytes(name_bytes.tolist()).decode().strip()
            shared = _try_shared(name, rank, size, timeout_s)
        have = torch.tensor([int(shared is not None)])
        dist.all_reduce(have, dist.ReduceOp.MIN, group=group)
    finally:
        if rank == 0 and shared is not None:
            unlink_shared_memory(name)
    if have.item() == 1:
        return shared
    if shared is not None:
        shared.close()
    return None


def _try_shared(name: str, rank: int, size: int, timeout_s: float) -> TensorParallel | None:
    try:
        return SharedMemoryTensorParallel(name, rank, size, timeout_s)
    except PeerError:
        return None


@contextmanager
def _as_peer_error(what: str) -> Iterator[None]:
    """torch.distributed raises RuntimeError, or a subclass, for a dead or late peer."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise PeerError(f"{what}: {reason}") from error
