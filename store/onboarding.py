"""Onboardings: blocks that other pools read from a store, after they have come up from disk. Pure.

The life of an onboarding
1. ``ask``: a pool names the blocks that it wants by their hashes. If one is not here, the fetch is
   refused; if there is no room to bring them up, it waits.
2. Blocks that are in memory are shared, the others are read from their packs into blocks of their
   own.
3. When the disk has answered for all of them they are served like a prefix, all layers at once. A
   pack that turns out damaged is given up, and the fetch is refused.
4. ``on_closed``: no rank reads any more. The blocks stay in memory until others need the room.

An onboarding that takes longer than ``ONBOARDING_TIMEOUT_S`` is closed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.leader_node import Commands
from kvcache.blocks import BlockPool
from kvcache.tiers.index import PackIndex
from kvcache.tiers.jobs import PackRead, ReadPack
from kvtransfer.events import CloseSource
from protocol.handoff import Fetch
from protocol.kv import BlockRef
from protocol.request import RequestKey
from protocol.transitions import advance
from store.states import ONBOARDING, StoreEvent, StoreState
from store.writing import WriteBehind

ONBOARDING_TIMEOUT_S = 60.0
GONE = "the store does not hold all of it any more"


@dataclass(slots=True, eq=False)
class Onboarding:
    """One fetch by another pool."""

    asked: Fetch
    hashes: tuple[bytes, ...]
    since: float
    state: StoreState = StoreState.QUEUED
    blocks: list[BlockRef] = field(default_factory=list)
    loading: dict[int, tuple[str, list[int]]] = field(default_factory=dict)  # reads under way
    error: str = ""
    is_closing: bool = False

    @property
    def key(self) -> RequestKey:
        return self.asked.key

    def advance(self, event: StoreEvent) -> None:
        """Move to the next state.

        Raises:
            IllegalTransition: ``event`` cannot happen now; nothing is changed.
        """
        self.state = advance(ONBOARDING, self.state, event, of=self.asked.request_id)


class Onboardings:
    """The onboardings under way.

    Args:
        blocks: the store's memory.
        index: the store's disk.
        writing: gives up damaged packs.
        commands: takes what follows.
    """

    def __init__(
        self, blocks: BlockPool, index: PackIndex, writing: WriteBehind, commands: Commands
    ) -> None:
        self._blocks = blocks
        self._index = index
        self._writing = writing
        self._commands = commands
        self._onboardings: dict[RequestKey, Onboarding] = {}
        self._reads: dict[int, Onboarding] = {}  # by job
        self._num_jobs = 0
        self.num_loaded_blocks = 0
        self.num_lent_blocks = 0
        self.num_damaged = 0

    def __len__(self) -> int:
        return len(self._onboardings)

    def __contains__(self, key: RequestKey) -> bool:
        return key in self._onboardings

    def ask(self, fetch: Fetch, hashes: Sequence[bytes], now: float) -> None:
        """Begin to bring up what a pool wants. A duplicate changes nothing."""
        onboarding = Onboarding(fetch, tuple(hashes), now)
        if onboarding.key in self._onboardings:
            return
        if len(hashes) != len(fetch.owners) or not hashes:
            self._commands.add(fetch.refused("its blocks are not named by their hashes"))
            return
        self._onboardings[onboarding.key] = onboarding
        self.go_on(now)

    def go_on(self, now: float) -> None:
        """Begin the onboardings for which there is room, in the order of their asking."""
        for onboarding in list(self._onboardings.values()):
            if onboarding.state is StoreState.QUEUED and not self._load(onboarding, now):
                return

    def _load(self, onboarding: Onboarding, now: float) -> bool:
        """Begin an onboarding, or refuse it; False while it waits for room."""
        found = [self._blocks.find(block_hash) for block_hash in onboarding.hashes]
        missing = [h for h, ref in zip(onboarding.hashes, found, strict=True) if ref is None]
        if any(h not in self._index for h in missing):
            self._end(onboarding, StoreEvent.END, GONE)
            return True
        if len(onboarding.hashes) > self._blocks.num_blocks:
            self._end(onboarding, StoreEvent.END, "it is larger than the store's memory")
            return True
        shared = [ref for ref in found if ref is not None]
        # Share first: a shared block cannot be evicted to make room for the missing ones.
        self._blocks.share(shared)
        if not self._blocks.can_allocate(len(missing)):
            self._blocks.release(shared)
            return False
        new = iter(self._blocks.allocate(len(missing)))
        onboarding.blocks = [next(new) if ref is None else ref for ref in found]
        onboarding.advance(StoreEvent.LOAD)
        self._read(onboarding, [index for index, ref in enumerate(found) if ref is None], now)
        if not onboarding.loading:
            self._serve(onboarding)
        return True

    def _read(self, onboarding: Onboarding, positions: list[int], now: float) -> None:
        """Have the missing blocks read, one job for each pack."""
        by_pack: dict[str, list[int]] = {}
        for position in positions:
            place = self._index.find(onboarding.hashes[position])
            assert place is not None, "it was looked for"
            by_pack.setdefault(place[0], []).append(position)
        for name, wanted in by_pack.items():
            self._num_jobs += 1
            places = [self._index.find(onboarding.hashes[position]) for position in wanted]
            job = ReadPack(
                number=self._num_jobs,
                name=name,
                indices=tuple(place[1] for place in places if place is not None),
                blocks=tuple(onboarding.blocks[position] for position in wanted),
            )
            self._commands.add(job)
            self._reads[job.number] = onboarding
            onboarding.loading[job.number] = (name, wanted)
            self._index.pack(name).num_readers += 1  # the pack must not be given up meanwhile
        self._index.hit(by_pack, now)

    def on_read(self, done: PackRead) -> None:
        """The disk has answered a job: nothing lands in its blocks any more."""
        onboarding = self._reads.pop(done.number)
        name, positions = onboarding.loading.pop(done.number)
        self._index.pack(name).num_readers -= 1
        if done.error:
            self.num_damaged += 1
            onboarding.error = onboarding.error or done.error
            if not self._index.pack(name).num_readers:
                self._writing.delete([name], are_damaged=True)
        else:
            self.num_loaded_blocks += len(positions)
            for position in positions:
                self._blocks.set_hash(onboarding.blocks[position], onboarding.hashes[position])
        # Bytes of the other jobs may still land: nothing is served or given up before the last.
        if onboarding.loading:
            return
        if onboarding.error or onboarding.is_closing:
            self._end(onboarding, StoreEvent.END, onboarding.error or "it was closed")
        else:
            self._serve(onboarding)

    def _serve(self, onboarding: Onboarding) -> None:
        onboarding.advance(StoreEvent.LOADED)
        self._blocks.begin_transfer(onboarding.blocks)
        self.num_lent_blocks += len(onboarding.blocks)
        self._commands.add(onboarding.asked.served(tuple(onboarding.blocks)))

    def close(self, key: RequestKey) -> None:
        """End an onboarding that is not wanted any more. Idempotent."""
        onboarding = self._onboardings.get(key)
        if onboarding is None or onboarding.is_closing:
            return
        onboarding.is_closing = True
        if onboarding.state is StoreState.QUEUED:
            self._end(onboarding, StoreEvent.END, "it was closed")
        elif onboarding.state is StoreState.SERVING:
            self._commands.add(CloseSource(*key))

    def on_closed(self, key: RequestKey) -> None:
        """No rank reads from an onboarding's blocks any more."""
        onboarding = self._onboardings.get(key)
        if onboarding is not None and onboarding.state is StoreState.SERVING:
            self._blocks.end_transfer(onboarding.blocks)
            self._end(onboarding, StoreEvent.CLOSED, "")

    def tick(self, now: float) -> None:
        """Close the onboardings that take too long: no request may be left to end them."""
        for onboarding in list(self._onboardings.values()):
            if now - onboarding.since > ONBOARDING_TIMEOUT_S:
                self.close(onboarding.key)

    def _end(self, onboarding: Onboarding, event: StoreEvent, refusal: str) -> None:
        onboarding.advance(event)
        self._blocks.release(onboarding.blocks)
        onboarding.blocks = []
        del self._onboardings[onboarding.key]
        if refusal:
            self._commands.add(onboarding.asked.refused(refusal))
