"""One rank: its memory, and the real node of its transfer thread."""

from collections.abc import Callable
from functools import partial

from engine.rank_node import RankNode
from kvtransfer.events import Command, Event
from kvtransfer.handoff.actions import StartRead
from kvtransfer.handoff.handoffs import HandoffPolicy
from kvtransfer.identity import PeerName, RankIdentity
from protocol.handoff import HandoffMessage
from protocol.kv import KVLayout
from tests.simulation.model import Memory
from tests.simulation.world import EventLoop

LEASE_S = 2.0
MAX_READS = 3


class Rank:
    """A transfer thread without its thread: the ports of a rank's node.

    Args:
        world: carries what it sends.
        everyone: all ranks by incarnation, the dead ones too.
        identity: who this is.
        layout: of its memory.
        emit: takes the events for its main thread.
    """

    def __init__(
        self,
        world: EventLoop,
        everyone: dict[str, "Rank"],
        identity: RankIdentity,
        layout: KVLayout,
        emit: Callable[[Event], None],
    ) -> None:
        self.identity = identity
        self.memory = Memory(layout)
        self.is_alive = True
        self.emit = emit
        self._world = world
        self._everyone = everyone
        policy = HandoffPolicy("simulated", "always", LEASE_S, MAX_READS)
        self.node = RankNode(identity, layout, self.memory, self, policy)
        everyone[identity.incarnation] = self

    def command(self, command: Command) -> None:
        self.node.command(command, self._world.now)

    # -- messages ----------------------------------------------------------------------------------

    def _incarnation(self, peer: PeerName) -> str | None:
        endpoint = self.node.around.endpoint(peer)
        return None if endpoint is None else endpoint.incarnation

    def send(self, peer: PeerName, message: HandoffMessage) -> None:
        """Send it over the link, on which it may be lost or come twice."""
        world, faults = self._world, self._world.model
        receiver = self._everyone.get(self._incarnation(peer) or "")
        if receiver is None:
            return
        is_abroad = peer.pool_id != self.identity.pool_id
        if is_abroad and world.happens(faults.lost, f"lost {type(message).__name__}"):
            return
        link = (self.identity.incarnation, receiver.identity.incarnation)
        for _ in range(1 + world.happens(faults.doubled, "doubled")):
            world.send(link, partial(receiver.receive, self, message))

    def receive(self, sender: "Rank", message: HandoffMessage) -> None:
        """From a rank that is in this one's topology, or not at all."""
        name = sender.identity.name
        if self.is_alive and self._incarnation(name) == sender.identity.incarnation:
            self.node.message(name, message, self._world.now)

    # -- reads -------------------------------------------------------------------------------------

    def read(self, read: StartRead) -> None:
        """Its bytes land at some moment, all that were there then; its end is seen later."""
        world = self._world
        takes_s = world.delay(world.model.read_s)
        source = self._everyone[read.incarnation]
        is_done = source.is_alive and not world.happens(world.model.failed, "failed")
        if is_done:
            world.at(takes_s * world.random.random(), partial(self._land, source, read))
        world.at(takes_s, partial(self._end_read, source, read, is_done=is_done))

    def _land(self, source: "Rank", read: StartRead) -> None:
        if not (self.is_alive and source.is_alive):
            return
        self.memory.read_from(source.memory, read.runs)
        if read.runs and self._world.happens(self._world.model.corrupted, "corrupted"):
            self.memory.bytes[read.runs[0].target_offset] ^= 1 << self._world.random.randrange(8)

    def _end_read(self, source: "Rank", read: StartRead, *, is_done: bool) -> None:
        if self.is_alive:
            is_done = is_done and source.is_alive
            self.node.read_ended(read.read_id, self._world.now, is_done=is_done)
