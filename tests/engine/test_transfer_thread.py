"""Transfer threads as they run: real threads, real ZMQ, a small coordinator, real bytes."""

import itertools
import logging
import queue
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

import engine.transfer_thread
from engine.transfer_thread import TransferThread
from kvcache.pool import KVPool
from kvtransfer.events import (
    CloseSource,
    CloseTarget,
    Command,
    ControlReceived,
    Event,
    HandoffBroken,
    Load,
    PoolsChanged,
    ReportStatus,
    SendControl,
    SourceClosed,
    TargetClosed,
    TargetCommitted,
    TargetIsOpen,
    ThreadDied,
    Welcomed,
)
from kvtransfer.identity import RankIdentity, TransferConfig
from kvtransfer.plan import ByteRun
from kvtransfer.transport.interface import ReadHandle
from protocol.codec import Codec
from protocol.kv import KVLayout, PoolEndpoint
from protocol.messages import (
    Abort,
    BlockCounts,
    CacheUpdate,
    Connected,
    GangAddress,
    GangReady,
    Heartbeat,
    Hello,
    Introduce,
    Refused,
    Released,
    Reserve,
    Shutdown,
    ToCoordinator,
    Topology,
    ToRank,
    Welcome,
)
from protocol.request import SamplingParams
from protocol.sockets import Dealer, Poller, Router, open_context
from tests.kvtransfer.local_transport import LocalFabric, LocalTransport
from tests.kvtransfer.world import Transfer

DEADLINE_S = 20.0
E = TypeVar("E", bound=Event)
M = TypeVar("M", bound=ToCoordinator)
TOKEN = "secret"
EPOCHS = {"p": 5, "d": 8}
GANG = GangAddress(plan="", store="")
SENT_TWICE = {"messages_resent", "dropped_repeated"}  # by a machine that is busy for 0.2 s
_OUT: Codec[ToRank] = Codec(ToRank)
_IN: Codec[ToCoordinator] = Codec(ToCoordinator)


class SeenTransport(LocalTransport):
    """Says when a read has been posted."""

    def __init__(self, incarnation: str, fabric: LocalFabric) -> None:
        super().__init__(incarnation, fabric)
        self.posted: queue.SimpleQueue[int] = queue.SimpleQueue()

    def read(self, incarnation: str, runs: Sequence[ByteRun]) -> ReadHandle:
        handle = super().read(incarnation, runs)
        self.posted.put(handle.num_bytes)
        return handle


class BuggyTransport(LocalTransport):
    def progress(self) -> None:
        raise RuntimeError("planted")


