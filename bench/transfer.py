"""How fast KV moves from one process to another, and which layout of the pool moves best.

    python -m bench.transfer [--transport nixl|tcp] [--blocks 256] [--repeats 15]

One source process, one reading process, the benchmark model's shape. Each case is a read of every
layer of a prompt's blocks, planned and posted as a hand-off does it. ``block-major`` is the order
of KVLayout, [L, num_blocks, K, 2, block_size, H]; ``head-major`` is [L, K, num_blocks, 2,
block_size, H], planned here. The rates are compared with a memory copy of the same bytes in the
same run. Set UCX_TLS=tcp to see NIXL without shared memory.
"""

import argparse
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import msgspec
import torch

from bench.environment import headline
from kvcache.pool import KVPool
from kvtransfer.plan import ByteRun, plan, shared_heads
from kvtransfer.transport.choose import open_transport
from kvtransfer.transport.interface import KVTransport, ReadState
from protocol.kv import KVLayout, RankEndpoint

NUM_LAYERS, NUM_HEADS, HEAD_DIM, BLOCK_SIZE, DTYPE = 12, 4, 64, 32, "bfloat16"
READ_DEADLINE_S = 30.0

Pairs = list[tuple[int, int]]
Planner = Callable[[KVLayout, KVLayout, Pairs], list[ByteRun]]


@dataclass(frozen=True)
class Case:
    """One row of the report."""

    layout: str
    target_tp: int
    placement: str
    runs: list[ByteRun]
    plan_s: float

    @property
    def num_bytes(self) -> int:
        return sum(run.num_bytes for run in self.runs)


# -- the two layouts -------------------------------------------------------------------------------


def plan_block_major(source: KVLayout, target: KVLayout, pairs: Pairs) -> list[ByteRun]:
    return plan(source, target, range(NUM_LAYERS), pairs)


def plan_head_major(source: KVLayout, target: KVLayout, pairs: Pairs) -> list[ByteRun]:
    """As :func:`kvtransfer.plan.plan`, for pools of [L, K, num_blocks, 2, block_size, H]."""
    size = source.head_bytes
    runs: list[ByteRun] = []
    ordered = sorted(pairs)
    for layer in range(NUM_LAYERS):
        for head in shared_heads(source, target):
            source_head = layer * source.num_kv_heads + head - source.first_kv_head
            target_head = layer * target.num_kv_heads + head - target.first_kv_head
            for source_block, target_block in ordered:
                start = (source_head * source.num_blocks + source_block) * size
                to = (target_head * target.num_blocks + target_block) * size
                last = runs[-1] if runs else ByteRun(-1, -1, 0)
                if (start, to) == (
                    last.source_offset + last.num_bytes,
                    last.target_offset + last.num_bytes,
                ):
                    runs[-1] = ByteRun(
                        last.source_offset, last.target_offset, last.num_bytes + size
                    )
                else:
                    runs.append(ByteRun(start, to, size))
    return runs


PLANNERS: dict[str, Planner] = {"block-major": plan_block_major, "head-major": plan_head_major}


def make_layout(num_blocks: int, tp_size: int) -> KVLayout:
    """The last tensor-parallel rank's pool."""
    return KVLayout(
        num_layers=NUM_LAYERS,
        num_blocks=num_blocks,
        num_kv_heads_total=NUM_HEADS,
        tp_rank=tp_size - 1,
        tp_size=tp_size,
        block_size=BLOCK_SIZE,
        head_dim=HEAD_DIM,
        dtype=DTYPE,
    )


def make_cases(source: KVLayout, target: KVLayout, num_blocks: int) -> list[Case]:
    """Adjacent and scattered blocks, in both layouts."""
    shuffle = random.Random(0)
    ids = range(source.num_blocks)
    placements = {
        "adjacent": [(i + 3, i + 7) for i in range(num_blocks)],
        "scattered": list(
            zip(shuffle.sample(ids, num_blocks), shuffle.sample(ids, num_blocks), strict=True)
        ),
    }
    cases = []
    for placement, pairs in placements.items():
        for layout, planner in PLANNERS.items():
            planner(source, target, pairs)
            start = time.perf_counter()
            runs = planner(source, target, pairs)
            plan_s = time.perf_counter() - start
            cases.append(Case(layout, target.tp_size, placement, runs, plan_s))
    return cases


# -- the two processes -----------------------------------------------------------------------------


