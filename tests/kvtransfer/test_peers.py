"""Two ranks' sockets as they are, with connections that break, peers that leave and come back."""

import contextlib
import math
import random
import selectors
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import msgspec
import pytest
import zmq

from kvtransfer.faulty import FaultyPeers
from kvtransfer.identity import PeerName, RankIdentity
from kvtransfer.links.delivery import MAX_TIMEOUTS
from kvtransfer.links.peers import Peers
from protocol.errors import PeerError
from protocol.handoff import HandoffMessage, TargetOpened
from protocol.kv import KVLayout, PoolEndpoint, RankEndpoint
from protocol.process.failpoints import Failpoints
from protocol.sockets import Dealer, Poller, open_context

DEADLINE_S = 60.0
LAYOUT = KVLayout(1, 2, 1, 0, 1, 2, 2, "float32")
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close by a reset
Context = zmq.Context[zmq.Socket[bytes]]


class Side:
    """One rank's sockets, and what they have brought."""

    def __init__(
        self,
        context: Context,
        pool_id: str,
        *,
        rank: int = 0,
        incarnation: str = "1",
        failpoints: str = "",
    ) -> None:
        self.counters: Counter[str] = Counter()
        self.identity = RankIdentity("decode", pool_id, rank, 1, 2, incarnation)
        points = Failpoints(failpoints, self.counters)
        listen = "tcp://127.0.0.1"
        if points:
            self.peers: Peers = FaultyPeers(context, self.identity, listen, self.counters, points)
        else:
            self.peers = Peers(context, self.identity, listen, self.counters)
        self.poller = Poller(self.peers.router)
        self.got: list[tuple[PeerName, HandoffMessage]] = []

    def pool(self, address: str = "") -> PoolEndpoint:
        """A pool with this rank alone, to be reached at ``address`` instead of its own."""
        me = self.identity
        endpoint = RankEndpoint(
            me.rank, 0, me.rank, me.incarnation, address or self.peers.address, LAYOUT
        )
        return PoolEndpoint(me.pool_id, me.role, 1, 1, 2, (endpoint,))

    def say(self, other: "Side", *numbers: int) -> None:
        for number in numbers:
            self.peers.send(other.identity.name, TargetOpened(f"r{number}", 1, self.identity.rank))

    def turn(self) -> None:
        """What a transfer thread does of this in one turn."""
        self.got += self.peers.receive()
        self.peers.keep_up(time.monotonic())

    @property
    def numbers(self) -> list[int]:
        return [int(message.request_id[1:]) for _, message in self.got]


@pytest.fixture
def context() -> Iterator[Context]:
    with open_context("secret") as context:
        yield context


