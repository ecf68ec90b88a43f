"""A rank's transfer thread: it owns every socket to the coordinator and to other ranks, the
transport and its reads, the heartbeat and the state of the hand-offs.

1. It opens the transport on the KV pool, binds its socket and sends ``Hello``.
2. ``Welcome`` goes to the main thread, which forms the gang.
3. Each ``Topology`` is connected to, and answered by ``Connected`` once all of it can be reached.
4. From then on: commands of the main thread, messages of other ranks and ends of reads go into the
   rank's node (rank_node.py), whose ports are here.
5. Requests of the coordinator go to the main thread. When the connection to it is lost, all of
   them are aborted in its place, and the rank sends ``Hello`` to the next one
   (kvtransfer/links/coordinator_lease.py).
6. Messages that other ranks have not acknowledged are sent again (kvtransfer/links/peers.py).
7. Shutdown, a refusal or an error end the thread, and with it the process: its last event is
   ``ThreadDied``.

The loop waits in one poll for all sockets and for the main thread's commands. While bytes may be
moving it polls the transport each millisecond, because UCX makes progress only when both sides poll
it.
"""

import logging
import queue
import threading
import time

import msgspec
import zmq

from engine.rank_node import HandoffPolicy, RankNode
from kvcache.pool import KVPool
from kvtransfer.events import (
    Command,
    ControlReceived,
    Event,
    PoolsChanged,
    ReportStatus,
    SendControl,
    StopThread,
    ThreadDied,
    Welcomed,
)
from kvtransfer.faulty import FaultyCoordinatorConnection, FaultyPeers, FaultyTransport
from kvtransfer.handoff.actions import StartRead
from kvtransfer.identity import PeerName, RankIdentity, TransferConfig
from kvtransfer.links.coordinator_connection import CoordinatorConnection
from kvtransfer.links.peers import Peers
from kvtransfer.transport.checksum import PoolChecksums
from kvtransfer.transport.choose import open_transport
from kvtransfer.transport.interface import KVTransport, ReadHandle, ReadState
from protocol.errors import BatonError, TransferError
from protocol.handoff import HandoffMessage
from protocol.kv import PoolEndpoint, RankEndpoint
from protocol.messages import (
    Connected,
    GangAddress,
    Introduce,
    Refused,
    Shutdown,
    Topology,
    ToRank,
    Welcome,
)
from protocol.process.failpoints import Failpoints
from protocol.sockets import Poller, Waker, open_context

RECONNECT_INTERVAL_S = 2.0
READS = (("decode", "prefill"), ("decode", "store"), ("store", "prefill"))  # (reader, source)

_log = logging.getLogger(__name__)


class _Stopped(Exception):
    """The thread is to end; ``clean`` when it was asked to."""

    def __init__(self, reason: str, *, clean: bool) -> None:
        super().__init__(reason)
        self.clean = clean


class TransferThread(threading.Thread):
    """One rank's transfer thread.

    Args:
        identity: of this rank.
        config: addresses, budgets, policies.
        pool: the rank's KV.
        gang: the addresses where the gang meets; None for a follower.
        transport: one that has not been started, in place of the one that ``config`` names.
    """

    def __init__(
        self,
        identity: RankIdentity,
        config: TransferConfig,
        pool: KVPool,
        gang: GangAddress | None,
        transport: KVTransport | None = None,
    ) -> None:
        super().__init__(name=f"transfer {identity.routing_id}", daemon=True)
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._identity = identity
        self._config = config
        self._pool = pool
        self._gang = gang
        self._transport = transport
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._contexts = open_context(config.token)
        self._context = self._contexts.__enter__()
        self._waker = Waker(self._context, identity.incarnation)
        self._wake = self._waker.handle()
        self._stop_asked = False

    def submit(self, command: Command) -> None:
        """Hand a command over; does not block. For the main thread."""
        self._commands.put(command)
        self._wake.wake()

    def stop(self, timeout_s: float) -> None:
        """End the thread, waiting up to ``timeout_s``. Idempotent; for the main thread."""
        if self._stop_asked:
            return
        self._stop_asked = True
        if self.is_alive():
            self.submit(StopThread())
            self.join(timeout_s)
        if self.is_alive():
            return  # it hangs in a library: its sockets cannot be closed under it
        self._wake.close()
        self._contexts.__exit__(None, None, None)

    def run(self) -> None:
        try:
            config = self._config
            transport = self._transport or open_transport(
                config.transport,
                self._identity.incarnation,
                token=config.token,
                host=_host(config.listen),
            )
            loop = _Loop(self._identity, config, self._pool, transport, self.events, self._commands)
            loop.run(self._context, self._waker, self._gang)
        except _Stopped as stop:
            died = ThreadDied(str(stop), stop.clean)
        except BatonError as error:
            died = ThreadDied(str(error), clean=False)
        except Exception:  # noqa: BLE001 - the thread's outermost frame: a bug ends the process
            _log.exception("the transfer thread has ended by a bug")
            died = ThreadDied("a bug, see the log", clean=False)
        finally:
            self._waker.close()
        self.events.put(died)


