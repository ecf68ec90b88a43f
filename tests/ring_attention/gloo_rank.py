"""One rank of test_gloo_ring: runs every case and prints its share's digest, one line for each."""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from protocol.errors import PeerError
from ring_attention.comm import GlooRing
from tests.ring_attention.ring_cases import (
    BUDGET_S,
    DenseKernel,
    PositionKernel,
    Setup,
    digest,
    process_cases,
)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


def main(rank: int, cp_size: int, tp_size: int, store_path: str, peer_is_lost: bool) -> None:
    torch.set_num_threads(1)
    size = cp_size * tp_size
    store = FileStore(store_path, size)
    budget = timedelta(seconds=BUDGET_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=budget)
    if peer_is_lost:
        lose_a_peer(rank, store)
        return
    cp_rank, tp_rank = divmod(rank, tp_size)
    comm = GlooRing(tp_size=tp_size, tp_rank=tp_rank, timeout_s=BUDGET_S)
    for setup in process_cases(cp_size, seed=tp_rank):
        if cp_rank in setup.ring:
            kernel = PositionKernel() if setup.integers else DenseKernel()
            _, out_TNH = setup.build().attend(cp_rank, comm, kernel)
            say(digest(out_TNH))
        else:
            say("")
    dist.destroy_process_group()


def lose_a_peer(rank: int, store: FileStore) -> None:
    """The last rank connects and then says nothing until rank 0 has given up."""
    if rank == 0:
        case = Setup(num_tokens=64).build()
        try:
            case.attend(0, GlooRing(timeout_s=0.3), DenseKernel())
        except PeerError:
            say("PeerError")
        store.set("gave up", "yes")
    else:
        store.wait(["gave up"], timedelta(seconds=BUDGET_S))


if __name__ == "__main__":
    rank, cp_size, tp_size = (int(argument) for argument in sys.argv[1:4])
    main(rank, cp_size, tp_size, sys.argv[4], peer_is_lost=sys.argv[5] == "lost")
