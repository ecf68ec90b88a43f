"""The hand-off's logic, case by case: what commits, what is dropped, what breaks, what closes."""

from typing import TypeVar

import msgspec
import pytest

from kvtransfer.events import (
    AnnounceBlocks,
    CloseSource,
    CloseTarget,
    CommitWhenRead,
    HandoffBroken,
    OpenTargetBlocks,
    SourceClosed,
    TargetClosed,
    TargetCommitted,
    TargetIsOpen,
)
from kvtransfer.handoff.recently_ended import MAX_TOMBS, RecentlyEnded
from kvtransfer.identity import PeerName
from protocol.handoff import (
    Announce,
    Commit,
    Confirm,
    HandoffMessage,
    ReadDone,
    ReadsEnded,
    SegmentKey,
)
from protocol.kv import BlockRef
from tests.kvtransfer.world import LEASE_S, NUM_LAYERS, Rank, Transfer, World, two_pools

SHAPES = [(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 1), (2, 2, 2), (4, 1, 2), (2, 1, 4), (3, 4, 2)]


M = TypeVar("M", bound=HandoffMessage)


def _broken(rank: Rank) -> str:
    (event,) = rank.told(HandoffBroken)
    return event.reason


def _sent(world: World, kind: type[M]) -> list[M]:
    return [message for _, _, message in world.sent if isinstance(message, kind)]


def _opened(
    cp: int = 1, tp: int = 1, target_tp: int = 1, *, checksum: str = "always", max_reads: int = 4
) -> tuple[World, Transfer[Rank]]:
    """A world in which a hand-off is expected."""
    world = two_pools(cp, tp, target_tp, checksum=checksum, max_reads=max_reads)
    transfer = Transfer(world)
    transfer.open()
    world.settle()
    return world, transfer


# -- the good end ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"cp{s[0]}tp{s[1]}-to-tp{s[2]}")
def test_every_byte_arrives_and_commits_once(shape: tuple[int, int, int]) -> None:
    world, transfer = _opened(*shape)
    assert len(transfer.target[0].told(TargetIsOpen)) == 1
    assert not transfer.has_arrived
    transfer.announce_all()
    world.settle()
    (committed,) = transfer.target[0].told(TargetCommitted)
    assert transfer.has_arrived
    assert transfer.committed
    assert (committed.num_tokens, committed.first_token_id) == (transfer.num_tokens, 42)
    moved = len(transfer.target_blocks) * sum(
        rank.pool.layout.block_bytes * NUM_LAYERS for rank in transfer.target
    )
    assert committed.stats.num_bytes == moved
    assert committed.stats.num_layers == NUM_LAYERS
    assert world.num_open == 0
    assert not world.counters


def test_a_held_prefix_is_not_moved() -> None:
    world = two_pools(2, 1, 2)
    transfer = Transfer(world, num_blocks=7, first_logical=3)
    transfer.open()
    world.settle()
    transfer.announce_all()
    world.settle()
    assert transfer.target[0].told(TargetCommitted)
    assert transfer.has_arrived


def test_nothing_to_move_still_commits() -> None:
    """The target holds the whole prompt: zero segments, an empty manifest."""
    world = two_pools(2, 1, 2)
    transfer = Transfer(world, num_blocks=4, first_logical=4)
    assert transfer.manifest == ()
    transfer.open()
    world.settle()
    transfer.announce_all()
    world.settle()
    assert transfer.target[0].told(TargetCommitted)
    assert transfer.committed


def test_two_hand_offs_cross() -> None:
    """The same request, from p to d and from d to p: every rank is source and target at once."""
    world = World()
    world.add("p", "prefill", cp=1, tp=2, epoch=5)
    world.add("d", "decode", cp=1, tp=4, epoch=8)
    world.meet("p", "d")
    there = Transfer(world, "p", "d", num_blocks=5)
    # The blocks of the two are apart: 0..10 are taken by neither's fifth block upward.
    back = Transfer(world, "d", "p", num_blocks=1, first_block=11 - 3)
    for transfer in (there, back):
        transfer.open()
    world.settle()
    for transfer in (there, back):
        transfer.fill()
        transfer.announce_all()
    world.settle()
    for transfer in (there, back):
        assert transfer.target[0].told(TargetCommitted)
        assert transfer.has_arrived


