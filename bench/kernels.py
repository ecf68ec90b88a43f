"""What the kernels reach of what the machine can do: ``python -m bench.kernels``.

Every figure stands beside its physical limit, measured in the same run: paged decode beside reading
memory once, attention beside a matrix product, the shared-memory all-reduce beside gloo. One
thread, best of several runs in CPU time of the thread (wall time for the all-reduce).
"""

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from modeling.kernels.attention import Piece
from modeling.kernels.cpu_attention import CpuKernel
from modeling.parallel import TensorParallel, init_gang, make_tensor_parallel, open_gang_store

SHAPES = ((8, 2, 64), (16, 8, 128))  # query heads, KV heads, head_dim
BLOCK_SIZE = 32
NUM_RUNS = 10
REDUCE_SIZES = (16, 1024, 65536, 1048576)  # floats
REDUCE_ROUNDS = 300
GANG_SIZE = 2


def best_s(body: Callable[[], object], num_runs: int = NUM_RUNS) -> float:
    """The least CPU seconds of this thread that one call took."""
    times = []
    for _ in range(num_runs):
        started = time.thread_time()
        body()
        times.append(time.thread_time() - started)
    return min(times)


def print_machine(kernel: CpuKernel) -> None:
    model = "unknown CPU"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0].partition(":")[2].strip() if names else model
    print(f"{model}, {platform.platform()}, Python {platform.python_version()}")
    native = "C++ with bf16 instructions" if kernel.has_fast_bfloat16 else "C++"
    print(f"torch {torch.__version__}, paged decode in {native if kernel.is_native else 'torch'}")


def measure_paged_decode(kernel: CpuKernel) -> None:
    memory = torch.ones(2**27)  # 512 MB: more than any cache
    limit = memory.nbytes / best_s(memory.sum, 5) / 1e9
    del memory
    print(f"\npaged decode, one layer; reading memory once: {limit:.1f} GB/s")
    print("| heads | dtype | batch | length | us | GB/s | of memory |\n|" + "---|" * 7)
    for dtype in (torch.bfloat16, torch.float32):
        for num_heads, num_kv_heads, head_dim in SHAPES:
            for num_seqs, length in ((1, 4096), (32, 128), (32, 512), (8, 4096)):
                max_blocks = length // BLOCK_SIZE
                num_blocks = num_seqs * max_blocks
                shape = (num_blocks, num_kv_heads, 2, BLOCK_SIZE, head_dim)
                pool = torch.randn(shape, dtype=dtype)
                q = torch.randn(num_seqs, num_heads, head_dim).to(dtype)
                tables = torch.randperm(num_blocks).view(num_seqs, -1).int()
                lens = torch.full((num_seqs,), length, dtype=torch.int32)

                seconds = best_s(lambda: kernel.paged_decode(q, pool, tables, lens))  # noqa: B023 - called here
                rate = pool.nbytes / seconds / 1e9
                print(
                    f"| {num_heads}/{num_kv_heads}x{head_dim} | {str(dtype)[6:]} | {num_seqs} "
                    f"| {length} | {seconds * 1e6:.0f} | {rate:.1f} | {rate / limit:.0%} |"
                )


def measure_attend(kernel: CpuKernel) -> None:
    print("\nattention pieces")
    print("| heads | dtype | piece | ms | GFLOP/s | of GEMM | of torch's op |\n|" + "---|" * 7)
    torch_kernel = CpuKernel(native=False)
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
        limit = 2 * 1024**3 / best_s(lambda: a @ b) / 1e9  # noqa: B023 - called here
        for num_heads, num_kv_heads, head_dim in SHAPES:
            for num_queries, num_keys in ((512, 512), (512, 2048)):
                causal = num_queries == num_keys
                q = torch.randn(num_queries, num_heads, head_dim).to(dtype)
                kv = torch.randn(2, num_keys, num_kv_heads, head_dim).to(dtype)
                start = 0 if causal else num_keys
                piece = Piece(causal, start, torch.arange(num_keys))

                seconds = best_s(lambda: kernel.attend(q, kv[0], kv[1], piece), 5)  # noqa: B023 - called here
                torch_s = best_s(lambda: torch_kernel.attend(q, kv[0], kv[1], piece), 5)  # noqa: B023 - called here
                pairs = num_queries * (num_keys + 1) / 2 if causal else num_queries * num_keys
                rate = 4 * pairs * num_heads * head_dim / seconds / 1e9
                name = f"{num_queries}x{num_keys}{' causal' if causal else ''}"
                print(
                    f"| {num_heads}/{num_kv_heads}x{head_dim} | {str(dtype)[6:]} | {name} "
                    f"| {seconds * 1e3:.2f} | {rate:.0f} | {rate / limit:.0%} "
                    f"| {torch_s / seconds:.2f} |"
                )
        print(f"| GEMM 1024^3 | {str(dtype)[6:]} | | | {limit:.0f} | | |")


def measure_all_reduce() -> None:
    """Start a gang of this module; its rank 0 prints."""
    print(f"\nall-reduce of {GANG_SIZE} processes, fp32, wall time", flush=True)
    address, listen_fd = open_gang_store("127.0.0.1")
    module = (sys.executable, "-m", "bench.kernels", "--store", address)
    ranks = []
    for rank in range(GANG_SIZE):
        fd = listen_fd if rank == 0 else -1
        arguments = (*module, "--rank", str(rank), "--listen-fd", str(fd))
        ranks.append(subprocess.Popen(arguments, pass_fds=[fd] if fd >= 0 else []))
    for process in ranks:
        process.wait(timeout=300.0)


def run_rank(rank: int, address: str, listen_fd: int) -> None:
    init_gang(address, rank, GANG_SIZE, "gloo", 60.0, listen_fd)
    groups = {
        name: make_tensor_parallel(rank, 1, GANG_SIZE, torch.device("cpu"), same_host=shared)
        for name, shared in (("shm", True), ("gloo", False))
    }
    if rank == 0:
        print("| floats | shm us (median) | gloo us (median) | ratio |\n|" + "---|" * 4)
    for num_floats in REDUCE_SIZES:
        medians = {name: time_all_reduce(group, num_floats) for name, group in groups.items()}
        if rank == 0:
            shm, gloo = medians["shm"] * 1e6, medians["gloo"] * 1e6
            print(f"| {num_floats} | {shm:.0f} | {gloo:.0f} | {gloo / shm:.1f} |", flush=True)
    dist.barrier()
    for group in groups.values():
        group.close()
    dist.destroy_process_group()


def time_all_reduce(group: TensorParallel, num_floats: int) -> float:
    x = torch.zeros(num_floats)
    times = []
    for _ in range(REDUCE_ROUNDS if num_floats < 10**6 else REDUCE_ROUNDS // 10):
        started = time.perf_counter()
        group.all_reduce_(x)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.kernels", description=__doc__)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--listen-fd", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.rank is not None:
        run_rank(arguments.rank, arguments.store, arguments.listen_fd)
        return
    kernel = CpuKernel()
    print_machine(kernel)
    measure_paged_decode(kernel)
    measure_attend(kernel)
    measure_all_reduce()


if __name__ == "__main__":
    main()
