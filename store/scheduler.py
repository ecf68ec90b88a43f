"""The decisions of a store: KV comes in, goes to disk, comes up again and is read. Pure.

The life of an offload
1. ``Reserve``, exactly as a decode pool gets it, or ``Collect``, queues it. When there is room it
   gets blocks for what is not on disk, the hand-off is opened, and then the ``Ticket`` is given: a
   prefill pool hands its KV over while it computes. For a ``Collect`` the pool that has the KV is
   asked for it.
2. ``TargetCommitted``: the full blocks are the store's, under their hashes, and are written behind
   (writing.py). ``Stored`` is sent when all of them are durable, then ``Released``.
3. What arrived in full of a hand-off that broke, or was aborted, is kept as well: the next attempt
   goes on from there.

Other pools ask for KV by its hashes (onboarding.py): a decode pool before it computes a prompt, a
prefill pool that goes on where another one ended.
"""

from collections.abc import Iterable
from typing import Never

from engine.attempts import Attempts
from engine.leader_node import Commands
from kvcache.blocks import BlockPool
from kvcache.tiers.index import PackIndex
from kvcache.tiers.jobs import PackRead, PackWritten
from kvtransfer.events import (
    CloseTarget,
    Command,
    ControlReceived,
    Event,
    HandoffBroken,
    Load,
    SourceClosed,
    TargetClosed,
    TargetCommitted,
    TargetIsOpen,
)
from protocol.handoff import Fetch
from protocol.messages import (
    Abort,
    Ask,
    CacheUpdate,
    Collect,
    Committed,
    Forget,
    Pin,
    Released,
    RequestFailed,
    Reserve,
    Stored,
    Ticket,
    ToRank,
    cache_updates,
)
from protocol.plans import StepResult
from protocol.request import RequestKey
from store.facts import StoreFacts
from store.offload import Offload
from store.onboarding import Onboardings
from store.states import StoreEvent, StoreState
from store.writing import WriteBehind

HOST, DISK = "cpu", "disk"
STORAGE_FULL = "insufficient_storage"