class ThreadRank:
    """A rank with its thread; in place of its main thread stands the test."""

    def __init__(
        self,
        identity: RankIdentity,
        pool: KVPool,
        thread: TransferThread,
        transport: LocalTransport | None,
    ) -> None:
        self.identity = identity
        self.pool = pool
        self.thread = thread
        self.transport = transport
        self.events: list[Event] = []

    def told(self, kind: type[E]) -> list[E]:
        """All events of a kind so far."""
        while True:
            try:
                self.events.append(self.thread.events.get_nowait())
            except queue.Empty:
                return [event for event in self.events if isinstance(event, kind)]

    def wait(self, kind: type[E], number: int = 1) -> E:
        """The event of a kind with that number, now or later."""
        deadline = time.monotonic() + DEADLINE_S
        while len(told := self.told(kind)) < number:
            try:
                self.events.append(self.thread.events.get(timeout=deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {kind.__name__}, but {self.events}") from None
        return told[number - 1]


class Cluster:
    """Ranks, and the coordinator that the test's own thread plays."""

    def __init__(self, directory: Path) -> None:
        self.listen = f"ipc://{directory}"
        self._contexts = open_context(TOKEN)
        self._context = self._contexts.__enter__()
        self._router = Router(self._context, f"{self.listen}/c")
        self._poller = Poller(self._router)
        self.fabric = LocalFabric()
        self.all: list[ThreadRank] = []
        self.pools: dict[str, PoolEndpoint] = {}
        self.hellos: dict[str, Hello] = {}
        self.heard: list[tuple[str, ToCoordinator]] = []
        self._versions = itertools.count(1)

    # -- ranks -------------------------------------------------------------------------------------

    def start(
        self,
        pool_id: str,
        *,
        cp: int = 1,
        tp: int = 1,
        transport: str = "seen",
        **config: Any,
    ) -> None:
        role = {"p": "prefill", "d": "decode"}[pool_id[0]]
        for rank in range(cp * tp):
            incarnation = uuid.uuid4().hex
            identity = RankIdentity(role, pool_id, rank, cp, tp, incarnation)
            layout = KVLayout(4, 12, 4, identity.tp_rank, tp, 2, 2, "float32")
            made = {"seen": SeenTransport, "buggy": BuggyTransport}.get(transport)
            ready = None if made is None else made(incarnation, self.fabric)
            settings = TransferConfig(
                control_address=self._router.address,
                token=config.pop("token", TOKEN),
                listen=self.listen,
                model_fingerprint="model",
                max_model_len=64,
                checksum="always",
                transport=transport,
                heartbeat_interval_s=0.05,
                **config,
            )
            pool = KVPool(layout)
            gang = GANG if identity.is_leader else None
            thread = TransferThread(identity, settings, pool, gang, ready)
            thread.start()
            self.all.append(ThreadRank(identity, pool, thread, ready))

    def of(self, pool_id: str) -> list[ThreadRank]:
        return [rank for rank in self.all if rank.identity.pool_id == pool_id]

    def command(self, rank: ThreadRank, command: Command) -> None:
        rank.thread.submit(command)

    def transport(self, rank: ThreadRank) -> SeenTransport:
        assert isinstance(rank.transport, SeenTransport)
        return rank.transport

    # -- the coordinator ---------------------------------------------------------------------------

    def pump(self, is_done: Callable[[], bool]) -> None:
        """Take in what the ranks say until ``is_done``."""
        deadline = time.monotonic() + DEADLINE_S
        while not is_done():
            assert time.monotonic() < deadline, f"heard only {self.heard[-20:]}"
            self._poller.wait(0.05)
            while (received := self._router.receive()) is not None:
                peer, frame = received
                message = _IN.decode(frame)
                self.heard.append((peer, message))
                if isinstance(message, Hello):
                    self.hellos[peer] = message

    def end_coordinator(self) -> None:
        """Nobody listens any more, and whoever was connected is not."""
        self._poller.remove(self._router)
        self._router.close()

    def start_coordinator(self) -> None:
        self._router = Router(self._context, f"{self.listen}/c")
        self._poller.add(self._router)

    def send(self, rank: ThreadRank, message: ToRank) -> None:
        self._router.send(rank.identity.routing_id, _OUT.encode(message))

    def send_raw(self, rank: ThreadRank, frame: bytes) -> None:
        self._router.send(rank.identity.routing_id, frame)

    def heard_from(self, rank: ThreadRank, kind: type[M]) -> list[M]:
        routing_id = rank.identity.routing_id
        return [m for peer, m in self.heard if peer == routing_id and isinstance(m, kind)]

    def beat(self, rank: ThreadRank) -> Heartbeat:
        """A heartbeat that was sent after this call."""
        before = len(self.heard_from(rank, Heartbeat))
        # Two, because one may have been under way.
        self.pump(lambda: len(self.heard_from(rank, Heartbeat)) > before + 1)
        return self.heard_from(rank, Heartbeat)[-1]

    def welcome(self) -> None:
        """Every rank that was started says HELLO and is welcomed."""
        self.pump(lambda: len(self.hellos) == len(self.all))
        for rank in self.all:
            self.send(rank, Welcome(1, EPOCHS[rank.identity.pool_id], GANG))

    def meet(self, *pool_ids: str) -> int:
        """Tell all ranks that these pools are there; the topology's version."""
        version = next(self._versions)
        for pool_id in pool_ids:
            ranks = self.of(pool_id)
            identity = ranks[0].identity
            self.pools[pool_id] = PoolEndpoint(
                pool_id,
                identity.role,
                EPOCHS[pool_id],
                identity.cp_size,
                identity.tp_size,
                tuple(self.hellos[rank.identity.routing_id].endpoint for rank in ranks),
            )
        topology = Topology(version, tuple(self.pools[pool_id] for pool_id in pool_ids))
        for rank in self.all:
            self.send(rank, topology)
        return version

    def are_connected(self, version: int) -> bool:
        return all(Connected(version) in self.heard_from(rank, Connected) for rank in self.all)

    def boot(self, *pool_ids: str) -> None:
        self.welcome()
        version = self.meet(*pool_ids)
        self.pump(lambda: self.are_connected(version))

    def close(self) -> None:
        for rank in self.all:
            rank.thread.stop(DEADLINE_S)
            assert not rank.thread.is_alive()
        self._router.close()
        self._contexts.__exit__(None, None, None)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


def _pair(cluster: Cluster, **settings: Any) -> Transfer[ThreadRank]:
    """Two prefill and two decode ranks, between which a hand-off is expected."""
    cluster.start("p", cp=2, **settings)
    cluster.start("d", tp=2, **settings)
    cluster.boot("p", "d")
    return _expect(cluster)


def _expect(cluster: Cluster, source: str = "p", target: str = "d") -> Transfer[ThreadRank]:
    transfer = Transfer(cluster, source, target)
    transfer.open()
    transfer.target[0].wait(TargetIsOpen)
    return transfer


def _wait_posted(cluster: Cluster, transfer: Transfer[ThreadRank]) -> None:
    """Until every target rank has a read in flight."""
    for rank in transfer.target:
        cluster.transport(rank).posted.get(timeout=DEADLINE_S)


# -- a hand-off ------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["seen", "tcp", "nixl"])
def test_it_commits_with_every_byte(cluster: Cluster, transport: str) -> None:
    transfer = _pair(cluster, transport=transport)
    transfer.announce_all()
    committed = transfer.target[0].wait(TargetCommitted)
    assert transfer.has_arrived
    assert transfer.source[0].wait(SourceClosed).committed
    assert committed.first_token_id == 42
    assert committed.stats.transport == ("local" if transport == "seen" else transport)
    assert committed.stats.num_bytes == sum(
        rank.pool.layout.num_layers * rank.pool.layout.block_bytes * len(transfer.target_blocks)
        for rank in transfer.target
    )
    for rank in cluster.all:
        assert cluster.beat(rank).counters.keys() <= SENT_TWICE
        assert not rank.told(ThreadDied)


@pytest.mark.parametrize("kind", ["open_target", "target_opened", "announce", "source_done"])
def test_a_message_that_is_lost_costs_nothing_but_time(cluster: Cluster, kind: str) -> None:
    """Between pools and inside a gang: the first of a kind of each rank, and two of ten frames."""
    faults = f"handoff.send.{kind}:drop@1,handoff.send:drop%3:0.2"
    transfer = _pair(cluster, failpoints=faults)
    transfer.announce_all()
    transfer.target[0].wait(TargetCommitted)
    assert transfer.source[0].wait(SourceClosed).committed
    assert transfer.has_arrived
    counters = [cluster.beat(rank).counters for rank in cluster.all]
    assert sum(found.get(f"failpoint:handoff.send.{kind}:drop", 0) for found in counters) > 0
    assert sum(found.get("messages_resent", 0) for found in counters) > 0


def test_a_close_that_is_lost_in_a_gang_is_said_again(cluster: Cluster) -> None:
    """Nobody but the gang's own ranks would ever miss it."""
    kinds = ("close", "closed", "reads_ended")
    faults = ",".join(f"handoff.send.{kind}:drop@1" for kind in kinds)
    transfer = _pair(cluster, failpoints=faults)
    cluster.command(transfer.target[0], CloseTarget(*transfer.key))
    transfer.target[0].wait(TargetClosed)
    counters = [cluster.beat(rank).counters for rank in transfer.target]
    assert sum(found.get("failpoint:handoff.send.closed:drop", 0) for found in counters) == 1


def test_from_decode_to_prefill(cluster: Cluster) -> None:
    """The same code the other way; the reader connects when it reads."""
    cluster.start("p", tp=2)
    cluster.start("d", tp=1)
    cluster.boot("p", "d")
    transfer = _expect(cluster, "d", "p")
    transfer.announce_all()
    transfer.target[0].wait(TargetCommitted)
    assert transfer.has_arrived


def test_one_after_the_other(cluster: Cluster) -> None:
    """Ten prompts through the same blocks of both pools: nothing of one is left for the next."""
    cluster.start("p", cp=2)
    cluster.start("d", tp=2)
    cluster.boot("p", "d")
    for number in range(1, 11):
        transfer = Transfer(cluster, request_id="x" * number)  # the bytes differ as well
        transfer.open()
        transfer.target[0].wait(TargetIsOpen, number)
        transfer.announce_all()
        transfer.source[0].wait(SourceClosed, number)
        transfer.target[0].wait(TargetCommitted, number)
        assert transfer.has_arrived


def test_aborted_at_the_target_while_reading(cluster: Cluster) -> None:
    transfer = _pair(cluster)
    cluster.fabric.hold()
    transfer.announce_all()
    _wait_posted(cluster, transfer)
    target = transfer.target[0]
    cluster.command(target, CloseTarget(*transfer.key))
    cluster.command(target, SendControl(GangReady()))
    cluster.pump(lambda: bool(cluster.heard_from(target, GangReady)))  # the close was dealt with
    assert not target.told(TargetClosed)
    cluster.fabric.release()
    target.wait(TargetClosed)
    assert "closed" in transfer.source[0].wait(HandoffBroken).reason
    cluster.command(transfer.source[0], CloseSource(*transfer.key))
    assert not transfer.source[0].wait(SourceClosed).committed
    assert not target.told(TargetCommitted)


def test_aborted_at_the_source_while_reading(cluster: Cluster) -> None:
    transfer = _pair(cluster)
    cluster.fabric.hold()
    transfer.announce_all()
    _wait_posted(cluster, transfer)
    source = transfer.source[0]
    cluster.command(source, CloseSource(*transfer.key))
    cluster.command(source, SendControl(GangReady()))
    cluster.pump(lambda: bool(cluster.heard_from(source, GangReady)))
    assert not source.told(SourceClosed)
    cluster.fabric.release()
    transfer.target[0].wait(HandoffBroken)
    cluster.command(transfer.target[0], CloseTarget(*transfer.key))
    transfer.target[0].wait(TargetClosed)
    assert not source.wait(SourceClosed).committed
    assert not transfer.target[0].told(TargetCommitted)


def test_announced_after_the_close(cluster: Cluster) -> None:
    transfer = _pair(cluster)
    cluster.command(transfer.target[0], CloseTarget(*transfer.key))
    transfer.target[0].wait(TargetClosed)
    transfer.announce_all()
    assert "closed" in transfer.source[0].wait(HandoffBroken).reason
    cluster.command(transfer.source[0], CloseSource(*transfer.key))
    assert not transfer.source[0].wait(SourceClosed).committed
    assert all(cluster.transport(rank).posted.empty() for rank in transfer.target)


def test_bytes_that_change_before_they_are_read(cluster: Cluster) -> None:
    transfer = _pair(cluster)
    cluster.fabric.hold()
    transfer.announce_all()
    _wait_posted(cluster, transfer)
    transfer.scramble()
    cluster.fabric.release()
    assert "do not add up" in transfer.target[0].wait(HandoffBroken).reason
    counters = [cluster.beat(rank).counters for rank in transfer.target]
    assert sum(c.get("checksum_mismatches", 0) for c in counters) > 0


def test_the_target_pool_leaves(cluster: Cluster) -> None:
    transfer = _pair(cluster)
    cluster.fabric.hold()
    transfer.announce_all()
    _wait_posted(cluster, transfer)
    cluster.meet("p")
    assert "d is gone" in transfer.source[0].wait(HandoffBroken).reason
    cluster.command(transfer.source[0], CloseSource(*transfer.key))
    assert not transfer.source[0].wait(SourceClosed).committed  # nobody is waited for
    cluster.fabric.release()


# -- the coordinator -------------------------------------------------------------------------------


def test_a_rank_boots(cluster: Cluster) -> None:
    cluster.start("p")
    cluster.welcome()
    (rank,) = cluster.all
    assert rank.wait(Welcomed).welcome.pool_epoch == EPOCHS["p"]
    hello = cluster.hellos[rank.identity.routing_id]
    assert (hello.gang, hello.model_fingerprint) == (GANG, "model")
    assert hello.endpoint.layout == rank.pool.layout
    version = cluster.meet("p")
    cluster.pump(lambda: cluster.are_connected(version))
    assert [pool.pool_id for pool in rank.wait(PoolsChanged).pools] == ["p"]
    cluster.send(rank, Abort("r", 1))
    assert rank.wait(ControlReceived).message == Abort("r", 1)


def test_heartbeats_say_what_was_reported(cluster: Cluster) -> None:
    cluster.start("d")
    cluster.welcome()
    (rank,) = cluster.all
    started = time.monotonic() - 100.0
    load = Load(
        1,
        2,
        3,
        blocks=(BlockCounts(total=9, free=4, owned=3, in_flight=2, cached=0),),
        counters={"hits": 4.0},
    )
    cluster.command(rank, ReportStatus(7, started, load))
    cluster.pump(lambda: any(h.num_steps == 7 for h in cluster.heard_from(rank, Heartbeat)))
    heartbeat = cluster.beat(rank)
    assert 100.0 <= heartbeat.step_age_s < 100.0 + DEADLINE_S
    assert (heartbeat.num_waiting, heartbeat.num_running, heartbeat.pending_tokens) == (1, 2, 3)
    assert heartbeat.blocks == load.blocks
    assert heartbeat.counters == {"hits": 4.0}
    assert heartbeat.rss_bytes > 1 << 20
    cluster.command(rank, ReportStatus(8, None))
    cluster.pump(lambda: any(h.num_steps == 8 for h in cluster.heard_from(rank, Heartbeat)))
    assert cluster.beat(rank).step_age_s == 0.0


def test_a_coordinator_that_is_gone_is_given_up(cluster: Cluster) -> None:
    """What it asked for ends; the next one is told what this pool is, and has. One that says
    nothing at all for longer than the time-out is not gone."""
    cluster.start("d", coordinator_timeout_s=1.0)
    cluster.boot("d")
    (rank,) = cluster.all
    name = rank.identity.routing_id
    for message in (GangReady(7.0), CacheUpdate(stored=(b"a", b"b")), CacheUpdate(evicted=(b"a",))):
        cluster.command(rank, SendControl(message))
    asked = Reserve("r", 1, (1,), SamplingParams(max_tokens=1))
    cluster.send(rank, asked)
    assert rank.wait(ControlReceived).message == asked
    silent_until = time.monotonic() + 1.5
    cluster.pump(lambda: time.monotonic() > silent_until)
    assert set(cluster.hellos) == {name}
    cluster.end_coordinator()
    assert rank.wait(ControlReceived, 2).message == Abort("r", 1)
    cluster.start_coordinator()
    cluster.pump(lambda: f"{name}+1" in cluster.hellos)
    hello = cluster.hellos[f"{name}+1"]
    assert hello.coordinator_epoch == 1
    assert hello.endpoint == cluster.hellos[name].endpoint
    cluster.command(rank, SendControl(Released("r", 1)))
    cluster.command(rank, ReportStatus(num_steps=3, step_started=None))  # commands keep their order
    cluster.pump(
        lambda: any(isinstance(m, Heartbeat) and m.num_steps == 3 for _, m in cluster.heard)
    )
    cluster._router.send(f"{name}+1", _OUT.encode(Welcome(2, 99, GANG)))

    def told() -> list[ToCoordinator]:
        said = [m for peer, m in cluster.heard if peer == f"{name}+1"]
        return [m for m in said if not isinstance(m, Heartbeat | Hello)]

    cluster.pump(lambda: len(told()) == 2)
    assert told() == [CacheUpdate(stored=(b"b",)), GangReady(7.0)]
    assert len(rank.told(Welcomed)) == 1, "the gang has formed long ago"


def test_a_handoff_outlives_no_coordinator(cluster: Cluster) -> None:
    """A new coordinator gives new epochs: what was under way under the old ones ends in order."""
    transfer = _pair(cluster)
    cluster.fabric.hold()
    transfer.announce_all()
    _wait_posted(cluster, transfer)
    known = len(cluster.hellos)
    for rank in cluster.all:
        cluster.send(rank, Introduce(1))
    cluster.pump(lambda: len(cluster.hellos) == known + len(cluster.all))
    pools = [msgspec.structs.replace(p, epoch=p.epoch + 100) for p in cluster.pools.values()]
    for rank in cluster.all:
        identity = rank.identity
        for message in (
            Welcome(2, EPOCHS[identity.pool_id] + 100, GANG),
            Topology(1, tuple(pools)),
        ):
            cluster._router.send(f"{identity.routing_id}+1", _OUT.encode(message))
    assert "gone" in transfer.source[0].wait(HandoffBroken).reason
    cluster.command(transfer.source[0], CloseSource(*transfer.key))
    assert not transfer.source[0].wait(SourceClosed).committed
    target = transfer.target[0]
    cluster.command(target, CloseTarget(*transfer.key))
    assert not target.told(TargetClosed), "its reads are still in flight"
    cluster.fabric.release()
    target.wait(TargetClosed)
    assert not target.told(TargetCommitted)


def test_a_refused_rank_ends(cluster: Cluster) -> None:
    cluster.start("p")
    cluster.pump(lambda: bool(cluster.hellos))
    (rank,) = cluster.all
    cluster.send(rank, Refused("its block size is another"))
    died = rank.wait(ThreadDied)
    assert not died.clean
    assert "refused" in died.reason
    assert "block size" in died.reason


def test_a_rank_that_is_never_welcomed_ends(cluster: Cluster) -> None:
    cluster.start("p", hello_timeout_s=0.1)
    died = cluster.all[0].wait(ThreadDied)
    assert not died.clean
    assert "no WELCOME" in died.reason


def test_shutdown_ends_it_cleanly(cluster: Cluster) -> None:
    cluster.start("p")
    cluster.welcome()
    cluster.send(cluster.all[0], Shutdown("enough"))
    assert cluster.all[0].wait(ThreadDied) == ThreadDied("enough", clean=True)


def test_stopping_ends_it_cleanly_and_twice_is_fine(cluster: Cluster) -> None:
    cluster.start("p")
    (rank,) = cluster.all
    rank.thread.stop(DEADLINE_S)
    rank.thread.stop(DEADLINE_S)
    assert rank.wait(ThreadDied).clean


def test_a_bug_ends_it_and_says_so(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        cluster.start("p", transport="buggy")
        assert not cluster.all[0].wait(ThreadDied).clean
    assert "planted" in caplog.text


def test_an_unknown_transport_ends_it_with_the_reason(cluster: Cluster) -> None:
    cluster.start("p", transport="pigeon")
    died = cluster.all[0].wait(ThreadDied)
    assert not died.clean
    assert "pigeon" in died.reason


# -- the network -----------------------------------------------------------------------------------


def test_strangers_and_garbage_are_dropped_and_counted(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    transfer = _pair(cluster)
    rank = transfer.target[0]
    address = cluster.hellos[rank.identity.routing_id].endpoint.address
    with open_context(TOKEN) as context:
        stranger = Dealer(context, address, "p/0/someone-else")
        for frame in (b"", b"GET / HTTP/1.1", b"\x02\x80", b"\x00" * 100):
            stranger.send(frame)
        cluster.pump(lambda: cluster.beat(rank).counters.get("dropped_unknown_sender") == 4)
        stranger.close()
    for _ in range(5):
        cluster.send_raw(rank, b"\x63nonsense")
    cluster.pump(lambda: cluster.beat(rank).counters.get("dropped_undecodable") == 5)
    assert caplog.text.count("from the coordinator") == 3  # of 5: the first, second and fourth
    transfer.announce_all()
    rank.wait(TargetCommitted)
    assert transfer.has_arrived


def test_a_pool_that_cannot_be_read_is_tried_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.transfer_thread, "RECONNECT_INTERVAL_S", 0.05)
    cluster.start("p")
    cluster.start("d")
    cluster.welcome()
    (prefill,), (decode,) = cluster.of("p"), cluster.of("d")
    incarnation = prefill.identity.incarnation
    cluster.fabric.leave(incarnation)
    version = cluster.meet("p", "d")
    reached = decode.wait(PoolsChanged)
    assert [pool.pool_id for pool in reached.pools] == ["d"]
    cluster.pump(lambda: cluster.beat(decode).counters.get("connects_failed", 0) > 1)
    assert not cluster.heard_from(decode, Connected)
    cluster.fabric.join(incarnation, prefill.pool)
    cluster.pump(lambda: cluster.are_connected(version))
    assert [pool.pool_id for pool in decode.told(PoolsChanged)[-1].pools] == ["p", "d"]
    transfer = _expect(cluster)
    transfer.announce_all()
    decode.wait(TargetCommitted)
    assert transfer.has_arrived
