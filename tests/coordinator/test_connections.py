"""Too many connections: the idle ones go, the others are refused, and the server goes on."""

import asyncio
import errno
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.http.connections.accepting import Acceptor
from coordinator.http.connections.kept import Connections, max_connections

ENOUGH_S = 10.0


class Peer:
    """A connection that counts its end."""

    def __init__(self) -> None:
        self.is_closed = False

    def close_idle(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize(
    ("configured", "max_files", "expected"),
    [(8192, 20_000, 8192), (8192, 1024, 768), (8192, 300, 150), (100, 1024, 100), (8192, 1, 1)],
)
def test_how_many_there_may_be(configured: int, max_files: int, expected: int) -> None:
    assert max_connections(configured, max_files) == expected


@given(st.lists(st.sampled_from(["open", "work", "answer", "close"]), max_size=200))
def test_never_more_than_there_may_be(steps: list[str]) -> None:
    connections: Connections[Peer] = Connections(5)
    at_work: list[Peer] = []
    idle: list[Peer] = []
    num_refused = 0
    for step in steps:
        if step == "open":
            expects_room = len(connections) < 5 or bool(idle)
            assert connections.admit() == expects_room
            if len(idle) + len(at_work) == 5 and idle:
                assert idle.pop(0).is_closed, "the one that has been idle for longest"
            num_refused += not expects_room
            if expects_room:
                idle.append(Peer())
                connections.opened(idle[-1])
        elif step == "work" and idle:
            at_work.append(idle.pop())
            connections.at_work(at_work[-1])
        elif step == "answer" and at_work:
            idle.append(at_work.pop(0))
            connections.answered(idle[-1])
        elif step == "close" and at_work:
            connections.closed(at_work[0])
            connections.closed(at_work.pop(0))
        assert len(connections) == len(idle) + len(at_work) <= 5
        assert not any(peer.is_closed for peer in (*idle, *at_work))
    assert connections.num_refused == num_refused


class Echo(asyncio.Protocol):
    """Sends what it gets; is at work from its first byte on."""

    def __init__(self, connections: "Connections[Echo]", lost: asyncio.Event) -> None:
        self._connections = connections
        self._lost = lost

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._connections.opened(self)

    def data_received(self, data: bytes) -> None:
        self._connections.at_work(self)
        self._transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._connections.closed(self)
        if len(self._connections) == 3:
            self._lost.set()

    def close_idle(self) -> None:
        self._transport.close()


@contextmanager
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        listener.setblocking(False)
        yield listener


async def echoed(address: tuple[str, int]) -> tuple[asyncio.StreamWriter, bytes]:
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(b"hello")
        async with asyncio.timeout(ENOUGH_S):
            return writer, await reader.read(64)
    except ConnectionError:  # refused and closed before the bytes were there
        return writer, b""


def test_idle_ones_go_and_then_who_comes_is_refused() -> None:
    async def main(listener: socket.socket) -> None:
        connections: Connections[Echo] = Connections(4)
        lost = asyncio.Event()
        acceptor = Acceptor(listener, lambda: Echo(connections, lost), connections)
        acceptor.start()
        address = listener.getsockname()
        with ExitStack() as stack:
            for _ in range(20):  # idle
                stack.enter_context(socket.create_connection(address))
            writers = []
            for _ in range(4):
                writer, got = await echoed(address)
                assert got == b"hello"
                writers.append(writer)
            assert len(connections) == 4 and connections.num_closed_idle == 20
            refused, got = await echoed(address)
            assert got.startswith(b"HTTP/1.1 503 ") or not got
            assert connections.num_refused == 1
            lost.clear()
            writers[0].transport.abort()
            async with asyncio.timeout(ENOUGH_S):
                await lost.wait()
            another, got = await echoed(address)
            assert got == b"hello"
            for writer in (*writers, refused, another):
                writer.transport.abort()
        acceptor.close()
        await acceptor.wait_closed()

    with listening() as listener:
        asyncio.run(main(listener))


def test_a_system_without_room_is_asked_again_after_a_while(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Full:
        """A listener whose system has no file numbers for a while."""

        def __init__(self, listener: socket.socket) -> None:
            self._listener = listener
            self.num_asked = 0

        def fileno(self) -> int:
            return self._listener.fileno()

        def accept(self) -> tuple[socket.socket, object]:
            self.num_asked += 1
            if self.num_asked < 3:
                raise OSError(errno.EMFILE, "Too many open files")
            return self._listener.accept()

    async def main(listener: socket.socket) -> None:
        connections: Connections[Echo] = Connections(4)
        lost = asyncio.Event()
        full = Full(listener)
        acceptor = Acceptor(full, lambda: Echo(connections, lost), connections)  # type: ignore[arg-type]
        acceptor.start()
        writer, got = await echoed(listener.getsockname())
        assert got == b"hello"
        assert connections.num_accept_errors == 2
        assert full.num_asked < 10, "nobody spins"
        writer.transport.abort()
        acceptor.close()

    with listening() as listener:
        asyncio.run(main(listener))
    assert "no connection can be accepted now: Too many open files" in caplog.text


def test_the_limit_of_open_files_is_raised_for_children_too() -> None:
    program = (
        "from protocol.process.limits import max_open_files, raise_open_files\n"
        "import subprocess, sys\n"
        "print(max_open_files(), raise_open_files(), flush=True)\n"
        "subprocess.run(['sh', '-c', 'ulimit -n'])"
    )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    told = subprocess.run(
        ["sh", "-c", f'ulimit -S -n 64; exec {sys.executable} -P -c "$0"', program],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": "."},
    ).stdout.split()  # fmt: skip
    assert told == ["64", str(hard), str(hard)]
