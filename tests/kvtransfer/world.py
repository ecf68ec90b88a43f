"""Two or more pools with their hand-off logic and real bytes, but no thread, socket or clock.

Messages wait in one queue per pair of ranks, reads wait until the test lets them land: any order
that a cluster can take, a test can choose.
"""

from collections import Counter, deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

import torch

from engine.rank_node import HandoffPolicy, RankNode
from kvcache.pool import KVPool
from kvtransfer.events import (
    AnnounceBlocks,
    AnnouncedAll,
    Command,
    CommitWhenRead,
    Event,
    OpenTargetBlocks,
    SourceClosed,
    TargetClosed,
)
from kvtransfer.handoff.actions import StartRead
from kvtransfer.identity import PeerName, RankIdentity
from kvtransfer.transport.checksum import PoolChecksums
from protocol.handoff import HandoffMessage, SegmentKey
from protocol.kv import BlockRef, KVLayout, PoolEndpoint

NUM_LAYERS, NUM_HEADS, BLOCK_SIZE, HEAD_DIM = 4, 4, 2, 2
LAYER_GROUPS = (range(2), range(2, 4))
LEASE_S = 30.0
E = TypeVar("E", bound=Event)


class RankWithPool(Protocol):
    """What a transfer needs of a rank: its place, its bytes, and what its main thread was told."""

    @property
    def identity(self) -> RankIdentity: ...

    @property
    def pool(self) -> KVPool: ...

    def told(self, kind: type[E]) -> list[E]: ...


R = TypeVar("R", bound=RankWithPool)


class Pools(Protocol[R]):
    """What a transfer needs of the ranks' surroundings."""

    @property
    def pools(self) -> dict[str, PoolEndpoint]: ...

    def of(self, pool_id: str) -> list[R]: ...

    def command(self, rank: R, command: Command, /) -> None: ...


