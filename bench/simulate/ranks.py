"""One rank: its memory as bytes, and the real node of its transfer thread."""

import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from bench.simulate.event_loop import EventLoop
from engine.rank_node import HandoffPolicy, RankNode
from kvtransfer.events import Command, Event
from kvtransfer.handoff.actions import StartRead
from kvtransfer.identity import PeerName, RankIdentity
from kvtransfer.plan import ByteRun
from protocol.handoff import HandoffMessage
from protocol.kv import KVLayout

LEASE_S = 2.0
MAX_READS = 3


class Memory:
    """One rank's KV, as bytes in the order of its layout."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.bytes = bytearray(b"\xa5" * layout.num_bytes)
        self.words = memoryview(self.bytes).cast("I")

    def save(self, block_id: int) -> list[bytes]:
        """Each layer's part of a block."""
        return [bytes(self.bytes[place]) for place in self._parts(block_id)]

    def restore(self, block_id: int, saved: Sequence[bytes]) -> None:
        for place, part in zip(self._parts(block_id), saved, strict=True):
            self.bytes[place] = part

    def _parts(self, block_id: int) -> list[slice]:
        layout = self.layout
        starts = [layout.offset(layer, block_id, 0) for layer in range(layout.num_layers)]
        return [slice(start, start + layout.block_bytes) for start in starts]

    def read_from(self, source: "Memory", runs: Sequence[ByteRun]) -> None:
        """What a transport does when the bytes of a read land."""
        for run in runs:
            found = source.bytes[run.source_offset : run.source_offset + run.num_bytes]
            self.bytes[run.target_offset : run.target_offset + run.num_bytes] = found

    def source_checksum(self, runs: Sequence[ByteRun]) -> int:
        return self._checksum((run.source_offset, run.num_bytes) for run in runs)

    def target_checksum(self, runs: Sequence[ByteRun]) -> int:
        return self._checksum((run.target_offset, run.num_bytes) for run in runs)

    def _checksum(self, pieces: Iterable[tuple[int, int]]) -> int:
        found = 0
        for start, size in pieces:
            found = zlib.crc32(self.bytes[start : start + size], found)
        return found


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
        policy = HandoffPolicy(
            transport_name="simulated", checksum="always", lease_s=LEASE_S, max_reads=MAX_READS
        )
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
