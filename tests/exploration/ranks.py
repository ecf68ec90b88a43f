"""One rank: the real node of its transfer thread, its memory, and the reads in flight.

What it says goes into the outbox, by the name of whoever is to get it.
"""

from dataclasses import dataclass

from engine.rank_node import HandoffPolicy, RankNode
from kvtransfer.events import Command, ControlReceived, Event, PoolsChanged, SendControl
from kvtransfer.handoff.actions import StartRead
from kvtransfer.handoff.states import SourceState
from kvtransfer.identity import PeerName, RankIdentity
from kvtransfer.plan import ByteRun
from protocol.handoff import HandoffMessage
from protocol.kv import KVLayout, RankEndpoint
from protocol.messages import (
    CacheUpdate,
    Connected,
    GangReady,
    Hello,
    Progress,
    Topology,
    ToRank,
    Welcome,
)
from tests.exploration.inputs import (
    COORDINATOR,
    CORRUPTED,
    DONE,
    FAILED,
    Compute,
    Computed,
    LeaseEnds,
    Message,
    Option,
    Outbox,
    ReadEnds,
    Start,
)
from tests.exploration.memory import Memory

LEASE_S = 30.0


@dataclass(frozen=True, slots=True)
class _Reading:
    incarnation: str
    runs: tuple[ByteRun, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """How a transfer thread is set up, and what may befall it.

    ``informs``: the coordinator is told how far a prompt is and what is cached, which it needs for
    its choice among pools alone.
    """

    checksum: str = "off"
    max_reads: int = 4
    reads_fail: bool = True
    reads_corrupt: bool = False
    leases_end: bool = False
    informs: bool = True


class Rank:
    """A transfer thread without its thread.

    Args:
        identity: who this is; its incarnation is its name among all.
        layout: of its memory.
        main: the name of the leader's main thread.
        setting: of the transfer thread.
    """

    def __init__(
        self, identity: RankIdentity, layout: KVLayout, main: str, setting: Setting
    ) -> None:
        self.identity = identity
        self.memory = Memory(layout)
        policy = HandoffPolicy(
            transport_name="explored",
            checksum=setting.checksum,
            lease_s=LEASE_S,
            max_reads=setting.max_reads,
        )
        self.node = RankNode(identity, layout, self.memory, self, policy)
        self.reads: dict[int, _Reading] = {}
        self.outbox: Outbox = []
        self._main = main
        self.hello: Hello | None = None  # what it says when it starts
        self.has_started = False
        self._setting = setting

    @property
    def endpoint(self) -> RankEndpoint:
        return self.identity.endpoint(self.memory.layout)

    @property
    def name(self) -> str:
        return self.identity.incarnation

    def _say(self, receiver: str, message: Message) -> None:
        self.outbox.append((self.name, receiver, message))

    @property
    def is_quiet(self) -> bool:
        return not (self.reads or self.node.num_open)

    # -- steps of its own --------------------------------------------------------------------------

    def options(self) -> list[Option]:
        """What can happen here without a message."""
        found: list[Option] = []
        for reading in dict.fromkeys(self.reads.values()):
            ways = (DONE, FAILED, CORRUPTED) if self._setting.reads_corrupt else (DONE, FAILED)
            found += [ReadEnds(reading.incarnation, reading.runs, how) for how in ways]
        if self._setting.leases_end and self._is_waiting_for_readers():
            found.append(LeaseEnds())
        return found

    def _is_waiting_for_readers(self) -> bool:
        handoffs = self.node.source._handoffs.values()
        return any(handoff.state is SourceState.CLOSING for handoff in handoffs)

    def take(self, option: Option, found: bytes | None) -> None:
        """Take one of its options; ``found`` is what a read finds at its source."""
        match option:
            case LeaseEnds():
                self.node.tick(0.0)
                self.node.tick(2 * LEASE_S)
            case ReadEnds():
                reading = _Reading(option.incarnation, option.runs)
                read_id = next(n for n, other in self.reads.items() if other == reading)
                del self.reads[read_id]
                self.memory.land(option.runs, found if option.how == DONE else None)
                is_done = option.how != FAILED
                self.node.read_ended(read_id, 0.0, is_done=is_done)

    # -- what it is told ---------------------------------------------------------------------------

    def receive(self, sender: str, message: Message) -> None:
        """From the coordinator, the launcher, the main thread or another rank."""
        if isinstance(message, HandoffMessage):
            self._on_rank(sender, message)
        elif isinstance(message, Command | Compute):
            self._on_main(message)
        else:
            assert isinstance(message, ToRank | Start), f"not for a rank: {message}"
            self._on_control(message)

    def _on_control(self, message: ToRank | Start) -> None:
        match message:
            case Start():
                assert self.hello is not None
                self.has_started = True
                self._say(COORDINATOR, self.hello)
            case Welcome():
                self.node.welcomed(message.pool_epoch)
                self._say(COORDINATOR, GangReady())
            case Topology():
                self.node.pools_changed(message.pools, 0.0)
                if self.identity.is_leader:
                    self._say(self._main, PoolsChanged(message.pools))
                self._say(COORDINATOR, Connected(message.version))
            case _:
                self._say(self._main, ControlReceived(message))

    def _on_main(self, message: Command | Compute) -> None:
        match message:
            case Compute():
                for block_id, content in message.blocks:
                    self.memory.write(block_id, content)
                self._say(self._main, Computed(self.identity.rank))
            case SendControl():
                if self._setting.informs or not isinstance(message.message, CacheUpdate | Progress):
                    self._say(COORDINATOR, message.message)
            case _:
                self.node.command(message, 0.0)

    def _on_rank(self, incarnation: str, message: HandoffMessage) -> None:
        """Who is not in the topology is not listened to."""
        for pool in self.node.around.pools.values():
            for endpoint in pool.ranks:
                if endpoint.incarnation == incarnation:
                    name = PeerName(pool.pool_id, endpoint.rank)
                    self.node.message(name, message, 0.0)
                    return

    # -- the node's ports --------------------------------------------------------------------------

    def send(self, peer: PeerName, message: HandoffMessage) -> None:
        """Send a message to another rank, if it is there."""
        endpoint = self.node.around.endpoint(peer)
        if endpoint is not None:
            self._say(endpoint.incarnation, message)

    def read(self, read: StartRead) -> None:
        """Begin a read; how it ends is one of the options."""
        self.reads[read.read_id] = _Reading(read.incarnation, read.runs)

    def emit(self, event: Event) -> None:
        """Tell the leader's main thread; a follower's has nothing to decide."""
        if self.identity.is_leader:
            self._say(self._main, event)
