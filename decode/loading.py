"""Prefixes that come up from a store before a prompt is computed. Pure.

The life of a loading
1. ``begin``: a sequence has been granted blocks, and a store holds more of its prefix than this
   pool. What is missed is asked for in *pieces*, each a hand-off of its own into the sequence's
   blocks, a few at a time: the store brings one up from disk while another one moves.
2. A piece is opened on all ranks, asked for by the hashes of its blocks, and committed.
3. A refusal, a broken hand-off, ``close``, or ``LOAD_TIMEOUT_S``: nothing more is asked for, and
   what is open is closed. However it ends, it is over when nothing can land in the blocks any more,
   and the pieces that arrived in a row from the first on are what the sequence has; the rest of its
   prompt is computed, as if the store had never had it.
"""

from dataclasses import dataclass, field

from decode.memory import SequenceMemory
from decode.sequence import Sequence
from decode.states import SequenceEvent, SequenceState
from kvtransfer.events import (
    CloseTarget,
    Command,
    HandoffBroken,
    OpenTargetBlocks,
    TargetClosed,
    TargetCommitted,
    TargetIsOpen,
)
from protocol.handoff import Fetch
from protocol.kv import BlockRef
from protocol.request import RequestKey

NUM_OPEN = 3
LOAD_TIMEOUT_S = 30.0  # without anything arriving

TargetEvent = TargetIsOpen | TargetCommitted | TargetClosed | HandoffBroken


@dataclass(frozen=True, slots=True)
class LoadPart:
    """Adjacent blocks of a prefix. A pool is the target of many pieces of one request at a time, so
    each has a name of its own."""

    number: int
    first_logical: int
    blocks: tuple[BlockRef, ...]
    hashes: tuple[bytes, ...]

    def key(self, sequence: RequestKey) -> RequestKey:
        return (f"{sequence[0]}~{self.number}", sequence[1])


@dataclass(slots=True)
class _Loading:
    sequence: Sequence
    source: tuple[str, int]  # the store, at its epoch
    pieces: list[LoadPart]
    heard: float  # when something last arrived
    num_begun: int = 0
    open: dict[RequestKey, LoadPart] = field(default_factory=dict)
    arrived: set[int] = field(default_factory=set)
    is_closing: bool = False

    @property
    def is_over(self) -> bool:
        is_whole = len(self.arrived) == len(self.pieces)
        return not self.open and (self.is_closing or is_whole)

    @property
    def num_blocks(self) -> int:
        """That have arrived, in a row from the first one on."""
        total = 0
        for piece in self.pieces:
            if piece.number not in self.arrived:
                break
            total += len(piece.blocks)
        return total


@dataclass(frozen=True, slots=True)
class Loaded:
    """Nothing lands in the sequence's blocks any more; these many of them have what they should."""

    sequence: Sequence
    num_blocks: int


class Loadings:
    """The loadings under way.

    Args:
        memory: the pool's blocks.
        min_tokens: fewer are not worth it.
        piece_blocks: of one piece at most.
    """

    def __init__(self, memory: SequenceMemory, min_tokens: int, piece_blocks: int) -> None:
        self._memory = memory
        self._piece_blocks = piece_blocks
        self._min_blocks = max(1, min_tokens // memory.block_size)
        self._loadings: dict[RequestKey, _Loading] = {}  # by sequence
        self._by_piece: dict[RequestKey, _Loading] = {}
        self._commands: list[Command] = []
        self.num_loaded_blocks = 0

    def __len__(self) -> int:
        return len(self._loadings)

    def owns(self, event: TargetEvent) -> bool:
        """Whether an event is about a piece."""
        return event.key in self._by_piece

    def begin(self, sequence: Sequence, now: float) -> bool:
        """Ask for what a store has of it and this pool has not; False if it is not worth it."""
        if self._memory.num_blocks_to_load(sequence) < self._min_blocks:
            return False
        sequence.advance(SequenceEvent.LOAD)
        first, blocks = self._memory.begin_loading(sequence)
        pieces: list[LoadPart] = []
        for start in range(0, len(blocks), self._piece_blocks):
            part = tuple(blocks[start : start + self._piece_blocks])
            logical = first + start
            hashes = tuple(sequence.block_hashes[logical : logical + len(part)])
            pieces.append(LoadPart(len(pieces), logical, part, hashes))
        assert sequence.store is not None, "there is a store to ask"
        source = (sequence.store.pool_id, sequence.store.epoch)
        loading = _Loading(sequence, source, pieces, now)
        self._loadings[sequence.key] = loading
        self._open_more(loading)
        return True

    def close(self, key: RequestKey) -> None:
        """Give a loading up; it is over when nothing can land any more. Idempotent."""
        loading = self._loadings[key]
        if not loading.is_closing:
            loading.is_closing = True
            self._commands += [CloseTarget(*piece) for piece in loading.open]

    def on_event(self, event: TargetEvent, now: float) -> Loaded | None:
        """What has become of a piece; ``Loaded`` when it was the last one, and then the sequence,
        unless it is being closed, has the blocks that have come."""
        key = event.key
        loading = self._by_piece[key]
        loading.heard = now
        match event:
            case TargetIsOpen():
                if not loading.is_closing:
                    self._commands.append(self._ask(loading, loading.open[key], key))
                return None
            case HandoffBroken():
                self.close(loading.sequence.key)
                return None
            case TargetCommitted():
                piece = loading.open[key]
                loading.arrived.add(piece.number)
                self.num_loaded_blocks += len(piece.blocks)
            case TargetClosed():
                pass
        del loading.open[key], self._by_piece[key]
        if not loading.is_closing:
            self._open_more(loading)
        if not loading.is_over:
            return None
        sequence, num_blocks = loading.sequence, loading.num_blocks
        del self._loadings[sequence.key]
        if sequence.state is SequenceState.LOADING:
            self._memory.end_loading(sequence, num_blocks)
        return Loaded(sequence, num_blocks)

    def tick(self, now: float) -> None:
        """Give up those of which nothing has come for too long."""
        for key, loading in self._loadings.items():
            if now - loading.heard > LOAD_TIMEOUT_S:
                self.close(key)

    def take_commands(self) -> list[Command]:
        commands, self._commands = self._commands, []
        return commands

    def _open_more(self, loading: _Loading) -> None:
        while loading.num_begun < len(loading.pieces) and len(loading.open) < NUM_OPEN:
            piece = loading.pieces[loading.num_begun]
            loading.num_begun += 1
            key = piece.key(loading.sequence.key)
            loading.open[key] = piece
            self._by_piece[key] = loading
            self._commands.append(
                OpenTargetBlocks(*key, first_logical=piece.first_logical, blocks=piece.blocks)
            )

    @staticmethod
    def _ask(loading: _Loading, piece: LoadPart, key: RequestKey) -> Fetch:
        owners = (0,) * len(piece.blocks)
        source_pool_id, source_epoch = loading.source
        return Fetch(
            *key,
            source_pool_id=source_pool_id,
            source_epoch=source_epoch,
            first_logical=piece.first_logical,
            owners=owners,
            block_hashes=piece.hashes,
        )