def open_rank(name: str, incarnation: str, layout: KVLayout) -> tuple[KVTransport, KVPool]:
    transport = open_transport(name, incarnation, token="bench")
    pool = KVPool(layout)
    transport.start(pool)
    return transport, pool


def serve(name: str, layout: KVLayout, parent: Connection) -> None:
    """The source: makes progress each half millisecond until the parent says stop."""
    torch.set_num_threads(1)
    transport, pool = open_rank(name, "source", layout)
    pool.bytes.random_(0, 256)
    endpoint = RankEndpoint(
        rank=0,
        cp_rank=0,
        tp_rank=0,
        incarnation="source",
        address="",
        layout=layout,
        transport=transport.name,
        agent_metadata=transport.metadata(),
        base_address=pool.base_address,
    )
    parent.send_bytes(msgspec.msgpack.encode(endpoint))
    while not parent.poll(0.0005):
        transport.progress()
    transport.close()


@contextmanager
def source_process(name: str, layout: KVLayout) -> Iterator[RankEndpoint]:
    context = multiprocessing.get_context("spawn")  # UCX does not survive a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(name, layout, theirs))
    process.start()
    try:
        yield msgspec.msgpack.decode(ours.recv_bytes(), type=RankEndpoint)
    finally:
        ours.send_bytes(b"stop")
        process.join()


def read_once(transport: KVTransport, runs: list[ByteRun]) -> float:
    """Seconds from posting a read to seeing it done."""
    start = time.perf_counter()
    handle = transport.read("source", runs)
    while (state := transport.poll(handle)) is ReadState.IN_FLIGHT:
        assert time.perf_counter() - start < READ_DEADLINE_S, "the read does not end"
        transport.progress()
    assert state is ReadState.DONE, state
    return time.perf_counter() - start


def copy_once(source: torch.Tensor, target: torch.Tensor) -> float:
    start = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - start


# -- the report ------------------------------------------------------------------------------------


def measure(
    name: str, endpoint: RankEndpoint, target_tp: int, arguments: argparse.Namespace
) -> None:
    target = make_layout(endpoint.layout.num_blocks, target_tp)
    cases = make_cases(endpoint.layout, target, arguments.blocks)
    transport, pool = open_rank(name, f"target{target_tp}", target)
    transport.connect(endpoint)
    copied = torch.ones(cases[0].num_bytes, dtype=torch.uint8)
    copy_s: list[float] = []
    read_s: list[list[float]] = [[] for _ in cases]
    for _ in range(arguments.repeats):  # interleaved, so that noise meets every case alike
        copy_s.append(copy_once(copied, pool.bytes[: len(copied)]))
        for case, seconds in zip(cases, read_s, strict=True):
            seconds.append(read_once(transport, case.runs))
    transport.close()
    memcpy = len(copied) / statistics.median(copy_s[1:]) / 1e9
    print(f"tp1 -> tp{target_tp}: {len(copied) / 2**20:.0f} MiB, memory copy {memcpy:.2f} GB/s")
    for case, seconds in zip(cases, read_s, strict=True):
        rate = case.num_bytes / statistics.median(seconds[1:]) / 1e9
        print(
            f"  {case.layout:12} {case.placement:10} {len(case.runs):6} descriptors"
            f"  plan {case.plan_s * 1e3:6.2f} ms  median {rate:6.2f} GB/s"
            f"  best {case.num_bytes / min(seconds[1:]) / 1e9:6.2f} GB/s"
            f"  of memcpy {rate / memcpy:5.1%}"
        )


def measure_transport(name: str, num_blocks: int = 128) -> float:
    """Bytes per second of one rank reading scattered blocks of another, for ``baton doctor``.

    Raises:
        ConfigError: the transport does not run here.
        TransferError: it runs but does not connect or read.
    """
    with source_process(name, make_layout(2 * num_blocks, 1)) as endpoint:
        transport, _ = open_rank(name, "target", make_layout(2 * num_blocks, 1))
        transport.connect(endpoint)
        scattered = make_cases(endpoint.layout, endpoint.layout, num_blocks)[2]
        read_s = [read_once(transport, scattered.runs) for _ in range(4)][1:]
        transport.close()
    return scattered.num_bytes / statistics.median(read_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--transport", default="nixl", choices=["nixl", "tcp"])
    parser.add_argument("--blocks", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{arguments.transport}; {headline()}")
    with source_process(arguments.transport, make_layout(2 * arguments.blocks, 1)) as endpoint:
        for target_tp in (1, 2):
            measure(arguments.transport, endpoint, target_tp, arguments)


if __name__ == "__main__":
    main()
