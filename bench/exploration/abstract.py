"""The state tables alone, for more ranks and requests than the real objects allow.

A request is its state in the coordinator, in a prefill pool and in a decode pool, a block on each
side, and for each pair of ranks that share heads a *lane*: the hand-off's state on the source, on
the target, and where the bytes are. Every move is looked up in the tables of the code, and raises
when they do not have it. Unlike in the exploration of the real objects

- a message and what follows from it are one move: nothing is on its way but reads;
- ranks are told apart by their states alone (lanes are sorted), and so are requests;
- an attempt that is lost ends its request; there is no fetch, no pre-emption and no death.
"""

import enum
from collections.abc import Iterator
from typing import NamedTuple

from coordinator.records import TABLE as RECORD_TABLE
from coordinator.records import RecordEvent
from coordinator.records import State as InRecord
from decode.states import TABLE as DECODE_TABLE
from decode.states import SequenceEvent
from decode.states import State as InDecode
from kvcache.blocks import TABLE as BLOCK_TABLE
from kvcache.blocks import Event as OfBlock
from kvcache.blocks import State as Block
from kvtransfer.states import (
    SOURCE_TABLE,
    TARGET_TABLE,
    SourceEvent,
    SourceState,
    TargetEvent,
    TargetState,
)
from prefill.states import TABLE as PREFILL_TABLE
from prefill.states import RequestEvent
from prefill.states import State as InPrefill
from protocol.errors import IllegalTransition
from protocol.transitions import advance

_MOVING = (Block.IN_FLIGHT, Block.DRAINING)
_SOURCE_GOES_ON = (SourceState.ANNOUNCING, SourceState.DRAINING)
_TARGET_GOES_ON = (TargetState.OPEN, TargetState.MANIFESTED)


class Data(enum.IntEnum):
    """Where the bytes of a lane are."""

    NOWHERE = 0  # not announced
    UNREAD = 1  # announced, and not read: the target is closing
    IN_FLIGHT = 2
    READ = 3  # and not confirmed
    CONFIRMED = 4
    ENDED = 5  # given up


class Lane(NamedTuple):
    """A source rank and the target rank that reads from it."""

    source: SourceState | None = None
    data: Data = Data.NOWHERE
    target: TargetState | None = None

    def sources(self, event: SourceEvent) -> "Lane":
        assert self.source is not None
        return self._replace(source=advance(SOURCE_TABLE, self.source, event, of="a source"))

    def targets(self, event: TargetEvent) -> "Lane":
        assert self.target is not None
        return self._replace(target=advance(TARGET_TABLE, self.target, event, of="a target"))


class Request(NamedTuple):
    """One of them; ``prefilling`` and ``decoding`` are None before the pools have heard of it."""

    lanes: tuple[Lane, ...]
    record: InRecord = InRecord.NEW
    prefilling: InPrefill | None = None
    decoding: InDecode | None = None
    source_block: Block = Block.FREE
    target_block: Block = Block.FREE

    @property
    def is_active(self) -> bool:
        return self.record not in (InRecord.ENDING, InRecord.GONE)

    def steps(self, event: RecordEvent) -> "Request":
        return self._replace(record=advance(RECORD_TABLE, self.record, event, of="a record"))

    def prefills(self, event: RequestEvent) -> "Request":
        assert self.prefilling is not None
        after = advance(PREFILL_TABLE, self.prefilling, event, of="a prefill")
        return self._replace(prefilling=after)

    def decodes(self, event: SequenceEvent) -> "Request":
        assert self.decoding is not None
        after = advance(DECODE_TABLE, self.decoding, event, of="a decode")
        return self._replace(decoding=after)

    def source(self, *events: tuple[OfBlock, Block]) -> "Request":
        return self._replace(source_block=_block(self.source_block, events))

    def target(self, *events: tuple[OfBlock, Block]) -> "Request":
        return self._replace(target_block=_block(self.target_block, events))

    def with_lane(self, index: int, lane: Lane) -> "Request":
        lanes = [*self.lanes[:index], lane, *self.lanes[index + 1 :]]
        return self._replace(lanes=tuple(sorted(lanes, key=_order)))

    def failed(self) -> "Request":
        return self.steps(RecordEvent.END) if self.is_active else self


def _order(lane: Lane) -> tuple[str, int, str]:
    return (lane.source.value if lane.source else "", lane.data, str(lane.target))


def _block(state: Block, events: tuple[tuple[OfBlock, Block], ...]) -> Block:
    for event, after in events:
        if after not in BLOCK_TABLE.get((state, event), ()):
            raise IllegalTransition(f"{event.value} of a block that is {state.value}")
        state = after
    return state


