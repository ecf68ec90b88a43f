"""A fetch between two pools in memory: any degrees on either side, every way to fail."""

import random
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from engine.rank_node import RankNode
from kvtransfer.events import (
    AskFetch,
    CloseSource,
    CloseTarget,
    Command,
    Event,
    HandoffBroken,
    OpenTargetBlocks,
    SourceClosed,
    TargetClosed,
    TargetCommitted,
    TargetIsOpen,
)
from kvtransfer.handoff.actions import StartRead
from kvtransfer.handoff.handoffs import HandoffPolicy
from kvtransfer.identity import PeerName, RankIdentity
from kvtransfer.plan import Run
from protocol.handoff import Confirm, Fetch, FetchRefused, HandoffMessage
from protocol.kv import BlockRef, KVLayout, PoolEndpoint

KEY = ("a", 1)
EPOCHS = {"decode0": 3, "prefill0": 5}
NUM_LAYERS, NUM_HEADS, NUM_BLOCKS = 2, 4, 12


class Rank:
    """One rank's node over its bytes; what its ports are given waits in the world."""

    def __init__(self, world: "World", role: str, rank: int, cp_size: int, tp_size: int) -> None:
        pool_id = f"{role}0"
        self.world = world
        self.identity = RankIdentity(role, pool_id, rank, cp_size, tp_size, f"{pool_id}-{rank}")
        self.layout = KVLayout(
            NUM_LAYERS, NUM_BLOCKS, NUM_HEADS, rank % tp_size, tp_size, 4, 2, "float32"
        )
        self.bytes = bytearray(self.layout.num_bytes)
        policy = HandoffPolicy("memory", "always", lease_s=5.0, max_reads=2)
        self.node = RankNode(self.identity, self.layout, self, self, policy)
        self.node.welcomed(EPOCHS[pool_id])

    def source_checksum(self, runs: Sequence[Run]) -> int:
        return self._sum([(run.source_offset, run.num_bytes) for run in runs])

    def target_checksum(self, runs: Sequence[Run]) -> int:
        return self._sum([(run.target_offset, run.num_bytes) for run in runs])

    def _sum(self, spans: Sequence[tuple[int, int]]) -> int:
        crc = 0
        for offset, num_bytes in spans:
            crc = zlib.crc32(self.bytes[offset : offset + num_bytes], crc)
        return crc

    def send(self, peer: PeerName, message: HandoffMessage) -> None:
        self.world.wire.append((self.identity.name, peer, message))

    def read(self, read: StartRead) -> None:
        self.world.unread.append((self, read))

    def emit(self, event: Event) -> None:
        self.world.events[self.identity.pool_id].append(event)

    def head(self, layer: int, block_id: int, head: int) -> slice:
        offset = self.layout.offset(layer, block_id, head - self.layout.first_kv_head)
        return slice(offset, offset + self.layout.head_bytes)

    def heads(self) -> range:
        first = self.layout.first_kv_head
        return range(first, first + self.layout.num_kv_heads)


class World:
    """A decode pool and a prefill pool, and what is on its way between their ranks."""

    def __init__(self, decode_tp: int, prefill_cp: int, prefill_tp: int) -> None:
        self.now = 0.0
        self.ranks = {
            PeerName(rank.identity.pool_id, rank.identity.rank): rank
            for role, cp, tp in (("decode", 1, decode_tp), ("prefill", prefill_cp, prefill_tp))
            for rank in (Rank(self, role, index, cp, tp) for index in range(cp * tp))
        }
        self.events: dict[str, list[Event]] = {"decode0": [], "prefill0": []}
        self.wire: deque[tuple[PeerName, PeerName, HandoffMessage]] = deque()
        self.lose: Callable[[HandoffMessage], bool] = lambda _: False
        self.is_reading = True
        self.unread: list[tuple[Rank, StartRead]] = []
        self.set_pools(EPOCHS)

    def pool(self, pool_id: str) -> list[Rank]:
        return [rank for name, rank in self.ranks.items() if name.pool_id == pool_id]

    def set_pools(self, epochs: dict[str, int]) -> None:
        pools = []
        for pool_id, epoch in epochs.items():
            ranks = self.pool(pool_id)
            first = ranks[0].identity
            endpoints = tuple(rank.identity.endpoint(rank.layout) for rank in ranks)
            pools.append(
                PoolEndpoint(pool_id, first.role, epoch, first.cp_size, first.tp_size, endpoints)
            )
        for rank in self.ranks.values():
            rank.node.pools_changed(pools, self.now)

    def command(self, pool_id: str, command: Command) -> None:
        self.ranks[PeerName(pool_id, 0)].node.command(command, self.now)

    def read(self) -> None:
        """Every byte that is on its way lands."""
        unread, self.unread = self.unread, []
        for target, read in unread:
            source = next(
                r for r in self.ranks.values() if r.identity.incarnation == read.incarnation
            )
            for run in read.runs:
                copied = source.bytes[run.source_offset : run.source_offset + run.num_bytes]
                target.bytes[run.target_offset : run.target_offset + run.num_bytes] = copied
            target.node.read_ended(read.read_id, self.now, is_done=True)

    def run(self) -> None:
        """Until nothing is on its way."""
        while self.wire or (self.unread and self.is_reading):
            if not self.wire:
                self.read()
                continue
            sender, receiver, message = self.wire.popleft()
            if not self.lose(message):
                self.ranks[receiver].node.message(sender, message, self.now)

    def of(self, pool_id: str, kind: type) -> list[Any]:
        return [event for event in self.events[pool_id] if isinstance(event, kind)]

    def assert_over(self) -> None:
        assert [rank.node.num_open for rank in self.ranks.values()] == [0] * len(self.ranks)


