"""One rank of a gang, in a process of its own: ``python -m tests.modeling.parallel_rank``.

Arguments: scenario, rank, size, store address, kind (shm or gloo), listening descriptor or -1.
Prints one line ``OK`` and whatever the scenario says about itself.
"""

import glob
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from modeling.parallel import (
    SharedMemoryTensorParallel,
    TensorParallel,
    init_gang,
    make_tensor_parallel,
)
from protocol.errors import PeerError

CPU = torch.device("cpu")
TIMEOUT_S = 2.0


def parts(size: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """What every rank brings; each can compute all of them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(size)]


def reduce(tp: TensorParallel, kind: str) -> str:
    """Many shapes, several rounds each, against a sum in rank order; a digest of all bits."""
    digest = hashlib.sha256()
    shapes = [(1,), (16,), (3, 5, 7), (131072,), (131073,), (400, 1024), (64, 1024)]
    for seed, shape in enumerate(shapes * 3):
        for dtype in (torch.float32, torch.bfloat16):
            everyone = parts(tp.size, shape, dtype, seed)
            x = everyone[tp.rank].clone()
            tp.all_reduce_(x)
            want = everyone[0].float()
            for other in everyone[1:]:
                want += other.float()
            if kind == "shm":
                assert torch.equal(x, want.to(dtype)), (shape, dtype)
            else:
                torch.testing.assert_close(x, want.to(dtype), rtol=2e-2, atol=2e-2)
            digest.update(x.float().numpy().tobytes())
    return digest.hexdigest()


def gather(tp: TensorParallel) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for shape, dim in (((2, 3), -1), ((2, 3), 0), ((1, 200_000), -1), ((5, 1, 2), 1)):
            everyone = parts(tp.size, shape, dtype, 9)
            got = tp.all_gather(everyone[tp.rank], dim)
            assert torch.equal(got, torch.cat(everyone, dim)), (shape, dim)
    strided = torch.arange(6).view(2, 3).T + tp.rank
    assert tp.all_gather(strided, 0).shape == (3 * tp.size, 2)


def listening() -> list[str]:
    """Local addresses, as /proc/net writes them, of this process's listening sockets."""
    inodes = set()
    for path in glob.glob("/proc/self/fd/*"):
        try:
            inodes.add(os.readlink(path).removeprefix("socket:[").removesuffix("]"))
        except OSError:
            continue  # the descriptor of the listing itself
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as lines:
            for line in list(lines)[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    found.append(fields[1].split(":")[0])
    return found


def look_around(tp: TensorParallel) -> None:
    """Nothing of ours is reachable from outside; nothing is left in /dev/shm."""
    found = listening()
    assert found and set(found) == {"0100007F"}, found
    if isinstance(tp, SharedMemoryTensorParallel):
        with open("/proc/self/maps") as maps:
            mapped = [line for line in maps if "/dev/shm/baton-" in line]
        assert mapped and all("(deleted)" in line for line in mapped), mapped


def agree(tp: TensorParallel, kind: str) -> str:
    """Whatever a group can do, and what it leaves behind."""
    gather(tp)
    look_around(tp)  # by now rank 0 has removed the shared memory's name
    return reduce(tp, kind)


def die(tp: TensorParallel, kind: str) -> str:  # noqa: ARG001 - one of the scenarios
    """The last rank is killed between two rounds; the others notice within their timeout."""
    tp.all_reduce_(torch.ones(4))
    if tp.rank == tp.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        tp.all_reduce_(torch.ones(4))
    except PeerError:
        assert time.monotonic() - started < 5 * TIMEOUT_S
        return "noticed"
    raise AssertionError("nobody noticed")


def leave(tp: TensorParallel, kind: str) -> str:  # noqa: ARG001 - one of the scenarios
    """A rank that closes in order is noticed at once."""
    tp.all_reduce_(torch.ones(4))
    if tp.rank == tp.size - 1:
        tp.close()
        return "left"
    started = time.monotonic()
    try:
        tp.all_reduce_(torch.ones(4))
    except PeerError:
        assert time.monotonic() - started < TIMEOUT_S
        return "noticed"
    raise AssertionError("nobody noticed")


def disagree(tp: TensorParallel, kind: str) -> str:  # noqa: ARG001 - one of the scenarios
    try:
        tp.all_reduce_(torch.ones(4 + tp.rank))
    except PeerError as error:
        assert "disagree" in str(error)
        return "noticed"
    raise AssertionError("nobody noticed")


SCENARIOS: dict[str, Callable[[TensorParallel, str], str]] = {
    scenario.__name__: scenario for scenario in (agree, die, leave, disagree)
}


def main() -> None:
    scenario, rank, size, address, kind, listen_fd = sys.argv[1:]
    torch.set_num_threads(1)
    init_gang(address, int(rank), int(size), "gloo", 30.0, int(listen_fd))
    tp = make_tensor_parallel(
        int(rank), 1, int(size), CPU, same_host=kind == "shm", timeout_s=TIMEOUT_S
    )
    assert (tp.rank, tp.size) == (int(rank), int(size))
    assert isinstance(tp, SharedMemoryTensorParallel) == (kind == "shm")
    said = SCENARIOS[scenario](tp, kind)
    sys.stdout.write(f"OK {said}\n")
    sys.stdout.flush()
    if scenario == "agree":
        dist.barrier()
        tp.close()
        dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