def test_two_swapped_blocks_would_be_noticed() -> None:
    """The test of the test: a deal that names two blocks the wrong way round shows in the bytes."""
    world, transfer = _opened(1, 1, 2)
    (first, second) = (0, 1)
    transfer.owned[first], transfer.owned[second] = transfer.owned[second], transfer.owned[first]
    transfer.announce_all()
    world.settle()
    assert transfer.target[0].told(TargetCommitted)
    assert not transfer.has_arrived


def test_statistics_tell_what_overlapped() -> None:
    world, transfer = _opened(1, 1, 2)
    for command in transfer.script(transfer.source[0]):
        world.command(transfer.source[0], command)
        if isinstance(command, AnnounceBlocks) and command.layer_start == 0:
            world.now += 1.0
            for _ in range(2):
                world.settle(lands=False)
                world.now += 0.25
                for rank, read_id in world.in_flight():
                    world.land(rank, read_id)
    world.now += 0.5  # the second group of the last chunk lands after the prefill has ended
    world.settle()
    (committed,) = transfer.target[0].told(TargetCommitted)
    stats = committed.stats
    assert stats.num_layers_overlapped == 2
    assert stats.exposed_s == pytest.approx(0.5)
    assert stats.read_s >= 0.5
    assert stats.num_segments == 2 * len(transfer.manifest)
    assert stats.transport == "memory"


def test_reads_in_flight_are_bounded() -> None:
    world, transfer = _opened(4, 1, 1, max_reads=2)
    transfer.announce_all()
    world.settle(lands=False)
    assert len(transfer.target[0].reads) == 2
    world.settle()
    assert transfer.has_arrived
    assert transfer.target[0].max_in_flight == 2


# -- fencing ---------------------------------------------------------------------------------------


def _first_announce(world: World, transfer: Transfer[Rank]) -> Announce:
    world.command(transfer.source[0], next(transfer.script(transfer.source[0])))
    return _sent(world, Announce)[0]


@pytest.mark.parametrize(
    ("change", "counter"),
    [
        ({"attempt": 2}, "dropped_unknown_handoff"),
        ({"request_id": "other"}, "dropped_unknown_handoff"),
        ({"source_epoch": 4}, "dropped_stale_epoch"),
        ({"target_epoch": 9}, "dropped_stale_epoch"),
        ({"source_pool_id": "q"}, "dropped_stale_epoch"),
    ],
)
def test_a_stale_announcement_is_dropped(change: dict[str, object], counter: str) -> None:
    world, transfer = _opened()
    message = msgspec.structs.replace(_first_announce(world, transfer), **change)
    world.queues.clear()
    world.message(PeerName("p", 0), PeerName("d", 0), message)
    assert not world.in_flight()
    assert not world.waiting()
    assert world.counters == {counter: 1}


def test_a_second_source_pool_is_not_mixed_in() -> None:
    """Segment keys name ranks of one pool; another pool's rank 0 has keys that look the same."""
    world = World()
    world.add("p", "prefill", cp=1, tp=1, epoch=5)
    world.add("q", "prefill", cp=1, tp=1, epoch=5)
    world.add("d", "decode", cp=1, tp=1, epoch=8)
    world.meet("p", "q", "d")
    mine, other = Transfer(world, "p"), Transfer(world, "q")
    mine.open()
    world.settle()
    script = mine.script(mine.source[0])
    world.command(mine.source[0], next(script))
    world.settle()
    other.scramble()
    for command in list(other.script(other.source[0]))[2:]:
        world.command(other.source[0], command)
    world.settle()
    assert world.counters["dropped_second_source"] > 0
    assert _broken(other.source[0])
    for command in script:
        world.command(mine.source[0], command)
    world.settle()
    assert mine.has_arrived
    assert len(mine.target[0].told(TargetCommitted)) == 1