SHAPES = [(1, 1, 1), (2, 2, 1), (1, 4, 1), (2, 2, 2), (4, 1, 2), (1, 2, 4)]
FIRST = 2  # logical block
SOURCE_BLOCKS = (5, 1, 9, 8, 3)
TARGET_BLOCKS = (0, 7, 2, 3, 11)


def open_and_ask(world: World, cp_size: int) -> None:
    owners = tuple(index * 7 % cp_size for index in range(len(TARGET_BLOCKS)))
    blocks = tuple(BlockRef(block_id, 4) for block_id in TARGET_BLOCKS)
    world.command("prefill0", OpenTargetBlocks(*KEY, FIRST, blocks, owners))
    world.run()
    assert world.of("prefill0", TargetIsOpen) == [TargetIsOpen(*KEY)]
    world.command("prefill0", AskFetch(*KEY, "decode0", EPOCHS["decode0"], FIRST, owners))
    world.run()


def serve(world: World) -> None:
    [asked] = world.of("decode0", Fetch)
    blocks = tuple(BlockRef(block_id, 2) for block_id in SOURCE_BLOCKS)
    world.command("decode0", asked.served(blocks))


@pytest.mark.parametrize(("decode_tp", "cp_size", "tp_size"), SHAPES)
def test_every_block_lands_where_it_belongs(decode_tp: int, cp_size: int, tp_size: int) -> None:
    world = World(decode_tp, cp_size, tp_size)
    rng = random.Random(1)
    for rank in world.pool("decode0"):
        rank.bytes[:] = rng.randbytes(len(rank.bytes))
    open_and_ask(world, cp_size)
    serve(world)
    world.run()
    [committed] = world.of("prefill0", TargetCommitted)
    assert committed.num_tokens == (FIRST + len(SOURCE_BLOCKS)) * 4
    assert world.of("decode0", SourceClosed) == [SourceClosed(*KEY, committed=True)]
    num_landed = 0
    for target in world.pool("prefill0"):
        for layer in range(NUM_LAYERS):
            for index, (source_id, target_id) in enumerate(
                zip(SOURCE_BLOCKS, TARGET_BLOCKS, strict=True)
            ):
                is_here = index * 7 % cp_size == target.identity.cp_rank
                num_landed += is_here * target.layout.block_bytes
                for head in target.heads():
                    [source] = [r for r in world.pool("decode0") if head in r.heads()]
                    landed = target.bytes[target.head(layer, target_id, head)]
                    sent = source.bytes[source.head(layer, source_id, head)]
                    assert landed == (sent if is_here else bytes(len(sent)))
    assert committed.stats.num_bytes == num_landed, "nothing is read twice or for nobody"
    world.assert_over()


def test_a_refusal_breaks_it_for_the_one_who_asked() -> None:
    world = World(2, 2, 1)
    open_and_ask(world, 2)
    [asked] = world.of("decode0", Fetch)
    world.command("decode0", asked.refused("evicted"))
    world.run()
    [broken] = world.of("prefill0", HandoffBroken)
    assert broken.side == "target" and "decode0 refused: evicted" in broken.reason
    world.command("prefill0", CloseTarget(*KEY))
    world.run()
    assert world.of("prefill0", TargetClosed) == [TargetClosed(*KEY)]
    world.assert_over()


def test_a_refusal_of_nothing_is_dropped() -> None:
    world = World(1, 1, 1)
    refused = FetchRefused(*KEY, EPOCHS["decode0"], EPOCHS["prefill0"], "what?", "prefill0")
    world.command("decode0", refused)
    world.run()
    assert world.events["prefill0"] == []
    world.assert_over()


def test_a_source_that_has_gone_is_not_asked() -> None:
    world = World(1, 1, 1)
    world.command("prefill0", OpenTargetBlocks(*KEY, 0, (BlockRef(0, 1),), (0,)))
    world.run()
    world.set_pools({"decode0": 4, "prefill0": EPOCHS["prefill0"]})
    world.command("prefill0", AskFetch(*KEY, "decode0", 3, 0, (0,)))
    world.run()
    assert [broken.side for broken in world.of("prefill0", HandoffBroken)] == ["target"]
    assert world.of("decode0", Fetch) == []


