"""Onboardings: blocks that other pools read from a store, after they have come up from disk. Pure.

The life of an onboarding
1. ``ask``: a pool names the blocks that it wants by their hashes. If one is missing, the onboarding
   is refused; if there is no room to bring them up, it waits.
2. Those in memory are shared, the others are read from their packs into blocks of their own.
3. When the disk has answered for all of them they are handed over like a prefix, all layers at
   once. A pack that turns out damaged is given up, and the onboarding is refused.
4. ``on_closed``: nobody reads any more. The blocks stay in memory until others need the room.

An onboarding that nobody ends is closed after ``ONBOARDING_TIMEOUT_S``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvcache.blocks import BlockPool
from kvcache.tiers.index import PackIndex
from kvcache.tiers.jobs import PackRead, ReadPack
from kvtransfer.events import CloseSource, Command
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


class Onboardings:
    """The onboardings under way.

    Args:
        pool: the store's memory.
        index: the store's disk.
        writing: gives up damaged packs.
    """

    def __init__(self, pool: BlockPool, index: PackIndex, writing: WriteBehind) -> None:
        self._pool = pool
        self._index = index
        self._writing = writing
        self._onboardings: dict[RequestKey, Onboarding] = {}
        self._reads: dict[int, Onboarding] = {}
        self._num_jobs = 0
        self._commands: list[Command] = []
        self.num_loaded_blocks = 0
        self.num_lent_blocks = 0
        self.num_damaged = 0

    def __len__(self) -> int:
        return len(self._onboardings)

    def __contains__(self, key: RequestKey) -> bool:
        return key in self._onboardings

    def ask(self, fetch: Fetch, hashes: Sequence[bytes], now: float) -> None:
        """A pool wants these; a duplicate changes nothing."""
        onboarding = Onboarding(fetch, tuple(hashes), now)
        if onboarding.key in self._onboardings:
            return
        if len(hashes) != len(fetch.owners) or not hashes:
            self._commands.append(fetch.refused("its blocks are not named by their hashes"))
            return
        self._onboardings[onboarding.key] = onboarding
        self.go_on(now)

    def go_on(self, now: float) -> None:
        """Begin those for which there is room, in the order of their asking."""
        for onboarding in list(self._onboardings.values()):
            if onboarding.state is StoreState.QUEUED and not self._load(onboarding, now):
                return

    def _load(self, onboarding: Onboarding, now: float) -> bool:
        """Whether it is under way or over; False while it waits for room."""
        found = [self._pool.find(block_hash) for block_hash in onboarding.hashes]
        missing = [h for h, ref in zip(onboarding.hashes, found, strict=True) if ref is None]
        if any(h not in self._index for h in missing):
            self._end(onboarding, StoreEvent.END, GONE)
            return True
        if len(onboarding.hashes) > self._pool.num_blocks:
            self._end(onboarding, StoreEvent.END, "it is larger than the store's memory")
            return True
        shared = [ref for ref in found if ref is not None]
        self._pool.share(shared)
        if not self._pool.can_allocate(len(missing)):
            self._pool.release(shared)
            return False
        new = iter(self._pool.allocate(len(missing)))
        onboarding.blocks = [next(new) if ref is None else ref for ref in found]
        onboarding.state = advance(
            ONBOARDING, onboarding.state, StoreEvent.LOAD, of=onboarding.key[0]
        )
        self._read(onboarding, [index for index, ref in enumerate(found) if ref is None], now)
        if not onboarding.loading:
            self._serve(onboarding)
        return True

    def _read(self, onboarding: Onboarding, positions: list[int], now: float) -> None:
        """Have what is missing read, one job for each pack."""
        by_pack: dict[str, list[int]] = {}
        for position in positions:
            place = self._index.find(onboarding.hashes[position])
            assert place is not None, "it was looked for"
            by_pack.setdefault(place[0], []).append(position)
        for name, wanted in by_pack.items():
            self._num_jobs += 1
            places = [self._index.find(onboarding.hashes[position]) for position in wanted]
            indices = tuple(place[1] for place in places if place is not None)
            blocks = tuple(onboarding.blocks[position] for position in wanted)
            self._commands.append(
                ReadPack(number=self._num_jobs, name=name, indices=indices, blocks=blocks)
            )
            self._reads[self._num_jobs] = onboarding
            self._index.pack(name).num_readers += 1
            onboarding.loading[self._num_jobs] = (name, wanted)
        self._index.hit(by_pack, now)

    def on_read(self, done: PackRead) -> None:
        """The disk has answered: nothing lands in those blocks any more."""
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
                self._pool.set_hash(onboarding.blocks[position], onboarding.hashes[position])
        if onboarding.loading:
            return
        if onboarding.error or onboarding.is_closing:
            self._end(onboarding, StoreEvent.END, onboarding.error or "it was closed")
        else:
            self._serve(onboarding)

    def _serve(self, onboarding: Onboarding) -> None:
        onboarding.state = advance(
            ONBOARDING, onboarding.state, StoreEvent.LOADED, of=onboarding.key[0]
        )
        self._pool.begin_transfer(onboarding.blocks)
        self.num_lent_blocks += len(onboarding.blocks)
        self._commands.append(onboarding.asked.served(tuple(onboarding.blocks)))

    def close(self, key: RequestKey) -> None:
        """It is not wanted any more. Idempotent."""
        onboarding = self._onboardings.get(key)
        if onboarding is None or onboarding.is_closing:
            return
        onboarding.is_closing = True
        if onboarding.state is StoreState.QUEUED:
            self._end(onboarding, StoreEvent.END, "it was closed")
        elif onboarding.state is StoreState.SERVING:
            self._commands.append(CloseSource(*key))

    def on_closed(self, key: RequestKey) -> None:
        """Nobody reads from its blocks any more."""
        onboarding = self._onboardings.get(key)
        if onboarding is not None and onboarding.state is StoreState.SERVING:
            self._pool.end_transfer(onboarding.blocks)
            self._end(onboarding, StoreEvent.CLOSED, "")

    def tick(self, now: float) -> None:
        """Close what nobody ends."""
        for onboarding in list(self._onboardings.values()):
            if now - onboarding.since > ONBOARDING_TIMEOUT_S:
                self.close(onboarding.key)

    def _end(self, onboarding: Onboarding, event: StoreEvent, refusal: str) -> None:
        onboarding.state = advance(ONBOARDING, onboarding.state, event, of=onboarding.key[0])
        self._pool.release(onboarding.blocks)
        onboarding.blocks = []
        del self._onboardings[onboarding.key]
        if refusal:
            self._commands.append(onboarding.asked.refused(refusal))

    def take_commands(self) -> list[Command]:
        commands, self._commands = self._commands, []
        return commands