def test_messages_of_ranks_without_the_right_are_dropped() -> None:
    world, transfer = _opened(2, 1, 2)
    transfer.announce_all()
    commit = Commit("r", 1, "p", 5, 8, (), transfer.num_tokens, 42, 0.0)
    world.message(PeerName("p", 1), PeerName("d", 0), commit)  # not the leader's to say
    key = SegmentKey(0, 0, 0, 2)
    world.settle(lands=False)
    world.message(PeerName("p", 1), PeerName("d", 0), Confirm("r", 1, 5, 8, key, True))
    world.message(PeerName("p", 0), PeerName("d", 0), Confirm("r", 1, 5, 8, key, True))
    world.message(PeerName("d", 1), PeerName("p", 0), ReadDone("r", 1, "d", 0, 8, 5, key))
    assert world.counters == {
        "dropped_second_source": 1,
        "dropped_unasked_confirm": 2,  # not its segment; not read yet
        "dropped_stale_epoch": 1,
    }
    world.settle()
    assert transfer.target[0].told(TargetCommitted)
    assert transfer.has_arrived


def test_duplicates_change_nothing() -> None:
    world, transfer = _opened(2, 2, 1)
    transfer.announce_all()
    while world.waiting() or world.in_flight():
        if pairs := world.waiting():
            pair = pairs[0]
            again = world.queues[pair][0]
            world.deliver(pair)
            world.message(*pair, again)
        else:
            world.land(*world.in_flight()[0])
    assert transfer.has_arrived
    assert len(transfer.target[0].told(TargetCommitted)) == 1
    assert transfer.committed
    assert world.num_open == 0
    assert world.counters["dropped_duplicate"] == len(transfer.manifest)


# -- what breaks it --------------------------------------------------------------------------------


def test_a_wrong_checksum_breaks_it() -> None:
    world, transfer = _opened(1, 1, 2)
    transfer.announce_all()
    world.settle(lands=False)
    transfer.source[0].pool.bytes[-1:] += 1  # one bit is enough
    transfer.scramble()
    world.settle()
    assert "do not add up" in _broken(transfer.target[0])
    assert world.counters["checksum_mismatches"] > 0
    assert not transfer.target[0].told(TargetCommitted)


def test_sampled_checksums_sum_some() -> None:
    world, transfer = _opened(4, 2, 2, checksum="sampled")
    transfer.announce_all()
    world.settle()
    sums = [message.checksum is not None for message in _sent(world, Announce)]
    assert not any(sums)  # too few of any one rank
    transfer = Transfer(world, request_id="r2", num_chunks=6, num_blocks=6)
    for number in range(8):
        more = Transfer(world, request_id=f"more{number}", num_chunks=3)
        more.open()
        world.settle()
        more.announce_all()
        world.settle()
    sums = [message.checksum is not None for message in _sent(world, Announce)]
    assert 0 < sum(sums) < len(sums) / 4


def test_a_failed_read_breaks_it_once_and_stops_reading() -> None:
    world, transfer = _opened(2, 1, 1, max_reads=1)
    transfer.announce_all()
    world.settle(lands=False)
    (rank, read_id) = world.in_flight()[0]
    world.land(rank, read_id, is_done=False)
    assert not world.in_flight()
    world.settle()
    assert "failed" in _broken(transfer.target[0])
    world.command(transfer.target[0], CloseTarget("r", 1))
    world.settle()
    assert transfer.target[0].told(TargetClosed)
    assert "closed" in _broken(transfer.source[0])
    world.command(transfer.source[0], CloseSource("r", 1))
    world.settle()
    assert not transfer.committed
    assert world.num_open == 0


@pytest.mark.parametrize("what", ["missing", "surplus"])
def test_the_plan_and_the_announcements_must_agree(what: str) -> None:
    world, transfer = _opened(2, 1, 2)
    if what == "missing":
        transfer.manifest = (*transfer.manifest, SegmentKey(0, 9, 0, 2))
    else:
        transfer.manifest = transfer.manifest[1:]
    transfer.announce_all()
    world.settle()
    assert "not what was dealt" in _broken(transfer.source[0])
    assert not transfer.target[0].told(TargetCommitted)


