"""What a store does next: KV comes in, goes to disk, comes up again and is lent. Pure.

The life of an offload
1. ``Reserve``, exactly as a decode pool gets it, or ``Collect``, queues it. When there is room it
   gets blocks for what is not on disk, the hand-off is opened, and then the ``Ticket`` is given: a
   prefill pool hands its KV over while it computes. For a ``Collect`` the pool that has the KV is
   asked for it.
2. ``TargetCommitted``: the full blocks are the store's, under their hashes, and are written behind
   (writing.py). ``Stored`` is said when all of them are durable, then ``Released``.
3. What arrived in full of a hand-off that broke, or was aborted, is kept as well: the next attempt
   goes on from there.

Whoever wants KV asks for it by hash (onboardings.py): a decode pool before it computes a prompt, a
prefill pool that goes on where another one ended.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Never

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
    SendControl,
    SourceClosed,
    TargetClosed,
    TargetCommitted,
    TargetIsOpen,
)
from protocol.ended import EndedAttempts
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
    ToCoordinator,
    ToRank,
    cache_updates,
)
from protocol.plans import StepResult
from protocol.request import RequestKey
from store.offload import Offload
from store.onboarding import Onboardings
from store.states import StoreEvent, StoreState
from store.writing import WriteBehind

HOST, DISK = "cpu", "disk"
STORAGE_FULL = "insufficient_storage"


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """A store, as its scheduler needs to know it."""

    block_size: int
    block_bytes: int  # of one block, all layers
    pack_blocks: int
    model_fingerprint: str


class StoreScheduler:
    """The decisions of a store.

    Args:
        pool: its memory; blocks with a hash and without an owner make room for others.
        index: its disk. What is there is told first of all.
        facts: what never changes.
        damaged: blocks of packs that were found damaged, and are not in ``index``.
    """

    def __init__(
        self,
        pool: BlockPool,
        index: PackIndex,
        facts: StoreFacts,
        damaged: tuple[bytes, ...] = (),
    ) -> None:
        self._pool = pool
        self._index = index
        self._facts = facts
        self._writing = WriteBehind(pool, index, facts.block_bytes, facts.pack_blocks)
        self._onboardings = Onboardings(pool, index, self._writing)
        self._offloads: dict[RequestKey, Offload] = {}  # in order of arrival
        self._ended = EndedAttempts()
        self._commands: list[Command] = []
        for update in cache_updates(index.hashes, DISK):
            self._send(update)
        if damaged:
            self._onboardings.num_damaged += len(damaged)
            self._send(CacheUpdate(tier=DISK, damaged=damaged))

    # -- in ----------------------------------------------------------------------------------------

    def on_event(self, event: Event, now: float) -> None:
        """Take note of a message, of what became of a hand-off, or of what the disk has done."""
        match event:
            case ControlReceived(message):
                self._on_message(message)
            case TargetIsOpen() | TargetCommitted() | TargetClosed():
                self._on_target(event, now)
            case HandoffBroken(side="target"):
                self._on_broken(event)
            case Fetch():
                self._onboardings.ask(event, self._wanted(event), now)
            case SourceClosed():
                self._onboardings.on_closed(event.key)
                self._say_released(event.key)
            case HandoffBroken(side="source"):
                self._onboardings.close(event.key)
            case PackWritten():
                self._on_written(event, now)
            case PackRead():
                self._onboardings.on_read(event)

    def _on_message(self, message: ToRank) -> None:
        match message:
            case Reserve() | Collect():
                self._on_deposit(message)
            case Abort():
                self._on_abort(message)
            case Ask():
                self._on_ask(message.key)
            case Pin():
                self._index.pin(message.owner, message.block_hashes, message.mode)
            case Forget():
                self._writing.delete(self._index.forgettable(message.block_hashes))

    def _on_deposit(self, message: Reserve | Collect) -> None:
        """Queue it. A duplicate changes nothing; a newer attempt ends the older ones."""
        key = message.key
        others = [d for d in self._offloads.values() if d.key[0] == message.request_id]
        if self._ended.covers(*key) or any(other.key[1] >= key[1] for other in others):
            return
        for other in others:
            self._give_up(other)
        facts = self._facts
        offload = Offload.of(message, facts.block_size, facts.model_fingerprint)
        self._offloads[key] = offload
        if offload.num_blocks - self._num_known(offload) > self._pool.num_blocks:
            room = self._pool.num_blocks * facts.block_size
            text = f"more than the {room} tokens of the store's memory at a time"
            self._fail(offload, "kv_capacity_exceeded", text)

    def _wanted(self, event: Fetch) -> tuple[bytes, ...]:
        """The hashes that are asked for; a pool that has none means those of its own hand-off."""
        offload = self._offloads.get(event.key)
        if event.block_hashes or offload is None:
            return event.block_hashes
        return offload.hashes[event.first_logical : event.first_logical + len(event.owners)]

    def _on_abort(self, message: Abort) -> None:
        key = message.key
        offload = self._offloads.get(key)
        self._onboardings.close(key)
        if offload is not None:
            offload.is_doubtful |= message.is_doubtful
            self._give_up(offload)
        else:
            self._ended.add(*key)
            self._say_released(key)

    def _on_ask(self, key: RequestKey) -> None:
        """Say again what may have been lost on its way; a ticket is a sign of life, too."""
        offload = self._offloads.get(key)
        if offload is None:
            self._say_released(key)
        elif offload.source is None and offload.state in (StoreState.RESERVED, StoreState.STORING):
            self._give_ticket(offload)

    # -- hand-offs into the store ------------------------------------------------------------------

    def _on_target(self, event: TargetIsOpen | TargetCommitted | TargetClosed, now: float) -> None:
        offload = self._offloads.get(event.key)
        if offload is None or not offload.holds_handoff:
            return
        match event:
            case TargetIsOpen() if offload.state is StoreState.OPENING:
                offload.advance(StoreEvent.OPENED)
                if offload.source is None:
                    self._give_ticket(offload)
                else:
                    self._commands.append(offload.ask())
            case TargetCommitted() if offload.state is StoreState.RESERVED:
                self._on_committed(offload, event, now)
            case TargetCommitted() if offload.state is StoreState.CLOSING:
                offload.advance(StoreEvent.COMMITTED)
                self._end_transfer(offload, len(offload.blocks), now)
                self._forget(offload)
            case TargetClosed() if offload.state is StoreState.CLOSING:
                offload.advance(StoreEvent.CLOSED)
                self._end_transfer(offload, event.num_whole_blocks, now)
                self._forget(offload)

    def _give_ticket(self, offload: Offload) -> None:
        self._send(Ticket(*offload.key, num_cached_tokens=offload.first * self._facts.block_size))

    def _on_committed(self, offload: Offload, event: TargetCommitted, now: float) -> None:
        offload.advance(StoreEvent.COMMITTED)
        if offload.source is None:
            self._send(Committed(*offload.key, stats=event.stats))
        error = self._end_transfer(offload, len(offload.blocks), now, waits=True)
        if error:
            self._fail(offload, STORAGE_FULL, error)
        elif not self._writing.is_waiting(offload.key):
            self._stored(offload)

    def _end_transfer(
        self, offload: Offload, num_whole: int, now: float, *, waits: bool = False
    ) -> str:
        """No byte lands in its blocks any more: the leading whole ones are kept."""
        self._pool.end_transfer(offload.blocks)
        num_kept = min(num_whole, len(offload.hashes) - offload.first)
        if offload.is_doubtful:
            num_kept = 0
        self._pool.release(offload.blocks[num_kept:])
        kept, offload.blocks = offload.blocks[:num_kept], []
        key = offload.key if waits else None
        error = self._writing.keep(key, offload.chain(num_kept), kept, now)
        if waits:  # others may be writing what was known when blocks were granted
            self._writing.wait(offload.key, offload.hashes)
        return error

    def _on_broken(self, event: HandoffBroken) -> None:
        offload = self._offloads.get(event.key)
        if offload is not None and offload.state in (StoreState.OPENING, StoreState.RESERVED):
            self._fail(offload, "handoff_failed", event.reason)

    def _on_written(self, done: PackWritten, now: float) -> None:
        ready, failed = self._writing.on_written(done, now)
        for key in ready:
            self._stored(self._offloads[key])
        for key in failed:
            self._fail(self._offloads[key], STORAGE_FULL, f"not written to disk: {done.error}")

    def _stored(self, offload: Offload) -> None:
        """Every full block of it is durable."""
        offload.advance(StoreEvent.STORED)
        num_tokens = len(offload.hashes) * self._facts.block_size
        self._send(Stored(*offload.key, num_tokens=num_tokens))
        self._forget(offload)

    # -- the ways out ------------------------------------------------------------------------------

    def _fail(self, offload: Offload, code: str, message: str) -> None:
        self._send(RequestFailed(*offload.key, code=code, message=message))
        self._give_up(offload)

    def _give_up(self, offload: Offload) -> None:
        if offload.state in (StoreState.OPENING, StoreState.RESERVED):
            offload.advance(StoreEvent.CLOSE)
            self._commands.append(CloseTarget(*offload.key))
        elif offload.state is not StoreState.CLOSING:
            offload.advance(StoreEvent.END)
            self._writing.forget(offload.key)
            self._forget(offload)

    def _forget(self, offload: Offload) -> None:
        self._index.pin(_owner(offload), (), "hard")
        del self._offloads[offload.key]
        self._ended.add(*offload.key)
        self._say_released(offload.key)

    def _say_released(self, key: RequestKey) -> None:
        if key not in self._offloads and key not in self._onboardings:
            self._send(Released(*key))

    def _send(self, message: ToCoordinator) -> None:
        self._commands.append(SendControl(message))

    # -- out ---------------------------------------------------------------------------------------

    def schedule(self, now: float) -> None:
        """Grant blocks to offloads in order of arrival while there is room, then to onboardings."""
        for offload in list(self._offloads.values()):
            if offload.state is StoreState.QUEUED and not self._grant(offload):
                break
        self._onboardings.go_on(now)
        self._onboardings.tick(now)

    def update(self, plan: Never, results: Iterable[StepResult], now: float) -> None:
        """Never called: a store computes nothing, so that ``schedule`` has no plan."""
        raise AssertionError(plan, results, now)

    def _num_known(self, offload: Offload) -> int:
        num_known = 0
        while num_known < offload.max_first and self._writing.covers(offload.hashes[num_known]):
            num_known += 1
        return num_known

    def _grant(self, offload: Offload) -> bool:
        first = self._num_known(offload)
        num_new = offload.num_blocks - first
        if not self._pool.can_allocate(num_new):
            return False
        offload.first = first
        # What it goes on from must not be given up before it is there.
        self._index.pin(_owner(offload), offload.hashes[:first], "hard")
        if num_new == 0:  # a Collect of what is here
            offload.advance(StoreEvent.KNOWN)
            self._writing.wait(offload.key, offload.hashes)
            if not self._writing.is_waiting(offload.key):
                self._stored(offload)
            return True
        offload.advance(StoreEvent.GRANT)
        offload.blocks = self._pool.allocate(num_new)
        self._pool.begin_transfer(offload.blocks)
        self._commands.append(offload.open())
        return True

    def take_commands(self) -> list[Command]:
        """What the transfer thread and the disk are to do, since the last call, in order."""
        for tier, (stored, evicted), damaged in (
            (DISK, self._writing.take_changes(), self._writing.take_damaged()),
            (HOST, self._pool.take_cache_events(), ()),
        ):
            if stored or evicted:
                self._send(CacheUpdate(stored=stored, evicted=evicted, tier=tier, damaged=damaged))
        self._commands += self._writing.take_jobs()
        self._commands += self._onboardings.take_commands()
        commands, self._commands = self._commands, []
        return commands

    @property
    def is_idle(self) -> bool:
        return not (self._offloads or len(self._onboardings) or len(self._writing))

    def check(self) -> None:
        """Assert that every block is accounted for."""
        self._pool.check()

    def load(self) -> Load:
        """What the heartbeat says."""
        num_queued = sum(offload.state is StoreState.QUEUED for offload in self._offloads.values())
        return Load(
            num_waiting=num_queued,
            num_running=len(self._offloads) - num_queued,
            blocks=(self._pool.counts(),),
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