class _Loop:
    """The state of a running transfer thread: the rank's node, and its ports."""

    def __init__(
        self,
        identity: RankIdentity,
        config: TransferConfig,
        pool: KVPool,
        transport: KVTransport,
        events: "queue.SimpleQueue[Event]",
        commands: "queue.SimpleQueue[Command]",
    ) -> None:
        self._identity = identity
        self._config = config
        self._pool = pool
        self._events = events
        self._commands = commands
        self._reads: dict[int, ReadHandle] = {}
        self._topology: Topology | None = None
        self._endpoints: dict[str, RankEndpoint] = {}  # of the topology, by incarnation
        self._reconnect_at: float | None = None
        policy = HandoffPolicy(
            transport_name=transport.name,
            checksum=config.checksum,
            lease_s=config.lease_s,
            max_reads=config.max_reads,
        )
        self._node = RankNode(identity, pool.layout, PoolChecksums(pool), self, policy)
        self._failpoints = Failpoints(config.failpoints, self._node.counters)
        if self._failpoints:
            transport = FaultyTransport(transport, self._failpoints)
        self._transport = transport

    def run(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        waker: Waker,
        gang: GangAddress | None,
    ) -> None:
        """Turn until something ends it, which is raised."""
        config = self._config
        self._peers = self._open_peers(context)
        poller = Poller(self._peers.router, waker)
        self._control = self._open_control(context, poller)
        self._transport.start(self._pool)
        self._control.say_hello(self._endpoint(), gang)
        deadline = time.monotonic() + config.hello_timeout_s
        try:
            while True:
                is_busy = bool(self._reads) or self._node.is_being_read
                poll_s = config.busy_poll_s if is_busy else config.idle_poll_s
                poller.wait(min(poll_s, self._peers.due_at - time.monotonic()))
                waker.drain()
                self._turn()
                was_welcome = self._control.lease.was_welcome
                if not was_welcome and time.monotonic() > deadline:
                    raise _Stopped(f"no WELCOME within {config.hello_timeout_s:.0f} s", clean=False)
        finally:
            self._peers.close()
            self._control.close()
            self._transport.close()

    def _open_peers(self, context: zmq.Context[zmq.Socket[bytes]]) -> Peers:
        me = self._identity
        listen = self._config.listen
        counters = self._node.counters
        if self._failpoints:
            return FaultyPeers(context, me, listen, counters, self._failpoints)
        return Peers(context, me, listen, counters)

    def _open_control(
        self, context: zmq.Context[zmq.Socket[bytes]], poller: Poller
    ) -> CoordinatorConnection:
        me = self._identity
        config = self._config
        if self._failpoints:
            return FaultyCoordinatorConnection(context, me, config, poller, self._failpoints)
        return CoordinatorConnection(context, me, config, self._node.counters, poller)

    def _turn(self) -> None:
        self._transport.progress()
        for told in self._control.receive():
            self._on_control(told)
        self._take_commands()
        for sender, message in self._peers.receive():
            self._node.message(sender, message, time.monotonic())
        self._poll_reads()
        now = time.monotonic()
        if self._control.is_over(now):
            self._change_coordinator("its connection is lost")
        if self._reconnect_at is not None and now > self._reconnect_at:
            self._connect()
        self._node.tick(now)
        self._peers.keep_up(now)
        if self._peers.look(now):
            self._control.tell_cut_off(self._peers.cut_off)
        self._control.beat(now)

    # -- the coordinator ---------------------------------------------------------------------------

    def _on_control(self, message: ToRank) -> None:
        match message:
            case Welcome():
                self._on_welcome(message)
            case Topology():
                self._on_topology(message)
            case Introduce():
                self._change_coordinator("it does not know this rank")
            case Refused():
                raise _Stopped(f"the coordinator refused this rank: {message.reason}", clean=False)
            case Shutdown():
                raise _Stopped(message.reason or "shutdown", clean=True)
            case _:
                self._events.put(ControlReceived(message))

    def _on_welcome(self, welcome: Welcome) -> None:
        self._node.welcomed(welcome.pool_epoch)
        if self._control.lease.welcomed():
            self._events.put(Welcomed(welcome))
            return
        _log.info("taken over by coordinator %d", welcome.coordinator_epoch)
        for message in self._control.lease.greeting():
            self._control.send(message)

    def _change_coordinator(self, reason: str) -> None:
        """Abort all requests of this coordinator, and introduce this rank again.

        The other pools stay connected, so that hand-offs with them can be closed in order. Epochs
        keep their messages apart from those of later pools.
        """
        level = logging.WARNING if self._control.lease.is_welcome else logging.DEBUG
        aborts = self._control.change_coordinator()
        _log.log(level, "coordinator given up, %s: %d requests end", reason, len(aborts))
        self._topology = None
        self._reconnect_at = None
        for abort in aborts:
            self._events.put(ControlReceived(abort))

    def _on_topology(self, topology: Topology) -> None:
        self._topology = topology
        self._peers.set_pools(topology.pools)
        endpoints = {rank.incarnation: rank for pool in topology.pools for rank in pool.ranks}
        for incarnation in self._endpoints.keys() - endpoints.keys():
            self._transport.disconnect(incarnation)
        self._endpoints = endpoints
        self._node.pools_changed(topology.pools, time.monotonic())
        self._connect()

    def _connect(self) -> None:
        """Connect to the pools of the topology; those out of reach are tried again later."""
        topology = self._topology
        assert topology is not None, "there is something to connect to"
        pools = tuple(pool for pool in topology.pools if self._can_read(pool))
        self._events.put(PoolsChanged(pools))
        names = ", ".join(pool.pool_id for pool in pools)
        _log.info("topology %d: %s can be reached", topology.version, names)
        if len(pools) == len(topology.pools):
            self._reconnect_at = None
            self._control.send(Connected(topology.version))
        else:
            self._reconnect_at = time.monotonic() + RECONNECT_INTERVAL_S

    def _can_read(self, pool: PoolEndpoint) -> bool:
        """Connect to a pool that this one reads from all the time; False if it is out of reach.

        Pools of other roles are connected to at the first read.
        """
        if (self._identity.role, pool.role) not in READS:
            return True
        try:
            for endpoint in pool.ranks:
                self._transport.connect(endpoint)
        except TransferError as error:
            self._node.counters["connects_failed"] += 1
            _log.warning("%s: %s", pool.pool_id, error)
            return False
        return True

    def _endpoint(self) -> RankEndpoint:
        return msgspec.structs.replace(
            self._identity.endpoint(self._pool.layout, self._peers.address),
            transport=self._transport.name,
            agent_metadata=self._transport.metadata(),
            base_address=self._pool.base_address,
        )

    # -- the main thread ---------------------------------------------------------------------------

    def _take_commands(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            match command:
                case SendControl():
                    self._control.send(command.message)
                case ReportStatus():
                    self._control.report(command)
                case StopThread():
                    raise _Stopped("stopped", clean=True)
                case _:
                    self._node.command(command, time.monotonic())

    # -- the node's ports --------------------------------------------------------------------------

    def send(self, peer: PeerName, message: HandoffMessage) -> None:
        """Send a message to another rank."""
        self._peers.send(peer, message)

    def emit(self, event: Event) -> None:
        """Give an event to the main thread."""
        self._events.put(event)

    def read(self, read: StartRead) -> bool | None:
        """Post a read; one that cannot be posted has failed."""
        endpoint = self._endpoints.get(read.incarnation)
        try:
            if endpoint is not None:
                self._transport.connect(endpoint)  # a no-op after the first read
            handle = self._transport.read(read.incarnation, read.runs)
        except TransferError as error:
            _log.warning("read not posted: %s", error)
            return False
        is_done = self._poll(handle)
        if is_done is None:
            self._reads[read.read_id] = handle
        return is_done  # in shared memory it has ended already

    def _poll_reads(self) -> None:
        for read_id, handle in list(self._reads.items()):
            is_done = self._poll(handle)
            if is_done is not None:
                del self._reads[read_id]
                self._node.read_ended(read_id, time.monotonic(), is_done=is_done)

    def _poll(self, handle: ReadHandle) -> bool | None:
        state = self._transport.poll(handle)
        return None if state is ReadState.IN_FLIGHT else state is ReadState.DONE


def _host(listen: str) -> str:
    return listen.removeprefix("tcp://") if listen.startswith("tcp://") else "127.0.0.1"