@pytest.mark.parametrize("what", ["missing", "surplus"])
def test_the_target_holds_exactly_the_manifest(what: str) -> None:
    """Even if the source were wrong about itself."""
    world, transfer = _opened(1, 1, 1)
    for command in transfer.script(transfer.source[0]):
        if not isinstance(command, CommitWhenRead):
            world.command(transfer.source[0], command)
    world.settle()
    manifest = transfer.manifest[1:] if what == "surplus" else transfer.manifest * 2
    if what == "missing":
        manifest = (*transfer.manifest, SegmentKey(0, 9, 0, 2))
    commit = Commit("r", 1, "p", 5, 8, manifest, transfer.num_tokens, 42, 0.0)
    world.message(PeerName("p", 0), PeerName("d", 0), commit)
    world.settle()
    assert not transfer.target[0].told(TargetCommitted)
    assert bool(transfer.target[0].told(HandoffBroken)) == (what == "surplus")


def test_a_prompt_with_a_hole_does_not_commit() -> None:
    """Source and plan agree, but a block of the prompt was never dealt."""
    world, transfer = _opened(1, 1, 2)
    transfer.chunks[-1].pop()
    transfer.announce_all()
    world.settle()
    assert "logical block 5 is not whole" in _broken(transfer.target[0])
    assert not transfer.target[0].told(TargetCommitted)


def test_blocks_that_nobody_asked_for_are_not_read() -> None:
    world = two_pools()
    transfer = Transfer(world)
    world.command(transfer.target[0], OpenTargetBlocks("r", 1, 0, transfer.target_blocks[:-1]))
    world.settle()
    transfer.announce_all()
    world.settle()
    assert "nobody asked for" in _broken(transfer.target[0])


def test_a_segment_announced_in_two_ways_breaks_it() -> None:
    world, transfer = _opened()
    message = _first_announce(world, transfer)
    other = msgspec.structs.replace(message, blocks=(BlockRef(0, 9), *message.blocks[1:]))
    world.message(PeerName("p", 0), PeerName("d", 0), message)
    world.message(PeerName("p", 0), PeerName("d", 0), other)
    world.settle()
    assert "two ways" in _broken(transfer.target[0])


@pytest.mark.parametrize("field", ["block_id", "layer_end", "rank"])
def test_an_impossible_announcement_breaks_it_and_reads_nothing(field: str) -> None:
    world, transfer = _opened()
    message = _first_announce(world, transfer)
    world.queues.clear()
    if field == "block_id":
        blocks = (BlockRef(1_000, 0), *message.blocks[1:])
        message = msgspec.structs.replace(message, blocks=blocks)
    elif field == "layer_end":
        message = msgspec.structs.replace(message, segment=SegmentKey(0, 0, 0, 99))
    else:
        message = msgspec.structs.replace(message, segment=SegmentKey(1, 0, 0, 2))
    world.message(PeerName("p", 0), PeerName("d", 0), message)
    assert not world.in_flight()
    world.settle()
    assert _broken(transfer.target[0])


def test_a_lost_pool_breaks_both_sides() -> None:
    world, transfer = _opened(2, 1, 2)
    world.command(transfer.source[0], next(transfer.script(transfer.source[0])))
    world.settle(lands=False)
    for rank in transfer.source:
        world.tell_pools(rank, "p")
    for rank in transfer.target:
        world.tell_pools(rank, "d")
    world.settle(lands=False)
    assert "d is gone" in _broken(transfer.source[0])
    assert "p is gone" in _broken(transfer.target[0])
    world.command(transfer.source[0], CloseSource("r", 1))
    world.command(transfer.target[0], CloseTarget("r", 1))
    world.settle(lands=False)
    assert transfer.source[0].told(SourceClosed)
    assert not transfer.target[0].told(TargetClosed)  # reads go on after their source's death
    world.settle()
    assert transfer.target[0].told(TargetClosed)
    assert world.num_open == 0