_TAKE = ((OfBlock.ALLOCATE, Block.OWNED), (OfBlock.BEGIN_TRANSFER, Block.IN_FLIGHT))
_GIVE = ((OfBlock.END_TRANSFER, Block.OWNED), (OfBlock.RELEASE, Block.FREE))
_DRAIN = ((OfBlock.RELEASE, Block.DRAINING), (OfBlock.END_TRANSFER, Block.FREE))


class Move(NamedTuple):
    """What a request can do. ``needs``: a block of the "prefill" or "decode" pool, or nothing."""

    name: str
    after: Request
    needs: str = ""
    is_own: bool = True  # not a fault, and not a caller who leaves


def moves(request: Request) -> Iterator[Move]:
    """Everything that can happen to a request."""
    yield from _of_callers(request)
    yield from _of_decode(request)
    yield from _of_prefill(request)
    for index, lane in enumerate(request.lanes):
        for name, after, is_own in _of_lane(request, lane):
            yield Move(name, request.with_lane(index, after), is_own=is_own)


def _of_callers(r: Request) -> Iterator[Move]:
    if r.record is InRecord.NEW:
        after = r.steps(RecordEvent.RESERVE)._replace(decoding=InDecode.QUEUED)
        yield Move("reserve", after)
    if r.record is InRecord.RESERVING and r.decoding is InDecode.RESERVED:
        after = r.steps(RecordEvent.SEND_PREFILL)._replace(prefilling=InPrefill.WAITING)
        yield Move("send prefill", after)
    if r.is_active and r.record is not InRecord.NEW:
        yield Move("leave", r.steps(RecordEvent.END), is_own=False)
    is_released = r.prefilling in (None, InPrefill.RELEASED)
    if r.record is InRecord.ENDING and is_released and r.decoding in (None, InDecode.RELEASED):
        yield Move("gone", r.steps(RecordEvent.ALL_RELEASED))


def _of_decode(r: Request) -> Iterator[Move]:
    match r.decoding:
        case InDecode.QUEUED:
            if not r.is_active:
                yield Move("drop", r.decodes(SequenceEvent.END))
            yield Move("grant", r.decodes(SequenceEvent.GRANT).target(*_TAKE), needs="decode")
        case InDecode.OPENING | InDecode.RESERVED:
            yield from _of_open_target(r)
        case InDecode.CLOSING:
            if all(lane.target is TargetState.CLOSED for lane in r.lanes):
                yield Move("target closed", r.decodes(SequenceEvent.CLOSED).target(*_DRAIN))
        case InDecode.RUNNING:
            after = r.decodes(SequenceEvent.END).target(_GIVE[1])
            if r.is_active:
                after = after.steps(RecordEvent.TOKEN).steps(RecordEvent.END)
            yield Move("finish", after)


def _of_open_target(r: Request) -> Iterator[Move]:
    if not r.is_active:
        yield Move("close target", r.decodes(SequenceEvent.CLOSE))
    if any(lane.target is TargetState.BROKEN for lane in r.lanes):
        yield Move("target broken", r.decodes(SequenceEvent.CLOSE).failed())
    targets = {lane.target for lane in r.lanes}
    if r.decoding is InDecode.OPENING and None not in targets:
        yield Move("opened", r.decodes(SequenceEvent.OPENED))
    if targets == {TargetState.CLOSED}:
        after = r.decodes(SequenceEvent.COMMITTED).target(_GIVE[0])
        is_expected = after.record is InRecord.PREFILLING
        yield Move("committed", after.steps(RecordEvent.COMMIT) if is_expected else after)


def _of_prefill(r: Request) -> Iterator[Move]:
    sources = {lane.source for lane in r.lanes}
    match r.prefilling:
        case InPrefill.WAITING:
            if not r.is_active:
                yield Move("drop", r.prefills(RequestEvent.DROP))
            yield Move("admit", r.prefills(RequestEvent.ADMIT).source(*_TAKE), needs="prefill")
        case InPrefill.RUNNING | InPrefill.HANDING_OVER:
            if not r.is_active:
                yield Move("close source", r.prefills(RequestEvent.CLOSE))
            if SourceState.BROKEN in sources:
                yield Move("source broken", r.prefills(RequestEvent.CLOSE).failed())
            is_running = r.prefilling is InPrefill.RUNNING
            if is_running and not sources & {None, SourceState.ANNOUNCING}:
                after = r.prefills(RequestEvent.COMPUTED)
                is_expected = after.record is InRecord.PREFILLING
                yield Move("first token", after.steps(RecordEvent.TOKEN) if is_expected else after)
            if not is_running and sources == {SourceState.CLOSED}:
                yield Move("commit", r.prefills(RequestEvent.CLOSED).source(*_GIVE))
        case InPrefill.CLOSING:
            if sources == {SourceState.CLOSED}:
                yield Move("source closed", r.prefills(RequestEvent.CLOSED).source(*_DRAIN))


