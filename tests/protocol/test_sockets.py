"""Who gets through to a bound socket, and what shows on the way."""

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import zmq

from protocol.sockets import Dealer, Poller, Router, open_context

TOKEN, MESSAGE = "the token of this cluster", b"nobody else reads this"
DEADLINE_S = 10.0
SETTLE_S = 0.3  # for what must not arrive
Context = zmq.Context[zmq.Socket[bytes]]


@pytest.fixture
def context() -> Iterator[Context]:
    with open_context(TOKEN) as context:
        yield context


@pytest.fixture(params=["ipc", "tcp"])
def router(request: pytest.FixtureRequest, context: Context, tmp_path: Path) -> Iterator[Router]:
    is_file = request.param == "ipc"
    address = f"ipc://{tmp_path}/r" if is_file else "tcp://127.0.0.1:*"
    with closing(Router(context, address)) as router:
        yield router


def heard(router: Router, timeout_s: float) -> list[tuple[str, bytes]]:
    """What has arrived, once something has."""
    Poller(router).wait(timeout_s)
    frames = []
    while (frame := router.receive()) is not None:
        frames.append(frame)
    return frames


def connect(address: str) -> socket.socket:
    """A plain connection to a ZMQ address."""
    kind, _, where = address.partition("://")
    if kind == "ipc":
        plain = socket.socket(socket.AF_UNIX)
        plain.connect(where)
    else:
        host, _, port = where.rpartition(":")
        plain = socket.create_connection((host, int(port)))
    plain.settimeout(DEADLINE_S)
    return plain


def test_both_ends_that_know_the_token_hear_each_other(context: Context, router: Router) -> None:
    with closing(Dealer(context, router.address, "a")) as dealer:
        dealer.send(MESSAGE)
        assert heard(router, DEADLINE_S) == [("a", MESSAGE)]
        router.send("a", MESSAGE)
        Poller(dealer).wait(DEADLINE_S)
        assert dealer.receive() == MESSAGE


def test_strangers_are_not_heard(context: Context, router: Router) -> None:
    """Neither another cluster's token, nor a handshake without keys, nor bytes of no kind."""
    with open_context("another") as other, zmq.Context() as bare:
        stranger = Dealer(other, router.address, "a")
        stranger.send(MESSAGE)
        keyless = bare.socket(zmq.DEALER)
        keyless.setsockopt(zmq.LINGER, 0)
        keyless.connect(router.address)
        keyless.send(MESSAGE)
        for junk in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096, b"\x00" * 4096):
            plain = connect(router.address)
            plain.sendall(junk)
            plain.close()
        assert heard(router, SETTLE_S) == []
        with closing(Dealer(context, router.address, "b")) as friend:
            friend.send(MESSAGE)
            assert heard(router, DEADLINE_S) == [("b", MESSAGE)]
        assert stranger.receive() is None
        keyless.close()
        stranger.close()


def test_who_only_listens_at_the_address_is_told_nothing(context: Context) -> None:
    """A dealer says nothing to a router of another cluster, and obeys nothing that it says."""
    with open_context("another") as other:
        impostor = Router(other, "tcp://127.0.0.1:*")
        dealer = Dealer(context, impostor.address, "a")
        dealer.send(MESSAGE)
        assert heard(impostor, SETTLE_S) == []
        assert dealer.receive() is None
        dealer.close()
        impostor.close()


class Tap:
    """Passes one connection on to an address, and keeps every byte of it."""

    def __init__(self, to: str) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._to = to
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.seen = bytearray()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with self._listener, self._listener.accept()[0] as one, connect(self._to) as other:
            back = threading.Thread(target=self._pass, args=(other, one))
            back.start()
            self._pass(one, other)
            other.shutdown(socket.SHUT_RDWR)
            back.join()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(4096):
                self.seen += piece
                sink.sendall(piece)

    def close(self) -> None:
        """Wait until the connection has ended."""
        self._thread.join()


def test_who_taps_the_line_can_neither_read_nor_replay_it(context: Context) -> None:
    router = Router(context, "tcp://127.0.0.1:*")
    tap = Tap(router.address)
    dealer = Dealer(context, tap.address, "a")
    dealer.send(MESSAGE)
    assert heard(router, DEADLINE_S) == [("a", MESSAGE)]
    keys = [context.sockopts[option] for option in (zmq.CURVE_PUBLICKEY, zmq.CURVE_SECRETKEY)]
    seen = bytes(tap.seen)
    assert not [secret for secret in (TOKEN.encode(), MESSAGE, *keys) if bytes(secret) in seen]
    dealer.close()
    with connect(router.address) as plain:
        plain.sendall(seen)
        with suppress(ConnectionResetError):
            while plain.recv(4096):  # until it is cut off
                pass
    tap.close()
    assert heard(router, SETTLE_S) == []
    router.close()
