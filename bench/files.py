"""How fast a store's packs move between memory and a file, by each way of ``--disk-io``.

    python -m bench.files [--mib 64] [--piece-kib 1024 32] [--rounds 30]

All move the same bytes between the same memory and a file, in pieces as large as a block of one
layer might be, by the code that a store runs. The file is in the kernel's page cache, so this is
the cost of the way, not of the disk. A way that does not run here is named with the reason.
"""

import argparse
import os
import statistics
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path

from bench.environment import headline
from kvcache.tiers.movers import ByteRange, FileMover
from protocol.errors import ConfigError
from store.disk_io import open_mover

WAYS = ("vectored", "nixl-posix", "nixl-gds")
Seconds = dict[str, list[float]]  # per round, by way


def open_ways(stack: ExitStack, memory: bytearray) -> dict[str, FileMover]:
    """Those that run here; the others are printed."""
    movers = {}
    for name in WAYS:
        try:
            movers[name] = stack.enter_context(closing(open_mover(name, memoryview(memory))))
        except ConfigError as error:
            print(f"not measured: {error}")
    return movers


def measure(
    movers: dict[str, FileMover], memory: bytearray, pieces: list[ByteRange], num_rounds: int
) -> tuple[Seconds, Seconds]:
    """(reading, writing): each way in turn, so that a slow moment is nobody's own."""
    content = os.urandom(len(memory))
    reading: Seconds = {name: [] for name in movers}
    writing: Seconds = {name: [] for name in movers}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pack"
        path.write_bytes(content)
        for number in range(num_rounds + 1):
            for name, mover in movers.items():
                memory[:] = bytes(len(memory))
                with path.open("rb", buffering=0) as file:
                    started = time.perf_counter()
                    mover.read(file.fileno(), 0, pieces)
                    read_s = time.perf_counter() - started
                assert memory == content, name
                with path.open("r+b", buffering=0) as file:
                    started = time.perf_counter()
                    mover.write(file.fileno(), 0, pieces)
                    write_s = time.perf_counter() - started
                if number:  # the first touches pages and libraries
                    reading[name].append(read_s)
                    writing[name].append(write_s)
        assert path.read_bytes() == content
    return reading, writing


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.files")
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--piece-kib", type=int, nargs="+", default=[1024, 32])
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    size = arguments.mib << 20
    memory = bytearray(size)
    print(headline())
    with ExitStack() as stack:
        movers = open_ways(stack, memory)
        for piece_kib in arguments.piece_kib:
            piece = piece_kib << 10
            pieces = [ByteRange(start, min(piece, size - start)) for start in range(0, size, piece)]
            reading, writing = measure(movers, memory, pieces, arguments.rounds)
            print(f"{arguments.mib} MiB in pieces of {piece_kib} KiB, GB/s (median, best)")
            for name in movers:
                read, written = _speed(size, reading[name]), _speed(size, writing[name])
                print(f"  {name:10s} read {read} written {written}")


def _speed(size: int, seconds: list[float]) -> str:
    return f"{size / statistics.median(seconds) / 1e9:5.2f} {size / min(seconds) / 1e9:5.2f}"


if __name__ == "__main__":
    main()
