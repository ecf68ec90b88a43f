"""What a target rank knows of one hand-off, and which of its blocks are whole. Pure.

A block is *whole* here when every layer of every head of it was read and confirmed by its source:

    covered[logical]   one bit for each (layer, local head); a confirmed segment sets its own

Announced segments are kept apart from held ones: only the latter may ever be used.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvtransfer.handoff.states import TargetState
from kvtransfer.identity import PeerName
from kvtransfer.plan import ByteRun
from protocol.handoff import Announce, Commit, SegmentKey
from protocol.kv import BlockRef, KVLayout
from protocol.request import RequestKey, TransferStats


@dataclass(frozen=True, slots=True)
class Read:
    """A segment on its way."""

    key: RequestKey
    source: PeerName
    incarnation: str  # the source's at the epoch that announced
    announce: Announce
    runs: tuple[ByteRun, ...]
    layer_heads: int  # of each of its blocks: layers times heads
    bits: int  # the same, one bit for each layer and local head


@dataclass(slots=True)
class TargetHandoff:
    """One hand-off that this rank is a target of."""

    key: RequestKey
    first_logical: int
    blocks: tuple[BlockRef, ...]
    elsewhere: frozenset[int] = frozenset()  # logical blocks that lie on other cp ranks
    state: TargetState = TargetState.OPEN
    source_pool: tuple[str, int] | None = None  # id and epoch, once it is known
    sources: set[PeerName] = field(default_factory=set)  # that have announced something
    announced: dict[SegmentKey, Announce] = field(default_factory=dict)
    asked: dict[SegmentKey, int] = field(default_factory=dict)  # read, and the source asked: bits
    held: set[SegmentKey] = field(default_factory=set)  # read and confirmed
    layer_heads: Counter[int] = field(default_factory=Counter)  # announced, by logical block
    covered: dict[int, int] = field(default_factory=dict)  # confirmed, by logical block
    is_doubtful: bool = False  # something was wrong with what its source announced or sent
    commit: Commit | None = None
    prefill_ended: float = 0.0
    num_in_flight: int = 0
    num_bytes: int = 0
    num_descriptors: int = 0
    reading_since: float = 0.0
    read_s: float = 0.0
    layer_landed: dict[int, float] = field(default_factory=dict)

    @property
    def is_going_on(self) -> bool:
        return self.state in (TargetState.OPEN, TargetState.MANIFESTED)

    def block_id(self, logical: int) -> int | None:
        """The block that a logical block is read into; None if it was not opened here."""
        index = logical - self.first_logical
        is_here = 0 <= index < len(self.blocks) and logical not in self.elsewhere
        return self.blocks[index].block_id if is_here else None

    def begin_read(self, read: Read, now: float) -> None:
        if self.num_in_flight == 0:
            self.reading_since = now
        self.num_in_flight += 1
        self.num_descriptors += len(read.runs)
        self.num_bytes += sum(run.num_bytes for run in read.runs)

    def end_read(self, now: float) -> None:
        self.num_in_flight -= 1
        if self.num_in_flight == 0:
            self.read_s += now - self.reading_since

    def hold(self, key: SegmentKey) -> None:
        """Hold a segment that was read and is confirmed by its source."""
        self.held.add(key)
        bits = self.asked[key]
        for logical in self.announced[key].logical_blocks:
            self.covered[logical] = self.covered.get(logical, 0) | bits

    def not_whole(self, logical_blocks: Iterable[int], layout: KVLayout) -> int | None:
        """The first of these blocks that lies here and of which not all is held."""
        whole = all_bits(layout)
        num_layer_heads = layout.num_layers * layout.num_kv_heads
        for logical in logical_blocks:
            if logical not in self.elsewhere and (
                self.covered.get(logical) != whole or self.layer_heads[logical] != num_layer_heads
            ):
                return logical
        return None

    def num_whole_blocks(self, layout: KVLayout) -> int:
        """How many of its blocks, from the first on, are whole; those on other ranks do not count.

        It is 0 while a read is in flight, whose bytes could still land in any of them, and of a
        hand-off in which anything was wrong.
        """
        if self.is_doubtful or self.num_in_flight:
            return 0
        end = self.first_logical + len(self.blocks)
        first_missing = self.not_whole(range(self.first_logical, end), layout)
        return (end if first_missing is None else first_missing) - self.first_logical

    def stats(self, transport: str, layout: KVLayout, now: float) -> TransferStats:
        """The statistics of a hand-off that is complete."""
        landed = self.layer_landed.values()
        return TransferStats(
            transport=transport,
            num_bytes=self.num_bytes,
            num_segments=len(self.held),
            num_descriptors=self.num_descriptors,
            num_layers_overlapped=sum(when <= self.prefill_ended for when in landed),
            num_layers=layout.num_layers,
            read_s=self.read_s,
            exposed_s=max(0.0, now - self.prefill_ended),
        )


def layer_head_bits(layout: KVLayout, layers: range, heads: range) -> int:
    """A bit for each of these layers and of the model's heads, as far as this rank has them."""
    first = heads.start - layout.first_kv_head
    of_one_layer = ((1 << len(heads)) - 1) << first
    return sum(of_one_layer << (layer * layout.num_kv_heads) for layer in layers)


def all_bits(layout: KVLayout) -> int:
    """Every layer and head of this rank."""
    return (1 << (layout.num_layers * layout.num_kv_heads)) - 1