class Rank:
    """One rank: its bytes, its node, the reads it has in flight, what its main thread was told."""

    def __init__(
        self, world: "World", identity: RankIdentity, layout: KVLayout, policy: HandoffPolicy
    ) -> None:
        self.world = world
        self.identity = identity
        self.pool = KVPool(layout)
        self.node = RankNode(identity, layout, PoolChecksums(self.pool), self, policy)
        self.reads: dict[int, StartRead] = {}
        self.events: list[Event] = []
        self.max_in_flight = 0

    @property
    def name(self) -> PeerName:
        return self.identity.name

    def told(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    # -- the node's ports --------------------------------------------------------------------------

    def send(self, peer: PeerName, message: HandoffMessage) -> None:
        self.world.queues.setdefault((self.name, peer), deque()).append(message)
        self.world.sent.append((self.name, peer, message))

    def read(self, read: StartRead) -> None:
        assert read.read_id not in self.reads
        self.reads[read.read_id] = read
        self.max_in_flight = max(self.max_in_flight, len(self.reads))

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self.world.check_end(self, event)


class World:
    """All ranks of all pools, and everything between them."""

    def __init__(
        self, *, checksum: str = "always", max_reads: int = 4, num_blocks: int = 12
    ) -> None:
        self.ranks: dict[PeerName, Rank] = {}
        self.pools: dict[str, PoolEndpoint] = {}
        self.queues: dict[tuple[PeerName, PeerName], deque[HandoffMessage]] = {}
        self.sent: list[tuple[PeerName, PeerName, HandoffMessage]] = []
        self.now = 100.0
        self._settings = (checksum, max_reads, num_blocks)

    # -- building ----------------------------------------------------------------------------------

    def add(self, pool_id: str, role: str, *, cp: int, tp: int, epoch: int) -> None:
        checksum, max_reads, num_blocks = self._settings
        policy = HandoffPolicy(
            transport_name="memory", checksum=checksum, lease_s=LEASE_S, max_reads=max_reads
        )
        endpoints = []
        for rank in range(cp * tp):
            identity = RankIdentity(role, pool_id, rank, cp, tp, f"{pool_id}{rank}e{epoch}")
            layout = KVLayout(
                NUM_LAYERS,
                num_blocks + rank // tp,  # no two spaces are alike
                NUM_HEADS,
                identity.tp_rank,
                tp,
                BLOCK_SIZE,
                HEAD_DIM,
                "float32",
            )
            member = Rank(self, identity, layout, policy)
            member.node.welcomed(epoch)
            self.ranks[identity.name] = member
            endpoints.append(identity.endpoint(layout))
        self.pools[pool_id] = PoolEndpoint(pool_id, role, epoch, cp, tp, tuple(endpoints))

    def meet(self, *pool_ids: str) -> None:
        """Every rank learns that these pools are there, and no others."""
        for rank in self.ranks.values():
            self.tell_pools(rank, *pool_ids)

    def tell_pools(self, rank: Rank, *pool_ids: str) -> None:
        """One rank learns it."""
        rank.node.pools_changed([self.pools[pool_id] for pool_id in pool_ids], self.now)

    def of(self, pool_id: str) -> list[Rank]:
        return [
            rank for name, rank in sorted(self.ranks.items(), key=_order) if name.pool_id == pool_id
        ]

    # -- one thing at a time -----------------------------------------------------------------------

    def command(self, rank: Rank, command: Command) -> None:
        rank.node.command(command, self.now)

    def message(self, sender: PeerName, receiver: PeerName, message: HandoffMessage) -> None:
        self.ranks[receiver].node.message(sender, message, self.now)

    def waiting(self) -> list[tuple[PeerName, PeerName]]:
        return [pair for pair, queue in self.queues.items() if queue]

    def deliver(self, pair: tuple[PeerName, PeerName]) -> None:
        self.message(*pair, self.queues[pair].popleft())

    def in_flight(self) -> list[tuple[Rank, int]]:
        return [(rank, read_id) for rank in self.ranks.values() for read_id in rank.reads]

    def land(self, rank: Rank, read_id: int, *, is_done: bool = True) -> None:
        """The bytes of a read arrive, as they are at the source at this moment."""
        read = rank.reads.pop(read_id)
        self.copy(rank, read)
        rank.node.read_ended(read_id, self.now, is_done=is_done)

    def copy(self, rank: Rank, read: StartRead) -> None:
        source = next(r for r in self.ranks.values() if r.identity.incarnation == read.incarnation)
        for run in read.runs:
            into = rank.pool.bytes[run.target_offset : run.target_offset + run.num_bytes]
            into.copy_(source.pool.bytes[run.source_offset : run.source_offset + run.num_bytes])

    def settle(self, *, lands: bool = True) -> None:
        """Deliver and land everything, in order, until nothing is left to do."""
        while True:
            if pairs := self.waiting():
                self.deliver(pairs[0])
            elif lands and (reads := self.in_flight()):
                self.land(*reads[0])
            else:
                return

    def tick(self, seconds: float) -> None:
        self.now += seconds
        for rank in self.ranks.values():
            rank.node.tick(self.now)

    # -- what must hold ----------------------------------------------------------------------------

    def check_end(self, rank: Rank, event: Event) -> None:
        """Nothing is in flight into blocks that the leader is told are quiet."""
        if isinstance(event, TargetClosed):
            key = (event.request_id, event.attempt)
            for other in self.of(rank.name.pool_id):
                target = other.node.target
                assert key not in target._handoffs
                is_quiet = not any(read.key == key for read in target._reads.values())
                assert is_quiet, "a read is in flight after TargetClosed"

    @property
    def num_open(self) -> int:
        return sum(rank.node.num_open for rank in self.ranks.values())

    @property
    def counters(self) -> Counter[str]:
        return sum((rank.node.counters for rank in self.ranks.values()), Counter())


def _order(item: tuple[PeerName, Rank]) -> tuple[str, int]:
    return item[0].pool_id, item[0].rank


class Transfer(Generic[R]):
    """One prompt's KV, dealt over a source pool and expected by a target pool.

    Args:
        world: both pools are in it.
        num_blocks: of the prompt; blocks before ``first_logical`` are not moved.
    """

    def __init__(
        self,
        world: Pools[R],
        source: str = "p",
        target: str = "d",
        *,
        request_id: str = "r",
        num_blocks: int = 6,
        first_logical: int = 0,
        num_chunks: int = 2,
        first_block: int = 0,
    ) -> None:
        self.world, self.request_id = world, request_id
        self.source, self.target = world.of(source), world.of(target)
        self.source_pool, self.target_pool = world.pools[source], world.pools[target]
        self.first_logical, self.num_blocks = first_logical, num_blocks
        self.num_tokens = num_blocks * BLOCK_SIZE - 1  # the last block is not full
        generator = torch.Generator().manual_seed(len(request_id) + num_blocks)
        # [layer, logical block, head, K and V, slot, dim]: all different, so a swap shows.
        self.truth = torch.rand(
            (NUM_LAYERS, num_blocks, NUM_HEADS, 2, BLOCK_SIZE, HEAD_DIM), generator=generator
        )
        logical = list(range(first_logical, num_blocks))
        ids = [first_block + (5 * n + 3) % 11 for n in range(len(logical))]  # scattered
        self.target_blocks = tuple(BlockRef(block_id, 7) for block_id in ids)
        # Dealt to the cp ranks in turn; chunk by chunk.
        cp_size, tp_size = self.source_pool.cp_size, self.source_pool.tp_size
        self.owned: dict[int, tuple[int, BlockRef]] = {}  # logical -> (cp rank, its block)
        for n, block in enumerate(logical):
            ref = BlockRef(first_block + (7 * n + 1) % 11, 3)
            self.owned[block] = (n % cp_size, ref)
        size = max(1, -(-len(logical) // num_chunks))
        self.chunks = [logical[start : start + size] for start in range(0, len(logical), size)]
        self.manifest = tuple(
            SegmentKey(cp_rank * tp_size + tp_rank, chunk, layers.start, layers.stop)
            for chunk, blocks in enumerate(self.chunks)
            for cp_rank in range(cp_size)
            if any(self.owned[block][0] == cp_rank for block in blocks)
            for tp_rank in range(tp_size)
            for layers in LAYER_GROUPS
        )
        self.fill()

    @property
    def key(self) -> tuple[str, int]:
        return self.request_id, 1

    @property
    def route(self) -> tuple[str, int]:
        return self.target_pool.pool_id, self.target_pool.epoch

    def fill(self) -> None:
        """Lay the truth into the source's blocks."""
        for rank in self.source:
            for logical, (cp_rank, ref) in self.owned.items():
                if cp_rank == rank.identity.cp_rank:
                    rank.pool.tensor[:, ref.block_id] = self._of(rank, logical)

    def scramble(self) -> None:
        """The source's blocks are somebody else's now."""
        for rank in self.source:
            for cp_rank, ref in self.owned.values():
                if cp_rank == rank.identity.cp_rank:
                    rank.pool.tensor[:, ref.block_id] = -1.0

    def _of(self, rank: R, logical: int) -> torch.Tensor:
        layout = rank.pool.layout
        heads = slice(layout.first_kv_head, layout.first_kv_head + layout.num_kv_heads)
        return self.truth[:, logical, heads]

    @property
    def has_arrived(self) -> bool:
        """Whether every target rank holds exactly the truth."""
        return self.holds_true(len(self.target_blocks))

    def holds_true(self, num_blocks: int) -> bool:
        """Whether every target rank holds the truth of so many leading blocks."""
        return all(
            torch.equal(
                rank.pool.tensor[:, ref.block_id], self._of(rank, self.first_logical + index)
            )
            for rank in self.target
            for index, ref in enumerate(self.target_blocks[:num_blocks])
        )

    # -- what the main threads say -----------------------------------------------------------------

    def open(self) -> None:
        command = OpenTargetBlocks(*self.key, self.first_logical, self.target_blocks)
        self.world.command(self.target[0], command)

    def script(self, rank: R) -> Iterator[Command]:
        """What the main thread of a source rank submits, in order."""
        for chunk, blocks in enumerate(self.chunks):
            mine = [b for b in blocks if self.owned[b][0] == rank.identity.cp_rank]
            if mine:
                for layers in LAYER_GROUPS:
                    yield AnnounceBlocks(
                        *self.key,
                        *self.route,
                        chunk,
                        layers.start,
                        layers.stop,
                        tuple(mine),
                        tuple(self.owned[block][1] for block in mine),
                    )
        yield AnnouncedAll(*self.key, *self.route)
        if rank is self.source[0]:
            yield CommitWhenRead(*self.key, *self.route, self.manifest, self.num_tokens, 42)

    def announce_all(self) -> None:
        for rank in self.source:
            for command in self.script(rank):
                self.world.command(rank, command)

    @property
    def committed(self) -> bool:
        """What the source's leader was told last; fails when it was not told once."""
        (event,) = self.source[0].told(SourceClosed)
        return event.committed


def two_pools(
    cp: int = 1,
    tp: int = 1,
    target_tp: int = 1,
    *,
    checksum: str = "always",
    max_reads: int = 4,
    num_blocks: int = 12,
) -> World:
    """A prefill pool "p" of epoch 5 and a decode pool "d" of epoch 8 that know each other."""
    world = World(checksum=checksum, max_reads=max_reads, num_blocks=num_blocks)
    world.add("p", "prefill", cp=cp, tp=tp, epoch=5)
    world.add("d", "decode", cp=1, tp=target_tp, epoch=8)
    world.meet("p", "d")
    return world
