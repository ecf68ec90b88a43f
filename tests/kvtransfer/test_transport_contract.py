"""One contract for every transport, with real bytes, in one process and between two."""

import contextlib
import functools
import itertools
import os
import select
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis.strategies as st
import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from kvcache.pool import KVPool
from kvtransfer.plan import ByteRun, plan, source_runs
from kvtransfer.transport.checksum import PoolChecksums
from kvtransfer.transport.choose import open_transport
from kvtransfer.transport.interface import KVTransport, ReadHandle, ReadState
from kvtransfer.transport.tcp_wire import COUNT, NONCE_BYTES, RUN, prove_end
from protocol.errors import ConfigError, TransferError
from protocol.kv import KVLayout, RankEndpoint
from protocol.proof import PROOF_BYTES
from tests.forks import end, shared_forks
from tests.kvtransfer.local_transport import LocalFabric, LocalTransport

# What a rank of one host is told (launcher/config.py).
SHARED_MEMORY = {
    "UCX_TLS": "self,sm", "UCX_POSIX_ERROR_HANDLING": "y", "UCX_SYSV_ERROR_HANDLING": "y",
}  # fmt: skip
TOKEN = "secret"
DEADLINE_S = 60.0  # torch alone takes 20 s to import where ten others want the processor
QUIET = {"NIXL_LOG_LEVEL": "FATAL", "UCX_LOG_FILE": "stderr"}  # UCX would log to standard output


class Rank:
    """A pool with a transport on it."""

    def __init__(self, transport: KVTransport, incarnation: str, layout: KVLayout) -> None:
        self.incarnation = incarnation
        self.transport = transport
        self.pool = KVPool(layout)
        seed = torch.Generator().manual_seed(int(incarnation[:8], 16))
        self.pool.bytes.random_(0, 256, generator=seed)
        transport.start(self.pool)

    @property
    def endpoint(self) -> RankEndpoint:
        return RankEndpoint(
            rank=0,
            cp_rank=0,
            tp_rank=self.pool.layout.tp_rank,
            incarnation=self.incarnation,
            address="",
            layout=self.pool.layout,
            transport=self.transport.name,
            agent_metadata=self.transport.metadata(),
            base_address=self.pool.base_address,
        )


class Cluster:
    """Ranks of one process, driven in turn by the test's thread."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fabric = LocalFabric()
        self.ranks: list[Rank] = []

    def rank(self, layout: KVLayout, token: str = TOKEN) -> Rank:
        incarnation = uuid.uuid4().hex
        transport: KVTransport
        if self.name == "local":
            transport = LocalTransport(incarnation, self.fabric)
        else:
            transport = open_transport(self.name, incarnation, token=token)
        self.ranks.append(Rank(transport, incarnation, layout))
        return self.ranks[-1]

    def pair(self, layout: KVLayout | None = None) -> tuple[Rank, Rank]:
        """A source and a target that is connected to it."""
        source, target = self.rank(layout or _layout()), self.rank(layout or _layout())
        target.transport.connect(source.endpoint)
        return source, target

    def finish(self, reader: Rank, *handles: ReadHandle) -> list[ReadState]:
        """Drive all ranks until the reads have ended."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            for rank in self.ranks:
                rank.transport.progress()
            states = [reader.transport.poll(handle) for handle in handles]
            if ReadState.IN_FLIGHT not in states:
                return states
        raise AssertionError("a read did not end")


def _layout(tp_rank: int = 0, tp_size: int = 1, num_blocks: int = 6) -> KVLayout:
    return KVLayout(3, num_blocks, 4, tp_rank, tp_size, 8, 16, "bfloat16")


