"""How fast a store's packs could come from disk: vectored reads against NIXL's POSIX backend.

    python -m bench.files [--mib 64] [--piece-kib 1024] [--rounds 5]

Both read the same file into the same memory, in pieces as large as a block of one layer might be.
The file is in the kernel's page cache, so this is the cost of the way, not of the disk.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from nixl import nixl_agent, nixl_agent_config

from bench.environment import headline

VECTOR = 64
Bytes = npt.NDArray[np.uint8]


def vectored(file: int, memory: Bytes, piece: int) -> Callable[[], None]:
    """One read of the whole file with ``preadv``."""
    view = memory.data
    views = [view[start : start + piece] for start in range(0, len(memory), piece)]

    def read() -> None:
        offset = 0
        while offset < len(memory):
            first = offset // piece
            num_bytes = os.preadv(file, views[first : first + VECTOR], offset)
            assert num_bytes and num_bytes % piece == 0, "a short read"
            offset += num_bytes

    return read


def nixl_posix(file: int, memory: Bytes, piece: int) -> Callable[[], None]:
    """The same as one NIXL transfer."""
    agent = nixl_agent("bench.files", nixl_agent_config(backends=["POSIX"]))
    address, size = memory.ctypes.data, len(memory)
    agent.register_memory([(address, size, 0, "")], "DRAM", backends=["POSIX"])
    agent.register_memory([(0, size, file, "")], "FILE", backends=["POSIX"])
    starts = range(0, size, piece)
    target = agent.get_xfer_descs([(address + start, piece, 0) for start in starts], "DRAM")
    source = agent.get_xfer_descs([(start, piece, file) for start in starts], "FILE")

    def read() -> None:
        handle = agent.initialize_xfer("READ", target, source, "bench.files")
        state = agent.transfer(handle)
        while state not in ("DONE", "ERR"):
            state = agent.check_xfer_state(handle)
        assert state == "DONE", state
        agent.release_xfer_handle(handle)

    return read


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.files")
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--piece-kib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    size, piece = arguments.mib << 20, arguments.piece_kib << 10
    print(headline())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pack"
        content = os.urandom(size)
        path.write_bytes(content)
        with path.open("rb", buffering=0) as file:
            memory = np.zeros(size, dtype=np.uint8)
            ways = {"preadv": vectored, "NIXL POSIX": nixl_posix}
            reads = {name: way(file.fileno(), memory, piece) for name, way in ways.items()}
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for number in range(arguments.rounds + 1):
                for name, read in reads.items():
                    memory[:] = 0
                    started = time.perf_counter()
                    read()
                    if number:  # the first touches pages and libraries
                        seconds[name].append(time.perf_counter() - started)
                    assert memory.tobytes() == content, name
    for name, values in seconds.items():
        rate = size / statistics.median(values) / 1e9
        print(f"{name:10s} {rate:6.2f} GB/s in pieces of {arguments.piece_kib} KiB")


if __name__ == "__main__":
    main()