@pytest.mark.parametrize("who", ["target", "source"])
def test_a_close_while_bytes_are_on_their_way_waits_for_them(who: str) -> None:
    world = World(2, 2, 1)
    open_and_ask(world, 2)
    serve(world)
    world.is_reading = False
    world.run()
    assert len(world.unread) == 4
    world.command(*{
        "target": ("prefill0", CloseTarget(*KEY)), "source": ("decode0", CloseSource(*KEY)),
    }[who])  # fmt: skip
    world.run()
    assert not world.of("prefill0", TargetClosed) and not world.of("decode0", SourceClosed)
    world.is_reading = True
    world.run()
    if who == "source":  # the target learns it when it asks for what it has read
        assert [broken.side for broken in world.of("prefill0", HandoffBroken)] == ["target"]
        world.command("prefill0", CloseTarget(*KEY))
    else:
        assert [broken.side for broken in world.of("decode0", HandoffBroken)] == ["source"]
        world.command("decode0", CloseSource(*KEY))
    world.run()
    assert world.of("prefill0", TargetClosed) == [TargetClosed(*KEY)]
    assert world.of("decode0", SourceClosed) == [SourceClosed(*KEY, committed=False)]
    assert not world.of("prefill0", TargetCommitted)
    world.assert_over()


def test_a_lost_confirmation_commits_nothing() -> None:
    world = World(2, 2, 1)
    open_and_ask(world, 2)
    world.lose = lambda message: isinstance(message, Confirm) and message.key.source_rank == 1
    serve(world)
    world.run()
    assert not world.of("prefill0", TargetCommitted)


def test_an_announcement_of_a_block_that_lies_elsewhere_is_not_read() -> None:
    """The target goes by its own leader's map, whatever the source believes."""
    world = World(1, 2, 1)
    open_and_ask(world, 2)
    blocks = tuple(BlockRef(block_id, 2) for block_id in SOURCE_BLOCKS)
    [asked] = world.of("decode0", Fetch)
    wrong = msgspec.structs.replace(asked.served(blocks), owners=(0,) * 5)
    world.command("decode0", wrong)
    world.run()
    [broken] = world.of("prefill0", HandoffBroken)
    assert "nobody asked for" in broken.reason
    assert not world.of("prefill0", TargetCommitted)


def test_only_the_right_ones_may_speak() -> None:
    world = World(2, 2, 1)
    open_and_ask(world, 2)
    leader = world.ranks[PeerName("prefill0", 0)]
    stale = FetchRefused(*KEY, source_epoch=2, target_epoch=EPOCHS["prefill0"], reason="")
    from_follower = FetchRefused(
        *KEY, source_epoch=EPOCHS["decode0"], target_epoch=EPOCHS["prefill0"], reason=""
    )
    told = len(world.events["prefill0"])
    leader.node.message(PeerName("decode0", 0), stale, 0.0)
    leader.node.message(PeerName("decode0", 1), from_follower, 0.0)
    assert leader.node.counters["dropped_stale_epoch"] == 2
    assert not world.wire and len(world.events["prefill0"]) == told


@pytest.mark.parametrize("field", ["source_epoch", "target_epoch"])
def test_a_fetch_of_another_epoch_asks_nobody(field: str) -> None:
    world = World(1, 1, 1)
    leader = world.ranks[PeerName("decode0", 0)]
    epochs = {"source_epoch": EPOCHS["decode0"], "target_epoch": EPOCHS["prefill0"]}
    for epoch, asks in ((epochs[field] - 1, False), (epochs[field], True)):
        fetch = Fetch(*KEY, "prefill0", **{**epochs, field: epoch}, first_logical=0, owners=(0,))
        leader.node.message(PeerName("prefill0", 0), fetch, 0.0)
        assert bool(world.of("decode0", Fetch)) is asks
    assert leader.node.counters["dropped_stale_epoch"] == 1


def test_an_answer_to_a_question_of_an_earlier_epoch_serves_nothing() -> None:
    """The source was welcomed by another coordinator meanwhile."""
    world = World(2, 2, 1)
    open_and_ask(world, 2)
    for rank in world.pool("decode0"):
        rank.node.welcomed(EPOCHS["decode0"] + 1)
    serve(world)
    [broken] = world.of("decode0", HandoffBroken)
    assert broken.side == "source" and "epoch" in broken.reason
    assert not world.wire
    world.command("decode0", CloseSource(*KEY))
    world.command("prefill0", CloseTarget(*KEY))
    world.run()
    assert world.of("decode0", SourceClosed) == [SourceClosed(*KEY, committed=False)]
    world.assert_over()