def test_an_announcement_to_a_pool_of_another_epoch_breaks_it() -> None:
    world = two_pools()
    transfer = Transfer(world)
    world.pools["d"] = msgspec.structs.replace(world.pools["d"], epoch=9)
    world.meet("p", "d")
    transfer.announce_all()
    world.settle()
    assert "d is gone" in _broken(transfer.source[0])
    assert not _sent(world, Announce)


# -- closing ---------------------------------------------------------------------------------------


def test_a_closing_target_waits_for_its_reads() -> None:
    world, transfer = _opened(2, 1, 2, max_reads=2)
    transfer.announce_all()
    world.settle(lands=False)
    in_flight = world.in_flight()
    assert len(in_flight) == 4
    world.command(transfer.target[0], CloseTarget("r", 1))
    world.settle(lands=False)
    for rank, read_id in in_flight:
        assert not transfer.target[0].told(TargetClosed)
        assert not _sent(world, ReadsEnded) or rank is not transfer.target[0]
        world.land(rank, read_id)
        world.settle(lands=False)
    assert not world.in_flight()  # what was waiting is never read
    assert len(transfer.target[0].told(TargetClosed)) == 1
    assert len(_sent(world, ReadsEnded)) == 4
    assert not _sent(world, ReadDone)


def test_a_late_announcement_is_answered_by_reads_ended() -> None:
    world, transfer = _opened()
    world.command(transfer.target[0], CloseTarget("r", 1))
    world.settle()
    world.command(transfer.source[0], next(transfer.script(transfer.source[0])))
    world.settle()
    assert not world.in_flight()
    assert len(_sent(world, ReadsEnded)) == 1
    assert "closed" in _broken(transfer.source[0])
    world.command(transfer.source[0], CloseSource("r", 1))
    world.settle()
    assert not transfer.committed


def test_a_closing_source_waits_for_its_readers() -> None:
    world, transfer = _opened(1, 1, 2)
    transfer.announce_all()
    world.settle(lands=False)
    world.command(transfer.source[0], CloseSource("r", 1))
    world.settle(lands=False)
    assert not transfer.source[0].told(SourceClosed)
    world.settle()  # the readers read to the end, and are told no
    assert _sent(world, Confirm)
    assert all(not message.valid for message in _sent(world, Confirm))
    assert "given up" in _broken(transfer.target[0])
    world.command(transfer.target[0], CloseTarget("r", 1))  # as a leader does with what is broken
    world.settle()
    assert not transfer.committed
    assert transfer.target[0].told(TargetClosed)


def test_the_lease_ends_waiting_for_a_silent_reader(caplog: pytest.LogCaptureFixture) -> None:
    world, transfer = _opened(1, 1, 2)
    transfer.announce_all()
    world.settle(lands=False)
    world.command(transfer.source[0], CloseSource("r", 1))
    world.settle(lands=False)
    world.tick(0.0)
    world.tick(LEASE_S - 1)
    world.settle(lands=False)
    assert not transfer.source[0].told(SourceClosed)
    world.tick(2.0)
    world.settle(lands=False)
    assert not transfer.committed
    assert world.counters["leases_expired"] == 1
    assert "ranks [0, 1]" in caplog.text
    transfer.scramble()
    world.settle()  # what was read late is foreign, and never confirmed
    assert not transfer.target[0].told(TargetCommitted)


def test_closing_is_idempotent() -> None:
    world, transfer = _opened(2, 1, 2)
    source, target = transfer.source[0], transfer.target[0]
    for count in (1, 2, 3):
        for request_id in ("r", "never heard of"):
            world.command(source, CloseSource(request_id, 1))
            world.command(target, CloseTarget(request_id, 1))
        world.settle()
        assert len(source.told(SourceClosed)) == len(target.told(TargetClosed)) == 2 * count
    assert world.num_open == 0


def test_closing_what_has_committed_says_so() -> None:
    world, transfer = _opened()
    transfer.announce_all()
    world.settle()
    world.command(transfer.source[0], CloseSource("r", 1))
    world.command(transfer.target[0], CloseTarget("r", 1))
    world.settle()
    assert [event.committed for event in transfer.source[0].told(SourceClosed)] == [True, True]
    assert len(transfer.target[0].told(TargetClosed)) == 1
    assert world.num_open == 0


