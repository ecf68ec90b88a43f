"""A rank's node and its three ports: what goes through them, and what does not."""

from collections.abc import Sequence

import pytest

from engine.rank_node import HandoffPolicy, RankNode
from kvtransfer.events import (
    CloseTarget,
    Event,
    HandoffBroken,
    OpenTargetBlocks,
    TargetClosed,
    TargetIsOpen,
)
from kvtransfer.handoff.actions import StartRead
from kvtransfer.identity import PeerName, RankIdentity
from kvtransfer.plan import ByteRun
from protocol.handoff import Announce, HandoffMessage, ReadDone, ReadsEnded, SegmentKey
from protocol.kv import BlockRef, KVLayout, PoolEndpoint

KEY = ("a", 1)
LAYOUT = KVLayout(1, 4, 1, 0, 1, 2, 2, "float32")
SOURCE = RankIdentity("prefill", "p", 0, 1, 1, "p0")
EPOCHS = {"p": 5, "d": 8}


class Rank:
    """A rank of a decode pool of so many, and whatever goes through its ports."""

    def __init__(self, num_ranks: int = 1, read: bool | None = None) -> None:
        self.how_reads_end = read
        self.sent: list[tuple[PeerName, HandoffMessage]] = []
        self.reads: list[StartRead] = []
        self.events: list[Event] = []
        ranks = [RankIdentity("decode", "d", r, 1, num_ranks, f"d{r}") for r in range(num_ranks)]
        policy = HandoffPolicy(transport_name="memory", checksum="off", lease_s=5.0, max_reads=1)
        self.node = RankNode(ranks[0], LAYOUT, self, self, policy)
        self.node.welcomed(EPOCHS["d"])
        pools = [
            PoolEndpoint("p", "prefill", EPOCHS["p"], 1, 1, (SOURCE.endpoint(LAYOUT),)),
            PoolEndpoint(
                "d", "decode", EPOCHS["d"], 1, num_ranks, tuple(r.endpoint(LAYOUT) for r in ranks)
            ),
        ]
        self.node.pools_changed(pools, 0.0)

    def source_checksum(self, runs: Sequence[ByteRun]) -> int:
        raise AssertionError(runs)

    target_checksum = source_checksum

    def send(self, peer: PeerName, message: HandoffMessage) -> None:
        self.sent.append((peer, message))

    def read(self, read: StartRead) -> bool | None:
        self.reads.append(read)
        return self.how_reads_end

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def open(self) -> None:
        self.node.command(OpenTargetBlocks(*KEY, 0, (BlockRef(3, 1), BlockRef(1, 1))), 0.0)

    def announce(self, logical: int) -> None:
        """The source says that a block is final."""
        message = Announce(
            *KEY,
            source_pool_id="p",
            source_epoch=EPOCHS["p"],
            target_epoch=EPOCHS["d"],
            segment=SegmentKey(0, 1 + logical, 0, 1),
            logical_blocks=(logical,),
            blocks=(BlockRef(logical, 1),),
        )
        self.node.message(SOURCE.name, message, 0.0)


def test_what_a_rank_says_to_itself_goes_through_no_port_and_is_taken_in_at_once() -> None:
    alone = Rank()
    alone.open()
    assert alone.events == [TargetIsOpen(*KEY)] and alone.sent == []
    alone.node.command(CloseTarget(*KEY), 0.0)
    assert alone.events[1:] == [TargetClosed(*KEY, 0)] and alone.sent == []


def test_the_other_ranks_of_its_pool_are_sent_to() -> None:
    leader = Rank(num_ranks=3)
    leader.open()
    assert [peer for peer, _ in leader.sent] == [PeerName("d", 1), PeerName("d", 2)]
    assert leader.events == [], "two have not said that they expect it"


def test_a_read_that_is_in_flight_is_waited_for() -> None:
    target = Rank()
    target.open()
    target.announce(0)
    target.announce(1)
    assert len(target.reads) == 1 and target.sent == [], "one at a time"
    target.node.read_ended(target.reads[0].read_id, 1.0, is_done=True)
    assert [type(message) for _, message in target.sent] == [ReadDone]
    assert len(target.reads) == 2
    target.node.command(CloseTarget(*KEY), 2.0)
    assert target.events == [TargetIsOpen(*KEY)], "bytes may still land"
    target.node.read_ended(target.reads[1].read_id, 3.0, is_done=True)
    assert target.events[1:] == [TargetClosed(*KEY, 0)]
    assert isinstance(target.sent[-1][1], ReadsEnded)
    assert target.node.num_open == 0


def test_a_read_that_has_ended_when_it_is_posted_is_not_waited_for() -> None:
    target = Rank(read=True)
    target.open()
    target.announce(0)
    target.announce(1)
    assert len(target.reads) == 2
    assert [type(message) for _, message in target.sent] == [ReadDone, ReadDone]


def test_a_read_that_cannot_be_posted_breaks_its_hand_off() -> None:
    target = Rank(read=False)
    target.open()
    target.announce(0)
    [_, broken] = target.events
    assert isinstance(broken, HandoffBroken) and broken.side == "target"
    assert target.sent == []


@pytest.mark.parametrize("pool_id", ["p", "q"])
def test_what_nobody_has_the_right_to_say_is_dropped_and_counted(pool_id: str) -> None:
    target = Rank()
    done = ReadDone(
        *KEY,
        target_pool_id="x",
        target_rank=0,
        target_epoch=1,
        source_epoch=EPOCHS["d"],
        segment=SegmentKey(0, 1, 0, 1),
    )
    target.node.message(PeerName(pool_id, 0), done, 0.0)
    assert target.sent == [] and target.events == []
    assert target.node.counters == {"dropped_stale_epoch": 1}