class StoreScheduler:
    """The decisions of a store; see :class:`engine.leader_node.LeaderNode`.

    Args:
        facts: of the store.
        blocks: its memory; blocks with a hash and without an owner make room for others.
        index: its disk, whose content is the first message to the coordinator.
        damaged: blocks of packs that were found damaged, and are not in ``index``.
    """

    def __init__(
        self,
        facts: StoreFacts,
        blocks: BlockPool,
        index: PackIndex,
        damaged: tuple[bytes, ...] = (),
    ) -> None:
        self.facts = facts
        self._blocks = blocks
        self._index = index
        self._commands = Commands()
        self._writing = WriteBehind(blocks, index, facts, self._commands)
        self._onboardings = Onboardings(blocks, index, self._writing, self._commands)
        self._offloads: Attempts[Offload] = Attempts()
        for update in cache_updates(index.hashes, DISK):
            self._commands.tell(update)
        if damaged:
            self._onboardings.num_damaged += len(damaged)
            self._commands.tell(CacheUpdate(tier=DISK, damaged=damaged))

    # -- in: events --------------------------------------------------------------------------------

    def on_event(self, event: Event, now: float) -> None:
        """Take in an event; see :class:`engine.leader_node.LeaderNode`."""
        match event:
            case ControlReceived(message):
                self._on_message(message)
            case Fetch() | SourceClosed() | HandoffBroken(side="source"):
                self._on_source(event, now)
            case TargetIsOpen() | TargetCommitted() | TargetClosed() | HandoffBroken():
                self._on_target(event, now)
            case PackWritten():
                self._on_written(event, now)
            case PackRead():
                self._onboardings.on_read(event)

    def _on_message(self, message: ToRank) -> None:
        match message:
            case Reserve() | Collect():
                self._on_offload(message)
            case Abort():
                self._on_abort(message)
            case Ask():
                self._on_ask(message)
            case Pin():
                self._index.pin(message.owner, message.block_hashes, message.mode)
            case Forget():
                self._writing.delete(self._index.forgettable(message.block_hashes))

    def _on_offload(self, message: Reserve | Collect) -> None:
        """Queue an offload. A duplicate changes nothing; a newer attempt ends the older ones."""
        older = self._offloads.superseded_by(message.key)
        if older is None:
            return
        for offload in older:
            self._give_up(offload)
        offload = Offload.of(message, self.facts.block_size, self.facts.model_fingerprint)
        self._offloads.begin(message.key, offload)
        if offload.num_blocks - self._num_known(offload) > self._blocks.num_blocks:
            room = self._blocks.num_blocks * self.facts.block_size
            text = f"more than the {room} tokens of the store's memory at a time"
            self._fail(offload, "kv_capacity_exceeded", text)

    def _on_abort(self, message: Abort) -> None:
        """Give the offload up; answered by ``Released`` as often as it is asked for."""
        self._onboardings.close(message.key)
        offload = self._offloads.get(message.key)
        if offload is not None:
            offload.is_doubtful |= message.is_doubtful
            self._give_up(offload)
        else:
            # The abort may have overtaken what it aborts, which must not begin after this.
            self._offloads.end(message.key)
            self._tell_released(message.key)

    def _on_ask(self, message: Ask) -> None:
        """Repeat how the offload stands: an earlier message may have been lost."""
        offload = self._offloads.get(message.key)
        if offload is None:
            self._tell_released(message.key)
        elif offload.source is None and offload.state in (StoreState.RESERVED, StoreState.STORING):
            self._give_ticket(offload)  # while it is written the ticket is a sign of life

    def _on_source(self, event: Fetch | SourceClosed | HandoffBroken, now: float) -> None:
        """An event of a fetch by another pool, of which the store is the source."""
        match event:
            case Fetch():
                self._onboardings.ask(event, self._wanted(event), now)
            case HandoffBroken():
                self._onboardings.close(event.key)
            case SourceClosed():
                self._onboardings.on_closed(event.key)
                self._tell_released(event.key)

    def _wanted(self, event: Fetch) -> tuple[bytes, ...]:
        """The hashes that are asked for; a pool that has none means those of its own hand-off."""
        offload = self._offloads.get(event.key)
        if event.block_hashes or offload is None:
            return event.block_hashes
        return offload.hashes[event.first_logical : event.first_logical + len(event.owners)]

    def _on_target(
        self, event: TargetIsOpen | TargetCommitted | TargetClosed | HandoffBroken, now: float
    ) -> None:
        """An event of a hand-off into the store."""
        offload = self._offloads.get(event.key)
        if offload is None or not offload.holds_handoff:
            return
        match event:
            case TargetIsOpen() if offload.state is StoreState.OPENING:
                offload.advance(StoreEvent.OPENED)
                if offload.source is None:
                    self._give_ticket(offload)
                else:
                    self._commands.add(offload.ask())
            case TargetCommitted() if offload.state is StoreState.RESERVED:
                self._on_committed(offload, event, now)
            case TargetCommitted() if offload.state is StoreState.CLOSING:
                # The commit has crossed the order to close: all of it is here.
                offload.advance(StoreEvent.COMMITTED)
                self._end_transfer(offload, len(offload.blocks), now)
                self._release(offload)
            case TargetClosed() if offload.state is StoreState.CLOSING:
                offload.advance(StoreEvent.CLOSED)
                self._end_transfer(offload, event.num_whole_blocks, now)
                self._release(offload)
            case HandoffBroken() if offload.state is not StoreState.CLOSING:
                self._fail(offload, "handoff_failed", event.reason)

    def _on_committed(self, offload: Offload, event: TargetCommitted, now: float) -> None:
        offload.advance(StoreEvent.COMMITTED)
        if offload.source is None:
            self._commands.tell(Committed(*offload.key, stats=event.stats))
        error = self._end_transfer(offload, len(offload.blocks), now, waits=True)
        if error:
            self._fail(offload, STORAGE_FULL, error)
        elif not self._writing.is_waiting(offload.key):
            self._stored(offload)

    def _end_transfer(
        self, offload: Offload, num_whole: int, now: float, *, waits: bool = False
    ) -> str:
        """No byte lands in an offload's blocks any more: keep the leading whole ones.

        Args:
            offload: whose hand-off has ended.
            num_whole: leading blocks that hold what they should.
            now: for the value of packs.
            waits: the offload ends only when all of its blocks are durable.

        Returns:
            Why they cannot be written, or an empty string.
        """
        self._blocks.end_transfer(offload.blocks)
        num_kept = min(num_whole, len(offload.hashes) - offload.first)
        if offload.is_doubtful:
            num_kept = 0
        self._blocks.release(offload.blocks[num_kept:])
        kept = offload.blocks[:num_kept]
        offload.blocks = []
        key = offload.key if waits else None
        error = self._writing.keep(key, offload.chain(num_kept), kept, now)
        if waits:  # other offloads may be writing what was known when blocks were granted
            self._writing.wait(offload.key, offload.hashes)
        return error

    def _on_written(self, done: PackWritten, now: float) -> None:
        ready, failed = self._writing.on_written(done, now)
        for key in ready:
            self._stored(self._offloads[key])
        for key in failed:
            self._fail(self._offloads[key], STORAGE_FULL, f"not written to disk: {done.error}")

    # -- out: room ---------------------------------------------------------------------------------

    def schedule(self, now: float) -> None:
        """Grant blocks to offloads, then to onboardings, each in the order of arrival."""
        for offload in list(self._offloads.values()):
            if offload.state is StoreState.QUEUED and not self._grant(offload):
                break
        self._onboardings.go_on(now)
        self._onboardings.tick(now)

    def update(self, plan: Never, results: Iterable[StepResult], now: float) -> None:
        """Never called: a store computes nothing, so ``schedule`` has no plan."""
        raise AssertionError(plan, results, now)

    def _num_known(self, offload: Offload) -> int:
        """Leading blocks that are on disk, or on their way there."""
        num_known = 0
        while num_known < offload.max_first and self._writing.covers(offload.hashes[num_known]):
            num_known += 1
        return num_known

    def _grant(self, offload: Offload) -> bool:
        """Give an offload the blocks that it needs; False while it waits for room."""
        first = self._num_known(offload)
        num_new = offload.num_blocks - first
        if not self._blocks.can_allocate(num_new):
            return False
        offload.first = first
        # The packs that it continues must not be evicted before its own blocks are there.
        self._index.pin(_owner(offload), offload.hashes[:first], "hard")
        if num_new == 0:  # a Collect of what is here
            offload.advance(StoreEvent.KNOWN)
            self._writing.wait(offload.key, offload.hashes)
            if not self._writing.is_waiting(offload.key):
                self._stored(offload)
            return True
        offload.advance(StoreEvent.GRANT)
        offload.blocks = self._blocks.allocate(num_new)
        self._blocks.begin_transfer(offload.blocks)
        self._commands.add(offload.open())
        return True

    # -- the ways out ------------------------------------------------------------------------------

    def _give_ticket(self, offload: Offload) -> None:
        num_cached_tokens = offload.first * self.facts.block_size
        self._commands.tell(Ticket(*offload.key, num_cached_tokens=num_cached_tokens))

    def _stored(self, offload: Offload) -> None:
        """Every full block of an offload is durable."""
        offload.advance(StoreEvent.STORED)
        num_tokens = len(offload.hashes) * self.facts.block_size
        self._commands.tell(Stored(*offload.key, num_tokens=num_tokens))
        self._release(offload)

    def _fail(self, offload: Offload, code: str, message: str) -> None:
        self._commands.tell(RequestFailed(*offload.key, code=code, message=message))
        self._give_up(offload)

    def _give_up(self, offload: Offload) -> None:
        """End an offload in whatever state it is."""
        if offload.state in (StoreState.OPENING, StoreState.RESERVED):
            offload.advance(StoreEvent.CLOSE)
            self._commands.add(CloseTarget(*offload.key))
        elif offload.state is not StoreState.CLOSING:
            offload.advance(StoreEvent.END)
            self._writing.forget(offload.key)
            self._release(offload)

    def _release(self, offload: Offload) -> None:
        """Forget an offload, which holds no block any more."""
        self._index.pin(_owner(offload), (), "hard")
        self._offloads.end(offload.key)
        self._tell_released(offload.key)

    def _tell_released(self, key: RequestKey) -> None:
        """Unless a hand-off under this key goes on, in either direction."""
        if key not in self._offloads and key not in self._onboardings:
            self._commands.tell(Released(*key))

    # -- out: commands and figures -----------------------------------------------------------------

    def take_commands(self) -> list[Command]:
        """The commands decided on since the last call, in order."""
        stored, evicted = self._writing.take_changes()
        damaged = self._writing.take_damaged()
        self._tell_cache(DISK, stored, evicted, damaged)
        stored, evicted = self._blocks.take_cache_events()
        self._tell_cache(HOST, stored, evicted)
        return self._commands.take()

    def _tell_cache(
        self,
        tier: str,
        stored: tuple[bytes, ...],
        evicted: tuple[bytes, ...],
        damaged: tuple[bytes, ...] = (),
    ) -> None:
        if stored or evicted:
            update = CacheUpdate(stored=stored, evicted=evicted, tier=tier, damaged=damaged)
            self._commands.tell(update)

    @property
    def is_idle(self) -> bool:
        """Whether no request is here at all, and nothing is being written."""
        return not (len(self._offloads) or len(self._onboardings) or len(self._writing))

    def check(self) -> None:
        """Assert that every block is accounted for."""
        self._blocks.check()

    def load(self) -> Load:
        """What is waiting, running and held."""
        offloads = self._offloads.values()
        num_queued = sum(offload.state is StoreState.QUEUED for offload in offloads)
        return Load(
            num_waiting=num_queued,
            num_running=len(offloads) - num_queued,
            blocks=(self._blocks.counts(),),
            counters={
                "store_disk_bytes": self._index.num_bytes,
                "store_disk_quota_bytes": self._index.quota_bytes,
                "store_packs": len(self._index),
                "store_packs_evicted": self._index.num_evicted,
                "store_packs_damaged": self._onboardings.num_damaged,
                "store_written_bytes": self._writing.num_written_bytes,
                "store_loaded_blocks": self._onboardings.num_loaded_blocks,
                "store_lent_blocks": self._onboardings.num_lent_blocks,
            },
        )


def _owner(offload: Offload) -> str:
    return f"offload {offload.key}"