def _of_lane(r: Request, lane: Lane) -> Iterator[tuple[str, Lane, bool]]:
    if r.decoding is InDecode.OPENING and lane.target is None:
        yield "open", lane._replace(target=TargetState.OPEN), True
    if r.prefilling is InPrefill.RUNNING and lane.source is None:
        yield "announce", _announced(lane), True
    if r.prefilling is InPrefill.RUNNING and lane.source is SourceState.ANNOUNCING:
        yield "all announced", _if_all_read(lane.sources(SourceEvent.ALL_ANNOUNCED)), True
    yield from _of_read(lane)
    is_committed = r.prefilling is InPrefill.RELEASED and lane.data is Data.CONFIRMED
    if is_committed and lane.target is TargetState.OPEN:
        yield "manifest", lane.targets(TargetEvent.MANIFEST), True
    if lane.target is TargetState.MANIFESTED:
        yield "complete", lane.targets(TargetEvent.COMPLETE), True
    if r.prefilling is InPrefill.CLOSING:
        yield from _of_closing_source(lane)
    if r.decoding is InDecode.CLOSING:
        yield from _of_closing_target(lane)


def _announced(lane: Lane) -> Lane:
    announcing = lane._replace(source=SourceState.ANNOUNCING)
    if lane.target in _TARGET_GOES_ON:
        return announcing._replace(data=Data.IN_FLIGHT)
    if lane.target is TargetState.CLOSED:  # answered by ReadsEnded
        return announcing._replace(data=Data.ENDED).sources(SourceEvent.BREAK)
    return announcing._replace(data=Data.UNREAD)


def _if_all_read(lane: Lane) -> Lane:
    is_over = lane.source is SourceState.DRAINING and lane.data is Data.CONFIRMED
    return lane.sources(SourceEvent.ALL_READ) if is_over else lane


def _of_read(lane: Lane) -> Iterator[tuple[str, Lane, bool]]:
    goes_on = lane.target in _TARGET_GOES_ON
    if lane.data is Data.IN_FLIGHT:
        ended = lane._replace(data=Data.READ if goes_on else Data.UNREAD)
        yield "read ends", ended, True
        failed = lane._replace(data=Data.UNREAD)
        yield "read fails", failed.targets(TargetEvent.BREAK) if goes_on else failed, False
    if lane.data is Data.READ and lane.source in _SOURCE_GOES_ON:
        yield "confirm", _if_all_read(lane._replace(data=Data.CONFIRMED)), True
    elif lane.data is Data.READ:
        refused = lane._replace(data=Data.ENDED)
        yield "refuse", refused.targets(TargetEvent.BREAK) if goes_on else refused, True


def _of_closing_source(lane: Lane) -> Iterator[tuple[str, Lane, bool]]:
    if lane.source is None:
        yield "close source", lane._replace(source=SourceState.CLOSED), True
    elif lane.source not in (SourceState.CLOSING, SourceState.CLOSED):
        yield "close source", lane.sources(SourceEvent.CLOSE), True
    elif lane.source is SourceState.CLOSING and lane.data in (Data.CONFIRMED, Data.ENDED):
        yield "reads ended", lane.sources(SourceEvent.READS_ENDED), True


def _of_closing_target(lane: Lane) -> Iterator[tuple[str, Lane, bool]]:
    if lane.target is None:
        yield "close target", lane._replace(target=TargetState.CLOSED), True
    elif lane.target not in (TargetState.CLOSING, TargetState.CLOSED):
        yield "close target", lane.targets(TargetEvent.CLOSE), True
    elif lane.target is TargetState.CLOSING and lane.data is not Data.IN_FLIGHT:
        quiet = lane.targets(TargetEvent.QUIET)
        if quiet.data in (Data.UNREAD, Data.READ):
            quiet = quiet._replace(data=Data.ENDED)
        told = quiet.source in _SOURCE_GOES_ON
        yield "quiet", quiet.sources(SourceEvent.BREAK) if told else quiet, True


def problem(request: Request) -> str:
    """What is wrong with a request; empty if nothing is."""
    blocks = (request.source_block, request.target_block)
    data = {lane.data for lane in request.lanes}
    if Data.IN_FLIGHT in data and not set(blocks) <= set(_MOVING):
        return f"a read is in flight between blocks that are {blocks}"
    if request.decoding is InDecode.RUNNING and data != {Data.CONFIRMED}:
        return "decoded with KV that was not confirmed"
    if request.record is InRecord.GONE and blocks != (Block.FREE, Block.FREE):
        return f"gone, with blocks that are {blocks}"
    return ""