@pytest.fixture(params=["local", "tcp", "nixl"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    cluster = Cluster(request.param)
    yield cluster
    for rank in cluster.ranks:
        rank.transport.close()


@pytest.fixture
def tcp() -> Iterator[Cluster]:
    cluster = Cluster("tcp")
    yield cluster
    for rank in cluster.ranks:
        rank.transport.close()


# -- bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source_tp", "target_tp"), [(1, 1), (1, 2), (2, 1), (4, 2), (1, 4)])
def test_any_degree_to_any_degree(cluster: Cluster, source_tp: int, target_tp: int) -> None:
    sources = [cluster.rank(_layout(r, source_tp, num_blocks=7)) for r in range(source_tp)]
    targets = [cluster.rank(_layout(r, target_tp)) for r in range(target_tp)]
    pairs = [(4, 0), (6, 5), (0, 3), (1, 4)]
    expected = [target.pool.tensor.clone() for target in targets]
    # [L, blocks, all heads, 2, block_size, H]
    whole = torch.cat([source.pool.tensor for source in sources], dim=2)
    heads = 4 // target_tp
    for rank, (block, to_block) in itertools.product(range(target_tp), pairs):
        of_rank = whole[1:3, block, rank * heads : (rank + 1) * heads]
        expected[rank][1:3, to_block] = of_rank
    for target, after in zip(targets, expected, strict=True):
        handles = []
        for source in sources:
            target.transport.connect(source.endpoint)
            runs = plan(source.pool.layout, target.pool.layout, range(1, 3), pairs)
            handles.append(target.transport.read(source.incarnation, runs))
            assert handles[-1].num_descriptors == len(runs)
            assert handles[-1].num_bytes == sum(run.num_bytes for run in runs)
            blind = source_runs(
                source.pool.layout, target.pool.layout, range(1, 3), [b for b, _ in pairs]
            )
            landed = cluster.finish(target, handles[-1])
            assert landed == [ReadState.DONE]
            sent = PoolChecksums(source.pool).source_checksum(blind)
            assert sent == PoolChecksums(target.pool).target_checksum(runs)
        assert torch.equal(target.pool.bytes, after.view(-1).view(torch.uint8))


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_runs(cluster: Cluster, data: st.DataObject) -> None:
    if not cluster.ranks:
        cluster.pair()
    source, target = cluster.ranks
    size = source.pool.layout.num_bytes
    cuts = sorted(data.draw(st.lists(st.integers(0, size), unique=True, max_size=40)))
    pieces = [(one, other - one) for one, other in itertools.pairwise(cuts)]
    runs = [
        ByteRun(data.draw(st.integers(0, size - num_bytes)), start, num_bytes)
        for start, num_bytes in data.draw(st.permutations(pieces))
    ]
    expected = target.pool.bytes.clone()
    for run in runs:
        piece = source.pool.bytes[run.source_offset : run.source_offset + run.num_bytes]
        expected[run.target_offset : run.target_offset + run.num_bytes] = piece
    handle = target.transport.read(source.incarnation, runs)
    assert cluster.finish(target, handle) == [ReadState.DONE]
    assert torch.equal(target.pool.bytes, expected)
    target.pool.bytes.random_(0, 256)


def test_many_runs_and_a_read_longer_than_a_post(cluster: Cluster) -> None:
    source, target = cluster.pair(KVLayout(1, 5000, 2, 0, 1, 16, 64, "bfloat16"))  # 40 MB
    head_bytes = source.pool.layout.head_bytes
    every_other = [ByteRun(i * head_bytes, i * head_bytes, head_bytes) for i in range(1, 10000, 2)]
    handle = target.transport.read(source.incarnation, every_other)
    assert cluster.finish(target, handle) == [ReadState.DONE]
    mine, theirs = target.pool.bytes.view(-1, head_bytes), source.pool.bytes.view(-1, head_bytes)
    assert torch.equal(mine[1::2], theirs[1::2])
    assert not torch.equal(mine[0], theirs[0])
    handle = target.transport.read(
        source.incarnation, [ByteRun(0, 0, source.pool.layout.num_bytes)]
    )
    assert cluster.finish(target, handle) == [ReadState.DONE]
    assert torch.equal(mine, theirs)


def test_several_reads_at_once_and_none_at_all(cluster: Cluster) -> None:
    source, target = cluster.pair()
    runs = [[ByteRun(i * 64, i * 64, 64)] for i in range(50)]
    handles = [target.transport.read(source.incarnation, run) for run in runs]
    nothing = target.transport.read(source.incarnation, [])
    assert target.transport.poll(nothing) is ReadState.DONE
    assert set(cluster.finish(target, *handles)) == {ReadState.DONE}
    assert torch.equal(target.pool.bytes[: 50 * 64], source.pool.bytes[: 50 * 64])


# -- peers -----------------------------------------------------------------------------------------


def test_a_final_state_is_final(cluster: Cluster) -> None:
    source, target = cluster.pair()
    handle = target.transport.read(source.incarnation, [ByteRun(0, 0, 1024)])
    assert cluster.finish(target, handle) == [ReadState.DONE]
    landed = target.pool.bytes.clone()
    source.pool.bytes.zero_()
    target.transport.disconnect(source.incarnation)
    assert cluster.finish(target, handle) == [ReadState.DONE]
    assert torch.equal(target.pool.bytes, landed)


def test_unknown_and_disconnected_peers_are_refused(cluster: Cluster) -> None:
    source, target = cluster.pair()
    with pytest.raises(TransferError):
        source.transport.read(target.incarnation, [ByteRun(0, 0, 64)])  # the other way is not open
    target.transport.connect(source.endpoint)
    target.transport.disconnect(source.incarnation)
    target.transport.disconnect(source.incarnation)
    with pytest.raises(TransferError):
        target.transport.read(source.incarnation, [ByteRun(0, 0, 64)])
    target.transport.connect(source.endpoint)
    handle = target.transport.read(source.incarnation, [ByteRun(0, 0, 64)])
    assert cluster.finish(target, handle) == [ReadState.DONE]


@pytest.mark.parametrize(
    "run",
    [(0, -64, 64), (-64, 0, 64), (0, 0, 0), (0, 0, -1), (0, 1, "all"), (1, 0, "all")],
)
def test_runs_outside_the_pools_are_refused(cluster: Cluster, run: tuple[int, int, object]) -> None:
    source, target = cluster.pair()
    before = target.pool.bytes.clone()
    size = target.pool.layout.num_bytes
    bad = ByteRun(run[0], run[1], size if run[2] == "all" else run[2])  # type: ignore[arg-type]
    with pytest.raises(TransferError):
        target.transport.read(source.incarnation, [ByteRun(0, 0, 64), bad])
    assert torch.equal(target.pool.bytes, before)


def test_unacceptable_endpoints_are_refused(cluster: Cluster) -> None:
    source, target = cluster.rank(_layout()), cluster.rank(_layout())
    other = "tcp" if cluster.name != "tcp" else "nixl"
    changes: list[dict[str, object]] = [{"transport": other}]
    if cluster.name != "local":
        changes += [{"agent_metadata": b""}, {"agent_metadata": b"\x92" + b"x" * (1 << 20)}]
    if cluster.name == "nixl":
        changes += [{"incarnation": "somebody else"}]
    for change in changes:
        with pytest.raises(TransferError):
            target.transport.connect(msgspec.structs.replace(source.endpoint, **change))
    target.transport.connect(source.endpoint)
    handle = target.transport.read(source.incarnation, [ByteRun(0, 0, 64)])
    assert cluster.finish(target, handle) == [ReadState.DONE]


@pytest.mark.parametrize("cluster", ["local", "tcp"], indirect=True)  # for NIXL see the last test
def test_a_source_that_closes_is_gone(cluster: Cluster) -> None:
    source, target = cluster.pair()
    before = target.pool.bytes.clone()
    source.transport.close()
    cluster.ranks.remove(source)
    if cluster.name == "tcp":  # which learns of it only when it listens
        handle = target.transport.read(source.incarnation, [ByteRun(0, 0, 64)])
        assert cluster.finish(target, handle) == [ReadState.FAILED]
    with pytest.raises(TransferError):
        target.transport.read(source.incarnation, [ByteRun(0, 0, 64)])
    assert torch.equal(target.pool.bytes, before)


def test_held_bytes_land_after_a_disconnect() -> None:
    cluster = Cluster("local")
    source, target = cluster.pair()
    before = target.pool.bytes.clone()
    cluster.fabric.hold()
    handle = target.transport.read(source.incarnation, [ByteRun(0, 0, 64)])
    target.transport.disconnect(source.incarnation)
    target.transport.progress()
    assert target.transport.poll(handle) is ReadState.IN_FLIGHT
    assert torch.equal(target.pool.bytes, before)
    cluster.fabric.release()
    assert target.transport.poll(handle) is ReadState.DONE
    assert torch.equal(target.pool.bytes[:64], source.pool.bytes[:64])


def test_choosing_a_transport() -> None:
    for name in ("udp", "local"):
        with pytest.raises(ConfigError):
            open_transport(name, "a")
    transport = open_transport("auto", uuid.uuid4().hex)
    assert transport.name == "nixl"
    transport.close()


# -- TCP serves nobody else ------------------------------------------------------------------------


def test_a_source_does_not_trust_its_readers(tcp: Cluster) -> None:
    source = tcp.rank(_layout())
    size = source.pool.layout.num_bytes
    good = COUNT.pack(1) + RUN.pack(0, 64)
    mine = bytes(range(NONCE_BYTES))

    def proof_of(
        token: str = TOKEN, end: str = "reader", incarnation: str = source.incarnation
    ) -> Callable[[bytes], bytes]:
        return lambda nonce: mine + prove_end(token, end, incarnation, nonce, mine)

    prove_it = proof_of()
    requests: list[tuple[Callable[[bytes], bytes], bytes]] = [
        (lambda _: b"", b"GET / HTTP/1.1\r\n\r\n" * 4),
        (lambda _: bytes(NONCE_BYTES + PROOF_BYTES), good),
        (proof_of(token="another"), good),
        (proof_of(end="source"), good),
        (proof_of(incarnation="another"), good),
        (prove_it, COUNT.pack(0)),
        (prove_it, COUNT.pack(2**32 - 1)),
        (prove_it, COUNT.pack(1) + RUN.pack(0, 0)),
        (prove_it, COUNT.pack(1) + RUN.pack(size - 63, 64)),
        (prove_it, COUNT.pack(1) + RUN.pack(size + 1, 1)),
        (prove_it, COUNT.pack(1) + RUN.pack(2**64 - 64, 64)),
        (prove_it, COUNT.pack(2) + RUN.pack(0, 64) + RUN.pack(64, 2**64 - 64)),
    ]
    for proof, request in requests:
        nonce, answer = _ask(source, proof, request)
        assert len(nonce) == NONCE_BYTES
        own = prove_end(TOKEN, "source", source.incarnation, nonce, mine)
        assert answer == (own if proof is prove_it else b""), request
    nonce, answer = _ask(source, prove_it, good + COUNT.pack(0))
    own = prove_end(TOKEN, "source", source.incarnation, nonce, mine)
    assert answer == own + bytes(source.pool.bytes[:64].tolist())


def _ask(source: Rank, proof: Callable[[bytes], bytes], request: bytes) -> tuple[bytes, bytes]:
    """What a source sends before and after a request, until it closes the connection."""
    address = msgspec.msgpack.decode(source.transport.metadata())
    received = b""
    deadline = time.monotonic() + DEADLINE_S
    with socket.create_connection(address) as channel:
        channel.setblocking(False)
        is_asked = False
        while time.monotonic() < deadline:
            source.transport.progress()
            try:
                piece = channel.recv(1 << 16)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                break
            if not piece:
                break
            received += piece
            if len(received) >= NONCE_BYTES and not is_asked:
                is_asked = True
                channel.send(proof(received[:NONCE_BYTES]) + request)
        else:
            raise AssertionError("the source did not close")
    return received[:NONCE_BYTES], received[NONCE_BYTES:]


def test_a_wrong_token_reads_nothing(tcp: Cluster) -> None:
    source, target = tcp.rank(_layout(), token="another"), tcp.rank(_layout())
    before = target.pool.bytes.clone()
    target.transport.connect(source.endpoint)
    handle = target.transport.read(source.incarnation, [ByteRun(0, 0, 64)])
    assert tcp.finish(target, handle) == [ReadState.FAILED]
    assert torch.equal(target.pool.bytes, before)


def test_who_only_listens_at_a_source_s_port_gives_nothing(tcp: Cluster) -> None:
    """He admits everybody, and cannot show that he knows the token."""
    source, target = tcp.rank(_layout()), tcp.rank(_layout())
    before = target.pool.bytes.clone()
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        metadata = msgspec.msgpack.encode(impostor.getsockname())
        endpoint = msgspec.structs.replace(source.endpoint, agent_metadata=metadata)
        target.transport.connect(endpoint)
        handle = target.transport.read(source.incarnation, [ByteRun(0, 0, 64)])
        with impostor.accept()[0] as channel:
            channel.sendall(bytes(NONCE_BYTES + PROOF_BYTES + 64))
            assert tcp.finish(target, handle) == [ReadState.FAILED]
    assert torch.equal(target.pool.bytes, before)


def test_nixl_takes_no_metadata_of_another_cluster() -> None:
    nixl = Cluster("nixl")
    stranger, target = nixl.rank(_layout(), token="another"), nixl.rank(_layout())
    friend = nixl.rank(_layout())
    moved = msgspec.structs.replace(
        stranger.endpoint, agent_metadata=friend.endpoint.agent_metadata
    )
    for endpoint in (stranger.endpoint, moved):
        with pytest.raises(TransferError, match="not of this cluster"):
            target.transport.connect(endpoint)
    for rank in nixl.ranks:
        rank.transport.close()


def test_a_source_smaller_than_it_says(tcp: Cluster) -> None:
    source, target = tcp.rank(_layout(num_blocks=2)), tcp.rank(_layout())
    before = target.pool.bytes.clone()
    target.transport.connect(msgspec.structs.replace(source.endpoint, layout=target.pool.layout))
    size = source.pool.layout.num_bytes
    handle = target.transport.read(
        source.incarnation, [ByteRun(0, 0, 64), ByteRun(size - 1, 64, 64)]
    )
    assert tcp.finish(target, handle) == [ReadState.FAILED]
    assert torch.equal(target.pool.bytes, before)


# -- between processes -----------------------------------------------------------------------------


class Process:
    """``transport_rank.py`` in a process of its own."""

    def __init__(self, name: str, variables: dict[str, str], fill: int) -> None:
        self.incarnation = uuid.uuid4().hex
        commands, self._commands = os.pipe()
        arguments = [str(commands), name, self.incarnation, TOKEN, str(fill), str(NUM_BLOCKS)]
        settings = [f"{name}={value}" for name, value in (QUIET | variables).items()]
        self.process = shared_forks().start(
            "tests.kvtransfer.transport_rank", *arguments, *settings, pass_fds=[commands]
        )
        os.close(commands)

    @functools.cached_property
    def endpoint(self) -> str:
        return self.line().removeprefix("endpoint ")

    def line(self) -> str:
        """The next line that it says."""
        ready, _, _ = select.select([self.process.stdout], [], [], DEADLINE_S)
        assert ready, "the rank says nothing"
        return self.process.stdout.readline().decode().strip()

    def ask(self, *words: str) -> str:
        os.write(self._commands, " ".join(words).encode() + b"\n")
        return self.line()

    def connect(self, source: "Process") -> None:
        assert self.endpoint  # it has said it before it obeys
        assert self.ask("connect", source.endpoint) == "ok"

    def read(self, source: "Process", runs: list[ByteRun]) -> str:
        return self.ask("read", source.incarnation, msgspec.msgpack.encode(runs).hex())

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        end(self.process)
        os.close(self._commands)


BLOCK_BYTES = 2 * 32 * 64 * 2 * 4
NUM_BLOCKS = 512
NUM_BYTES = 2 * NUM_BLOCKS * BLOCK_BYTES  # 32 MiB in each of two layers
ALL = [ByteRun(0, 0, NUM_BYTES)]
SPLIT = [ByteRun(i * 2 * BLOCK_BYTES, i * 2 * BLOCK_BYTES, BLOCK_BYTES) for i in range(NUM_BLOCKS)]


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def run(name: str, variables: dict[str, str], fill: int) -> Process:
        started.append(Process(name, variables, fill))
        return started[-1]

    yield run
    for process in started:
        process.stop()


@pytest.mark.parametrize(
    ("name", "variables", "copies_at_once"),
    [
        ("tcp", {}, False),
        ("nixl", SHARED_MEMORY, True),
        ("nixl", {"UCX_TLS": "tcp"}, False),
    ],
    ids=["tcp", "nixl", "nixl-over-tcp"],
)
def test_the_life_of_a_peer(
    start: Callable[..., Process], name: str, variables: dict[str, str], copies_at_once: bool
) -> None:
    source, target, another = [start(name, variables, fill) for fill in (7, 9, 5)]
    target.connect(source)
    assert target.read(source, SPLIT) == "reading 0"
    assert target.line() == "0 done"
    assert target.ask("count", "7") == str(NUM_BYTES // 2)

    # Stopped, it is waited for; but shared memory is read without its help.
    source.signal(signal.SIGSTOP)
    assert target.read(source, ALL) == "reading 1"
    if copies_at_once:
        assert target.line() == "1 done"
    else:
        assert int(target.ask("count", "7")) < NUM_BYTES
    source.signal(signal.SIGCONT)
    if not copies_at_once:
        assert target.line() == "1 done"
    assert target.ask("count", "7") == str(NUM_BYTES)

    # Dead in the middle of a read, it fails it, and the reader lives.
    source.signal(signal.SIGSTOP)
    assert target.read(source, ALL) == "reading 2"
    if not copies_at_once:
        source.signal(signal.SIGKILL)
    assert target.line() == ("2 done" if copies_at_once else "2 failed")
    source.signal(signal.SIGKILL)
    source.process.wait()
    answer = target.read(source, SPLIT)
    assert answer.startswith("error") or target.line() == "3 failed"
    assert target.read(source, SPLIT).startswith("error")
    assert target.ask("disconnect", source.incarnation) == "ok"

    # Another takes its place, and both read from each other.
    target.connect(another)
    another.connect(target)
    assert target.read(another, ALL).startswith("reading")
    assert target.line().endswith("done")
    assert target.ask("count", "5") == str(NUM_BYTES)
    assert another.read(target, SPLIT) == "reading 0"
    assert another.line() == "0 done"
    assert another.ask("sum") == target.ask("sum")


def test_what_a_stranger_sends_to_a_waker_ends_nothing(
    start: Callable[..., Process],
) -> None:
    """Any user can send to UCX's wake-up sockets; an empty datagram used to end their process."""
    source, target, another = [start("nixl", SHARED_MEMORY, fill) for fill in (7, 9, 5)]
    target.connect(source)
    wakers = [name for rank in (source, target) for name in _wakers(rank.process.pid)]
    assert wakers
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.setblocking(False)
        for name in wakers:
            for junk in (b"", b"x", b"\xff" * 4096):
                with contextlib.suppress(BlockingIOError):  # its queue is full
                    stranger.sendto(junk, name)
    for number, (reader, of, fill) in enumerate(((target, source, 7), (target, another, 5))):
        reader.connect(of)
        assert reader.read(of, ALL) == f"reading {number}"
        assert reader.line() == f"{number} done"
        assert reader.ask("count", str(fill)) == str(NUM_BYTES)


def _wakers(pid: int) -> list[bytes]:
    """The abstract names of a process's datagram sockets."""
    table = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    names = {fields[6]: fields[7] for fields in table if len(fields) > 7 and fields[4] == "0002"}
    links = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            links.append(os.readlink(link))
    found = [names[link[8:-1]] for link in links if link[8:-1] in names]
    return [b"\0" + name[1:].encode() for name in found if name.startswith("@")]