def _run(*sides: Side, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not until():
        assert time.monotonic() < deadline, [(side.counters, side.numbers[-5:]) for side in sides]
        for side in sides:
            side.poller.wait(0.001)
            side.turn()


def _meet(*sides: Side) -> None:
    for side in sides:
        side.peers.set_pools([other.pool() for other in sides])


def _quiet(*sides: Side) -> bool:
    return all(side.peers.due_at == math.inf for side in sides)


def _close(*sides: Side) -> None:
    for side in sides:
        side.peers.close()


class Proxy:
    """Passes the bytes of TCP connections on, until it is told to break them. A thread."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("tcp://").partition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._callers: set[socket.socket] = set()
        self._left_open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._swallows = 0  # bytes that get lost before the connections break
        self._leaves_open = False
        self.is_frozen = threading.Event()  # nothing passes, in either direction
        self.num_cuts = 0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def cut(self, *, after_bytes: int, leaves_open: bool) -> None:
        """Lose some bytes and reset; the listening side may be left to believe in its end."""
        with self._lock:
            self._swallows, self._leaves_open = after_bytes, leaves_open

    def _serve(self) -> None:
        while not self._ends.is_set():
            for key, _ in self._selector.select(0.02):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj in self._pairs:
                    assert isinstance(key.fileobj, socket.socket)
                    self._pass_on(key.fileobj)

    def _accept(self) -> None:
        caller, _ = self._listener.accept()
        try:
            called = socket.create_connection(self._target)
        except OSError:
            caller.close()
            return
        self._callers.add(caller)
        for end, other in ((caller, called), (called, caller)):
            self._pairs[end] = other
            self._selector.register(end, selectors.EVENT_READ)

    def _pass_on(self, end: socket.socket) -> None:
        try:
            data = end.recv(4096)
        except OSError:
            data = b""
        if not data:
            self._break(end, leaves_open=False)
            return
        if self.is_frozen.is_set():
            return
        with self._lock:
            if self._swallows and end in self._callers:
                self._swallows = max(0, self._swallows - len(data))
                if not self._swallows:
                    self.num_cuts += 1
                    self._break(end, leaves_open=self._leaves_open)
                return
        try:
            self._pairs[end].sendall(data)
        except OSError:
            self._break(end, leaves_open=False)

    def _break(self, end: socket.socket, *, leaves_open: bool) -> None:
        other = self._pairs.pop(end)
        del self._pairs[other]
        for one in (end, other):
            self._selector.unregister(one)
            if leaves_open and one not in self._callers:
                self._left_open.append(one)
                continue
            self._callers.discard(one)
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            one.close()

    def close(self) -> None:
        self._ends.set()
        self._thread.join()
        for one in (*self._pairs, *self._left_open, self._listener):
            one.close()
        self._selector.close()


@pytest.mark.parametrize("leaves_open", [False, True])
def test_all_arrives_once_and_in_order_over_connections_that_break(
    context: Context, leaves_open: bool
) -> None:
    """600 messages each way, through proxies that lose bytes and reset the connection, again and
    again; in the second case the listening side does not learn of it."""
    count, num_cuts, rng = 600, 4, random.Random(3)
    sides = Side(context, "p"), Side(context, "d")
    proxies = [Proxy(side.peers.address) for side in sides]
    try:
        pools = [side.pool(proxy.address) for side, proxy in zip(sides, proxies, strict=True)]
        for side in sides:
            side.peers.set_pools(pools)
        sides[0].say(sides[1], 0)
        sides[1].say(sides[0], 0)
        _run(*sides, until=lambda: all(side.got for side in sides))  # connected, so cuts do cut
        for part in range(num_cuts):
            start, end = 1 + part * count // num_cuts, 1 + (part + 1) * count // num_cuts
            for number in range(start, end):
                if number == (start + end) // 2:
                    for proxy in proxies:
                        proxy.cut(after_bytes=rng.randint(1, 1_000), leaves_open=leaves_open)
                sides[0].say(sides[1], number)
                sides[1].say(sides[0], number)
                for side in sides:
                    side.turn()
            _run(*sides, until=lambda: all(len(s.got) >= end for s in sides))  # noqa: B023
            assert all(proxy.num_cuts == part + 1 for proxy in proxies)
        _run(*sides, until=lambda: _quiet(*sides))
        for side in sides:
            assert side.numbers == list(range(count + 1))
            assert side.counters["messages_resent"] > 0
            assert side.counters["peers_given_up"] == 0
    finally:
        _close(*sides)
        for proxy in proxies:
            proxy.close()


# -- frames that get lost, by failpoints -----------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        "handoff.send:drop%5:0.1",
        "handoff.send.target_opened:drop@every:3",
        "handoff.send.acknowledgement:drop@1",
        "handoff.send:duplicate%5:0.3",
        "handoff.send:delay=0.05%5:0.2",
        "handoff.send:drop%5:0.1, handoff.send:delay=0.3%6:0.1, handoff.send:duplicate%7:0.1",
    ],
)
def test_frames_may_be_lost_doubled_and_late(context: Context, fault: str) -> None:
    sides = Side(context, "p", failpoints=fault), Side(context, "d", failpoints=fault)
    _meet(*sides)
    for number in range(50):
        sides[0].say(sides[1], number)
        sides[1].say(sides[0], number)
        _run(*sides, until=lambda: True)
    _run(*sides, until=lambda: _quiet(*sides))
    for side in sides:
        assert side.numbers == list(range(50))
    assert sum(side.counters["messages_resent"] for side in sides) > 0 or "drop" not in fault
    assert sum(side.counters["dropped_repeated"] for side in sides) > 0 or "dupl" not in fault
    hits = sides[0].counters + sides[1].counters
    assert any(name.startswith("failpoint:") for name in hits)
    _close(*sides)


def test_a_message_that_is_always_lost_is_lost_each_time(context: Context) -> None:
    fault = "handoff.send.target_opened:drop"
    sides = Side(context, "p", failpoints=fault), Side(context, "d")
    _meet(*sides)
    sides[0].say(sides[1], 1)
    _run(*sides, until=lambda: sides[0].counters[f"failpoint:{fault}"] == 3)
    assert sides[0].counters["messages_resent"] == 2
    assert not sides[1].got
    _close(*sides)


# -- who does not acknowledge ----------------------------------------------------------------------


def _time_out(side: Side) -> None:
    for _ in range(MAX_TIMEOUTS + 1):
        side.peers.keep_up(side.peers.due_at)


def test_a_silent_peer_is_given_up_and_found_again(
    context: Context, caplog: pytest.LogCaptureFixture
) -> None:
    """What was kept for it is gone; what is said afterwards starts a new stream, without a gap."""
    sides = Side(context, "p", failpoints="handoff.send:drop@1"), Side(context, "d")
    sides[0].peers.set_pools([sides[1].pool()])  # which does not know the other one, and is silent
    sides[0].say(sides[1], 1, 2)
    _time_out(sides[0])
    assert sides[0].counters["peers_given_up"] == 1
    assert sides[0].counters["dropped_unacknowledged"] == 2
    assert _quiet(sides[0])
    assert "acknowledges nothing, 2 messages wait" in caplog.text
    sides[1].peers.set_pools([sides[0].pool()])
    sides[0].say(sides[1], 3, 4)
    _run(*sides, until=lambda: sides[1].numbers[-2:] == [3, 4])
    _run(*sides, until=lambda: _quiet(*sides))
    _close(*sides)


def test_a_silent_rank_of_the_own_gang_is_an_error(context: Context) -> None:
    sides = Side(context, "d"), Side(context, "d", rank=1)
    sides[0].peers.set_pools([sides[1].pool()])
    sides[0].say(sides[1], 1)
    with pytest.raises(PeerError, match="do not reach each other"):
        _time_out(sides[0])
    _close(*sides)


# -- who leaves and comes back ---------------------------------------------------------------------


def test_a_peer_that_forgets_and_is_not_forgotten(context: Context) -> None:
    """One side saw a topology without the other; the other one never missed it."""
    sides = Side(context, "p"), Side(context, "d")
    _meet(*sides)
    sides[0].say(sides[1], 1)
    sides[1].say(sides[0], 1)
    _run(*sides, until=lambda: all(side.got for side in sides))
    sides[0].peers.set_pools([])
    sides[1].say(sides[0], 2)  # not listened to now, and said again
    _run(*sides, until=lambda: sides[0].counters["dropped_unknown_sender"] > 0)
    sides[0].peers.set_pools([sides[1].pool()])
    sides[0].say(sides[1], 2)
    _run(*sides, until=lambda: all(side.numbers == [1, 2] for side in sides))
    _run(*sides, until=lambda: _quiet(*sides))
    assert [side.numbers for side in sides] == [[1, 2], [1, 2]]
    _close(*sides)


def test_a_new_incarnation_starts_anew(context: Context) -> None:
    """What the old one was to be told is not told to the new one, nor heard of it."""
    one, old = Side(context, "p"), Side(context, "d")
    _meet(one, old)
    old.say(one, 1)
    one.say(old, 1)
    _run(one, old, until=lambda: bool(one.got and old.got))
    _close(old)
    one.say(old, 2)
    new = Side(context, "d", incarnation="2")
    _meet(one, new)
    new.say(one, 3)
    one.say(new, 4)
    _run(one, new, until=lambda: bool(new.got) and len(one.got) == 2)
    _run(one, new, until=lambda: _quiet(one, new))
    assert one.numbers == [1, 3]
    assert new.numbers == [4]
    _close(one, new)


def test_frames_of_old_streams_and_for_old_incarnations_are_dropped(context: Context) -> None:
    """A port may be another process's by now, and a connection may be slower than its successor."""
    one, other = Side(context, "p"), Side(context, "d")
    _meet(one, other)
    recorded = b""
    one.say(other, 1)
    _run(one, other, until=lambda: bool(other.got))
    one.peers.set_pools([])
    one.peers.set_pools([other.pool()])
    one.say(other, 2)
    _run(one, other, until=lambda: len(other.got) == 2)
    address = other.peers.address
    for socket_id, counter in (
        (f"{one.identity.routing_id}+1+1", "dropped_old_stream"),
        (f"{one.identity.routing_id}+9+0", "dropped_unknown_sender"),
        (f"{one.identity.routing_id}+x+1", "dropped_unknown_sender"),
        (one.identity.routing_id, "dropped_unknown_sender"),
        ("p/0/2+1+1", "dropped_unknown_sender"),
    ):
        before = other.counters[counter]
        dealer = Dealer(context, address, socket_id)
        recorded = recorded or _frame(context, one, other)
        dealer.send(recorded)
        _run(other, until=lambda: other.counters[counter] == before + 1)  # noqa: B023
        dealer.close()
    assert other.numbers == [1, 2]
    _close(one, other)


def _frame(context: Context, one: Side, other: Side) -> bytes:
    """The first frame of a stream, as it is on the wire."""
    listener = Side(context, other.identity.pool_id)
    speaker = Side(context, one.identity.pool_id)
    _meet(listener, speaker)
    speaker.say(listener, 7)
    _run(speaker, until=lambda: listener.poller.wait(0.01))
    received = listener.peers.router.receive()
    assert received is not None
    _close(listener, speaker)
    return received[1]


def test_a_pool_that_is_cut_off_is_told_of_within_five_seconds_and_when_it_is_back(
    context: Context,
) -> None:
    """Packets vanish, and no connection breaks by itself. The own pool is nobody's to tell of."""
    here, there = Side(context, "d"), Side(context, "p")
    mate = Side(context, "d", rank=1, incarnation="2")
    proxies = [Proxy(side.peers.address) for side in (there, mate)]
    told: list[tuple[str, ...]] = []

    def look() -> None:
        if here.peers.look(time.monotonic()):
            told.append(here.peers.cut_off)

    def until(count: int) -> float:
        started = time.monotonic()
        deadline = started + DEADLINE_S
        while len(told) < count:
            assert time.monotonic() < deadline, told
            for side in (here, there, mate):
                side.poller.wait(0.01)
                side.turn()
            look()
        return time.monotonic() - started

    try:
        own = here.pool()
        own = msgspec.structs.replace(own, ranks=(*own.ranks, *mate.pool(proxies[1].address).ranks))
        here.peers.set_pools([own, there.pool(proxies[0].address)])
        _meet(there, here)
        here.say(there, 1)
        _run(here, there, until=lambda: bool(there.got))
        look()
        for proxy in proxies:
            proxy.is_frozen.set()
        assert until(1) < 5.0
        for proxy in proxies:
            proxy.is_frozen.clear()
        until(2)
        assert told == [("p",), ()]
    finally:
        for proxy in proxies:
            proxy.close()
        _close(here, there, mate)
