"""A rank's process for the transport tests: one transport, driven by lines from a descriptor.

    transport_rank COMMANDS TRANSPORT INCARNATION TOKEN FILL NUM_BLOCKS VARIABLE=VALUE...

puts the variables into its environment, before NIXL and UCX are loaded, prints ``endpoint HEX`` and
then obeys, each command answered by one line:

    connect HEX              ok | error MESSAGE
    disconnect INCARNATION   ok
    read INCARNATION RUNS    reading NUMBER | error MESSAGE, and when it has ended: NUMBER STATE
    count BYTE               how many bytes of the pool have that value
    sum                      CRC-32 of the whole pool
"""

import os
import select
import sys
import zlib

import msgspec

from kvcache.pool import KVPool
from kvtransfer.plan import ByteRun
from kvtransfer.transport.choose import open_transport
from kvtransfer.transport.interface import KVTransport, ReadHandle, ReadState
from protocol.errors import TransferError
from protocol.kv import KVLayout, RankEndpoint


class Rank:
    """The pool, the transport and the reads in flight."""

    def __init__(self, transport: KVTransport, incarnation: str, pool: KVPool) -> None:
        self.pool = pool
        self.transport = transport
        self.transport.start(self.pool)
        self.reads: dict[int, ReadHandle] = {}
        self.num_reads = 0
        endpoint = RankEndpoint(
            rank=0,
            cp_rank=0,
            tp_rank=0,
            incarnation=incarnation,
            address="",
            layout=pool.layout,
            transport=transport.name,
            agent_metadata=transport.metadata(),
            base_address=self.pool.base_address,
        )
        say(f"endpoint {msgspec.msgpack.encode(endpoint).hex()}")

    def obey(self, command: str, *words: str) -> str:
        try:
            return str(getattr(self, f"do_{command}")(*words))
        except TransferError as error:
            return f"error {error}"

    def do_connect(self, endpoint: str) -> str:
        self.transport.connect(msgspec.msgpack.decode(bytes.fromhex(endpoint), type=RankEndpoint))
        return "ok"

    def do_disconnect(self, incarnation: str) -> str:
        self.transport.disconnect(incarnation)
        return "ok"

    def do_read(self, incarnation: str, encoded: str) -> str:
        runs = msgspec.msgpack.decode(bytes.fromhex(encoded), type=list[ByteRun])
        self.reads[self.num_reads] = self.transport.read(incarnation, runs)
        self.num_reads += 1
        return f"reading {self.num_reads - 1}"

    def do_count(self, byte: str) -> str:
        return str(int((self.pool.bytes == int(byte)).sum()))

    def do_sum(self) -> str:
        return str(zlib.crc32(self.pool.view()))

    def progress(self) -> None:
        self.transport.progress()
        for number, handle in list(self.reads.items()):
            state = self.transport.poll(handle)
            if state is not ReadState.IN_FLIGHT:
                say(f"{number} {state.value}")
                del self.reads[number]


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    commands, name, incarnation, token, fill, num_blocks, *variables = sys.argv[1:]
    os.environ |= dict(variable.split("=", 1) for variable in variables)
    layout = KVLayout(2, int(num_blocks), 4, 0, 1, 32, 64, "bfloat16")
    pool = KVPool(layout)
    pool.bytes.fill_(int(fill))
    rank = Rank(open_transport(name, incarnation, token=token), incarnation, pool)
    source, buffered = int(commands), b""
    while True:
        if select.select([source], [], [], 0.001)[0]:
            piece = os.read(source, 1 << 16)
            if not piece:
                break
            buffered += piece
            *lines, buffered = buffered.split(b"\n")
            for line in lines:
                say(rank.obey(*line.decode().split()))
        rank.progress()
    rank.transport.close()


main()
