"""Prefixes that come up from a store before a prompt is computed. Pure.

The life of a loading
1. ``begin``: a sequence has been granted blocks, and a store holds more of its prefix than this
   pool. What is missing is asked for in *parts*, each a hand-off of its own into the sequence's
   blocks, a few at a time: the store brings one up from disk while another one moves.
2. A part is opened on all ranks, asked for by the hashes of its blocks, and committed.
3. A refusal, a broken hand-off, ``close``, or ``LOAD_TIMEOUT_S`` gives the loading up: nothing more
   is asked for, and what is open is closed.
4. It is over when nothing can land in the blocks any more. The sequence then has the parts that
   arrived in a row from the first on; the rest of its prompt is computed, as if the store had never
   had it.
"""

from dataclasses import dataclass, field

from decode.facts import DecodeFacts
from decode.memory import SequenceMemory
from decode.sequence import Sequence, StoreHint
from decode.states import SequenceEvent, SequenceState
from engine.leader_node import Commands
from kvtransfer.events import (
    CloseTarget,
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
    """Adjacent blocks of a prefix.

    Its hand-off has a key of its own, because a pool is the target of many parts of one request at
    the same time.
    """

    key: RequestKey
    number: int
    first_logical: int
    blocks: tuple[BlockRef, ...]
    hashes: tuple[bytes, ...]

    def open(self) -> OpenTargetBlocks:
        """Have every rank expect the part."""
        return OpenTargetBlocks(*self.key, first_logical=self.first_logical, blocks=self.blocks)

    def ask(self, store: StoreHint) -> Fetch:
        """Have the store send the part, once every rank expects it."""
        return Fetch(
            *self.key,
            source_pool_id=store.pool_id,
            source_epoch=store.epoch,
            first_logical=self.first_logical,
            owners=(0,) * len(self.blocks),
            block_hashes=self.hashes,
        )


@dataclass(slots=True)
class _Loading:
    sequence: Sequence
    store: StoreHint
    parts: list[LoadPart]
    heard: float  # when something last arrived
    num_begun: int = 0
    open: dict[RequestKey, LoadPart] = field(default_factory=dict)
    arrived: set[int] = field(default_factory=set)
    is_closing: bool = False

    @property
    def is_over(self) -> bool:
        is_whole = len(self.arrived) == len(self.parts)
        return not self.open and (self.is_closing or is_whole)

    @property
    def num_blocks(self) -> int:
        """Blocks that have arrived, in a row from the first one on."""
        total = 0
        for part in self.parts:
            if part.number not in self.arrived:
                break
            total += len(part.blocks)
        return total


@dataclass(frozen=True, slots=True)
class Loaded:
    """Nothing lands in the sequence's blocks any more; so many of them hold what they should."""

    sequence: Sequence
    num_blocks: int


class Loadings:
    """The loadings under way.

    Args:
        memory: the pool's blocks.
        facts: of the pool: how few tokens are computed instead, and how large a part is.
        commands: takes what follows.
    """

    def __init__(self, memory: SequenceMemory, facts: DecodeFacts, commands: Commands) -> None:
        self._memory = memory
        self._part_blocks = facts.load_part_blocks
        self._min_blocks = max(1, facts.min_tokens_to_load // memory.block_size)
        self._commands = commands
        self._loadings: dict[RequestKey, _Loading] = {}  # by sequence
        self._by_part: dict[RequestKey, _Loading] = {}
        self.num_loaded_blocks = 0

    def __len__(self) -> int:
        return len(self._loadings)

    def owns(self, event: TargetEvent) -> bool:
        """Whether an event is about a part."""
        return event.key in self._by_part

    def begin(self, sequence: Sequence, now: float) -> bool:
        """Ask for what a store has of a sequence and this pool has not.

        Returns:
            Whether anything was asked for; False when there is too little to be worth it.
        """
        if self._memory.num_blocks_to_load(sequence) < self._min_blocks:
            return False
        assert sequence.store is not None, "there is a store to ask"
        sequence.advance(SequenceEvent.LOAD)
        first, blocks = self._memory.begin_loading(sequence)
        request_id, attempt = sequence.key
        parts: list[LoadPart] = []
        for start in range(0, len(blocks), self._part_blocks):
            part = tuple(blocks[start : start + self._part_blocks])
            logical = first + start
            parts.append(
                LoadPart(
                    key=(f"{request_id}~{len(parts)}", attempt),
                    number=len(parts),
                    first_logical=logical,
                    blocks=part,
                    hashes=tuple(sequence.block_hashes[logical : logical + len(part)]),
                )
            )
        loading = _Loading(sequence, sequence.store, parts, now)
        self._loadings[sequence.key] = loading
        self._open_more(loading)
        return True

    def close(self, key: RequestKey) -> None:
        """Give a sequence's loading up; ``on_event`` tells when it is over. Idempotent."""
        loading = self._loadings[key]
        if not loading.is_closing:
            loading.is_closing = True
            self._commands.add(*(CloseTarget(*part) for part in loading.open))

    def on_event(self, event: TargetEvent, now: float) -> Loaded | None:
        """Take in an event of a part.

        Returns:
            ``Loaded`` when the loading is over. The sequence then has the blocks that have come,
            unless it is being closed.
        """
        loading = self._by_part[event.key]
        loading.heard = now
        part = loading.open[event.key]
        match event:
            case TargetIsOpen():
                if not loading.is_closing:
                    self._commands.add(part.ask(loading.store))
                return None
            case HandoffBroken():
                self.close(loading.sequence.key)
                return None
            case TargetCommitted():
                # Also while the loading is being closed: a commit that crosses the order to close
                # ends the part as well as its closure would.
                loading.arrived.add(part.number)
                self.num_loaded_blocks += len(part.blocks)
            case TargetClosed():
                pass
        del loading.open[event.key], self._by_part[event.key]
        if not loading.is_closing:
            self._open_more(loading)
        if not loading.is_over:
            return None
        sequence = loading.sequence
        num_blocks = loading.num_blocks
        del self._loadings[sequence.key]
        if sequence.state is SequenceState.LOADING:
            self._memory.end_loading(sequence, num_blocks)
        return Loaded(sequence, num_blocks)

    def tick(self, now: float) -> None:
        """Give up the loadings of which nothing has come for too long."""
        for key, loading in self._loadings.items():
            if now - loading.heard > LOAD_TIMEOUT_S:
                self.close(key)

    def _open_more(self, loading: _Loading) -> None:
        while loading.num_begun < len(loading.parts) and len(loading.open) < NUM_OPEN:
            part = loading.parts[loading.num_begun]
            loading.num_begun += 1
            loading.open[part.key] = part
            self._by_part[part.key] = loading
            self._commands.add(part.open())