def test_what_comes_after_the_close_is_dropped() -> None:
    world, transfer = _opened(2, 1, 2)
    world.command(transfer.source[0], CloseSource("r", 1))
    world.settle()
    transfer.announce_all()
    world.settle()
    assert not _sent(world, Announce)
    assert not transfer.committed
    assert world.counters["dropped_announcement"] == len(transfer.manifest) + 2
    assert sum(rank.node.num_open for rank in transfer.source) == 0


def test_tombs_are_bounded() -> None:
    recently_ended = RecentlyEnded()
    for number in range(MAX_TOMBS + 10):
        recently_ended.add(("r", number))
    assert ("r", 9) not in recently_ended
    assert ("r", 10) in recently_ended
    assert ("r", MAX_TOMBS + 9) in recently_ended


# -- what is whole when it is closed ---------------------------------------------------------------


def _announce(transfer: Transfer[Rank], num_chunks: int) -> None:
    for rank in transfer.source:
        for command in transfer.script(rank):
            if isinstance(command, AnnounceBlocks) and command.chunk < num_chunks:
                transfer.world.command(rank, command)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"cp{s[0]}tp{s[1]}-to-tp{s[2]}")
def test_what_arrived_before_the_source_died_is_whole(shape: tuple[int, int, int]) -> None:
    world, transfer = _opened(*shape)
    _announce(transfer, 1)
    world.settle()
    for rank in world.of("d"):
        world.tell_pools(rank, "d")
    world.settle()
    assert "gone" in _broken(transfer.target[0])
    world.command(transfer.target[0], CloseTarget(*transfer.key))
    world.settle()
    (closed,) = transfer.target[0].told(TargetClosed)
    assert closed.num_whole_blocks == len(transfer.chunks[0]) == 3
    assert transfer.holds_true(3)


def test_what_was_read_and_not_confirmed_is_not_whole() -> None:
    world, transfer = _opened(1, 1, 2)
    _announce(transfer, 1)
    last = next(p for p in world.waiting() if p[1] == transfer.target[1].name)
    while any(isinstance(m, Announce) for _, m in [(last, q) for q in world.queues[last]]):
        world.deliver(last)
    for rank, read_id in world.in_flight():
        world.land(rank, read_id)
    for rank in world.of("d"):  # it dies before it can be asked
        world.tell_pools(rank, "d")
    world.queues = {pair: queue for pair, queue in world.queues.items() if pair[1].pool_id == "d"}
    world.settle()
    world.command(transfer.target[0], CloseTarget(*transfer.key))
    world.settle()
    (closed,) = transfer.target[0].told(TargetClosed)
    assert closed.num_whole_blocks == 0


def test_a_block_that_lacks_a_layer_is_not_whole() -> None:
    world, transfer = _opened(1, 1, 1)
    (source,) = transfer.source
    announcements = [c for c in transfer.script(source) if isinstance(c, AnnounceBlocks)]
    for command in announcements[:3]:  # the second chunk's first group of layers only
        world.command(source, command)
    world.settle()
    world.command(transfer.target[0], CloseTarget(*transfer.key))
    world.settle()
    (closed,) = transfer.target[0].told(TargetClosed)
    assert closed.num_whole_blocks == 3


def test_of_a_hand_off_with_wrong_bytes_nothing_is_kept() -> None:
    world, transfer = _opened(1, 1, 1)
    _announce(transfer, 1)
    world.settle()
    (source,) = transfer.source
    last = [c for c in transfer.script(source) if isinstance(c, AnnounceBlocks)][-1]
    world.command(source, last)
    transfer.scramble()
    world.settle()
    assert "add up" in _broken(transfer.target[0])
    world.command(transfer.target[0], CloseTarget(*transfer.key))
    world.settle()
    (closed,) = transfer.target[0].told(TargetClosed)
    assert closed.num_whole_blocks == 0
