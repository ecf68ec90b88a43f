"""A fetch between two pools in memory: any degrees on either side, every way to fail."""

from collections.abc import Callable
from typing import TypeVar

import msgspec
import pytest
import torch

from kvtransfer.events import (
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
from kvtransfer.identity import PeerName
from protocol.handoff import Confirm, Fetch, FetchRefused, HandoffMessage
from protocol.kv import BlockRef
from tests.kvtransfer import world as worlds

KEY = ("a", 1)
EPOCHS = {"decode0": 3, "prefill0": 5}


E = TypeVar("E", bound=Event)


class World(worlds.World):
    """A decode pool and a prefill pool; what their leaders are asked, and are told."""

    def __init__(self, decode_tp: int, prefill_cp: int, prefill_tp: int) -> None:
        super().__init__(max_reads=2)
        self.add("decode0", "decode", cp=1, tp=decode_tp, epoch=EPOCHS["decode0"])
        self.add("prefill0", "prefill", cp=prefill_cp, tp=prefill_tp, epoch=EPOCHS["prefill0"])
        self.meet(*EPOCHS)

    def ask(self, pool_id: str, command: Command) -> None:
        self.command(self.of(pool_id)[0], command)

    def told(self, pool_id: str, kind: type[E]) -> list[E]:
        return self.of(pool_id)[0].told(kind)

    def settle_without(self, is_lost: Callable[[HandoffMessage], bool]) -> None:
        """As ``settle``, but for messages that are lost."""
        while self.waiting() or self.in_flight():
            for pair in self.waiting():
                if is_lost(self.queues[pair][0]):
                    self.queues[pair].popleft()
                else:
                    self.deliver(pair)
            for read in self.in_flight():
                self.land(*read)

    def assert_over(self) -> None:
        assert self.num_open == 0


SHAPES = [(1, 1, 1), (2, 2, 1), (1, 4, 1), (2, 2, 2), (4, 1, 2), (1, 2, 4)]
FIRST = 2  # logical block
SOURCE_BLOCKS = (5, 1, 9, 8, 3)
TARGET_BLOCKS = (0, 7, 2, 3, 11)


def open_and_ask(world: World, cp_size: int) -> None:
    owners = tuple(index * 7 % cp_size for index in range(len(TARGET_BLOCKS)))
    blocks = tuple(BlockRef(block_id, 4) for block_id in TARGET_BLOCKS)
    world.ask("prefill0", OpenTargetBlocks(*KEY, FIRST, blocks, owners))
    world.settle()
    assert world.told("prefill0", TargetIsOpen) == [TargetIsOpen(*KEY)]
    world.ask("prefill0", Fetch(*KEY, "decode0", EPOCHS["decode0"], FIRST, owners))
    world.settle()


def serve(world: World) -> None:
    [asked] = world.told("decode0", Fetch)
    blocks = tuple(BlockRef(block_id, 2) for block_id in SOURCE_BLOCKS)
    world.ask("decode0", asked.served(blocks))


@pytest.mark.parametrize(("decode_tp", "cp_size", "tp_size"), SHAPES)
def test_every_block_lands_where_it_belongs(decode_tp: int, cp_size: int, tp_size: int) -> None:
    world = World(decode_tp, cp_size, tp_size)
    for rank in world.of("decode0"):
        rank.pool.tensor.copy_(torch.rand(rank.pool.tensor.shape))
    open_and_ask(world, cp_size)
    serve(world)
    world.settle()
    [committed] = world.told("prefill0", TargetCommitted)
    assert committed.num_tokens == (FIRST + len(SOURCE_BLOCKS)) * worlds.BLOCK_SIZE
    assert world.told("decode0", SourceClosed) == [SourceClosed(*KEY, committed=True)]
    whole = torch.cat([rank.pool.tensor[:, SOURCE_BLOCKS] for rank in world.of("decode0")], dim=2)
    num_landed = 0
    for target in world.of("prefill0"):
        layout = target.pool.layout
        heads = slice(layout.first_kv_head, layout.first_kv_head + layout.num_kv_heads)
        for index, block_id in enumerate(TARGET_BLOCKS):
            landed = target.pool.tensor[:, block_id]
            if index * 7 % cp_size == target.identity.cp_rank:
                assert torch.equal(landed, whole[:, index, heads])
                num_landed += layout.num_layers * layout.block_bytes
            else:
                assert not landed.any()
    assert committed.stats.num_bytes == num_landed, "nothing is read twice or for nobody"
    world.assert_over()


def test_a_refusal_breaks_it_for_the_one_who_asked() -> None:
    world = World(2, 2, 1)
    open_and_ask(world, 2)
    [asked] = world.told("decode0", Fetch)
    world.ask("decode0", asked.refused("evicted"))
    world.settle()
    [broken] = world.told("prefill0", HandoffBroken)
    assert broken.side == "target" and "decode0 refused: evicted" in broken.reason
    world.ask("prefill0", CloseTarget(*KEY))
    world.settle()
    assert world.told("prefill0", TargetClosed) == [TargetClosed(*KEY)]
    world.assert_over()


def test_a_refusal_of_nothing_is_dropped() -> None:
    world = World(1, 1, 1)
    refused = FetchRefused(
        *KEY,
        target_pool_id="prefill0",
        target_epoch=EPOCHS["prefill0"],
        source_epoch=EPOCHS["decode0"],
        reason="what?",
    )
    world.ask("decode0", refused)
    world.settle()
    assert world.of("prefill0")[0].events == []
    world.assert_over()


def test_a_source_that_has_gone_is_not_asked() -> None:
    world = World(1, 1, 1)
    world.ask("prefill0", OpenTargetBlocks(*KEY, 0, (BlockRef(0, 1),), (0,)))
    world.settle()
    world.pools["decode0"] = msgspec.structs.replace(world.pools["decode0"], epoch=4)
    world.meet(*EPOCHS)
    world.ask("prefill0", Fetch(*KEY, "decode0", 3, 0, (0,)))
    world.settle()
    assert [broken.side for broken in world.told("prefill0", HandoffBroken)] == ["target"]
    assert world.told("decode0", Fetch) == []


@pytest.mark.parametrize("who", ["target", "source"])
def test_a_close_while_bytes_are_on_their_way_waits_for_them(who: str) -> None:
    world = World(2, 2, 1)
    open_and_ask(world, 2)
    serve(world)
    world.settle(lands=False)
    assert len(world.in_flight()) == 4
    if who == "target":
        world.ask("prefill0", CloseTarget(*KEY))
    else:
        world.ask("decode0", CloseSource(*KEY))
    world.settle(lands=False)
    assert not world.told("prefill0", TargetClosed) and not world.told("decode0", SourceClosed)
    world.settle()
    if who == "source":  # the target learns it when it asks for what it has read
        assert [broken.side for broken in world.told("prefill0", HandoffBroken)] == ["target"]
        world.ask("prefill0", CloseTarget(*KEY))
    else:
        assert [broken.side for broken in world.told("decode0", HandoffBroken)] == ["source"]
        world.ask("decode0", CloseSource(*KEY))
    world.settle()
    assert world.told("prefill0", TargetClosed) == [TargetClosed(*KEY)]
    assert world.told("decode0", SourceClosed) == [SourceClosed(*KEY, committed=False)]
    assert not world.told("prefill0", TargetCommitted)
    world.assert_over()


def test_a_lost_confirmation_commits_nothing() -> None:
    world = World(2, 2, 1)
    open_and_ask(world, 2)
    serve(world)
    world.settle_without(lambda m: isinstance(m, Confirm) and m.segment.source_rank == 1)
    assert not world.told("prefill0", TargetCommitted)


def test_an_announcement_of_a_block_that_lies_elsewhere_is_not_read() -> None:
    """The target goes by its own leader's map, whatever the source believes."""
    world = World(1, 2, 1)
    open_and_ask(world, 2)
    blocks = tuple(BlockRef(block_id, 2) for block_id in SOURCE_BLOCKS)
    [asked] = world.told("decode0", Fetch)
    wrong = msgspec.structs.replace(asked.served(blocks), owners=(0,) * 5)
    world.ask("decode0", wrong)
    world.settle()
    [broken] = world.told("prefill0", HandoffBroken)
    assert "nobody asked for" in broken.reason
    assert not world.told("prefill0", TargetCommitted)


def test_only_the_right_ones_may_speak() -> None:
    world = World(2, 2, 1)
    open_and_ask(world, 2)
    leader = world.ranks[PeerName("prefill0", 0)]
    stale = FetchRefused(
        *KEY, "prefill0", target_epoch=EPOCHS["prefill0"], source_epoch=2, reason=""
    )
    from_follower = FetchRefused(
        *KEY,
        "prefill0",
        target_epoch=EPOCHS["prefill0"],
        source_epoch=EPOCHS["decode0"],
        reason="",
    )
    told = len(leader.events)
    leader.node.message(PeerName("decode0", 0), stale, 0.0)
    leader.node.message(PeerName("decode0", 1), from_follower, 0.0)
    assert leader.node.counters["dropped_stale_epoch"] == 2
    assert not world.waiting() and len(leader.events) == told


@pytest.mark.parametrize("field", ["source_epoch", "target_epoch"])
def test_a_fetch_of_another_epoch_asks_nobody(field: str) -> None:
    world = World(1, 1, 1)
    leader = world.ranks[PeerName("decode0", 0)]
    right = Fetch(
        *KEY,
        source_pool_id="decode0",
        target_pool_id="prefill0",
        source_epoch=EPOCHS["decode0"],
        target_epoch=EPOCHS["prefill0"],
        first_logical=0,
        owners=(0,),
    )
    epoch_there = getattr(right, field)
    for epoch, asks in ((epoch_there - 1, False), (epoch_there, True)):
        fetch = msgspec.structs.replace(right, **{field: epoch})
        leader.node.message(PeerName("prefill0", 0), fetch, 0.0)
        assert bool(world.told("decode0", Fetch)) is asks
    assert leader.node.counters["dropped_stale_epoch"] == 1


def test_an_answer_to_a_question_of_an_earlier_epoch_serves_nothing() -> None:
    """The source was welcomed by another coordinator meanwhile."""
    world = World(2, 2, 1)
    open_and_ask(world, 2)
    for rank in world.of("decode0"):
        rank.node.welcomed(EPOCHS["decode0"] + 1)
    serve(world)
    [broken] = world.told("decode0", HandoffBroken)
    assert broken.side == "source" and "epoch" in broken.reason
    assert not world.waiting()
    world.ask("decode0", CloseSource(*KEY))
    world.ask("prefill0", CloseTarget(*KEY))
    world.settle()
    assert world.told("decode0", SourceClosed) == [SourceClosed(*KEY, committed=False)]
    world.assert_over()
