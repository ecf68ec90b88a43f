"""The source side of hand-offs on one rank. Pure.

1. ``announce`` opens the hand-off with its first blocks. Each target rank that shares heads with
   this one gets an ``Announce``: where the blocks lie, at which generation, and their checksum.
2. ``ReadDone`` asks whether the blocks were still this rank's. They are as long as the hand-off is
   open, and ``Confirm`` says so.
3. When all is announced and read, the leader gets ``SourceDone``.
4. ``Close`` ends a hand-off early: nothing is announced or confirmed any more. ``Closed`` follows
   when no target rank can still be reading: each has read, or has sent ReadsEnded, or is gone, or
   the lease is over. What a rank reads after that is never confirmed.
5. A target that is gone, or has closed its side, breaks the hand-off: ``HandoffFailed``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from kvtransfer.events import AnnounceBlocks, AnnouncedAll
from kvtransfer.handoff.actions import Action, RankState, Send, Warn
from kvtransfer.handoff.recently_ended import RecentlyEnded
from kvtransfer.handoff.states import SOURCE_TABLE, SourceEvent, SourceState
from kvtransfer.identity import PeerName
from kvtransfer.plan import ByteRun, shared_heads, source_runs
from protocol.handoff import (
    Announce,
    Close,
    Closed,
    Confirm,
    HandoffFailed,
    ReadDone,
    ReadsEnded,
    SegmentKey,
    SourceDone,
)
from protocol.kv import KVLayout
from protocol.request import RequestKey
from protocol.transitions import advance

SUM_EVERY = 8  # sampled: one segment of so many


@dataclass(slots=True)
class SourceHandoff:
    """One hand-off that this rank is a source of."""

    key: RequestKey
    target_pool_id: str
    target_epoch: int
    state: SourceState = SourceState.ANNOUNCING
    keys: set[SegmentKey] = field(default_factory=set)  # announced
    unread: dict[int, set[SegmentKey]] = field(default_factory=dict)  # by target rank
    closing_since: float | None = None

    @property
    def is_read(self) -> bool:
        return not any(self.unread.values())

    @property
    def is_going_on(self) -> bool:
        return self.state in (SourceState.ANNOUNCING, SourceState.DRAINING)


class SourceSide:
    """All hand-offs that this rank is a source of.

    Args:
        around: this rank's identity, epoch and peers.
        checksum: the sum of runs in the own pool.
        policy: "off", "sampled" or "always".
        lease_s: how long a closing hand-off waits for a silent reader.
    """

    def __init__(
        self,
        around: RankState,
        checksum: Callable[[Sequence[ByteRun]], int],
        policy: str,
        lease_s: float,
    ) -> None:
        self._around = around
        self._checksum = checksum
        self._policy = policy
        self._lease_s = lease_s
        self._handoffs: dict[RequestKey, SourceHandoff] = {}
        self._recently_ended = RecentlyEnded()
        self._all_read = RecentlyEnded()  # of them, those that ended because all was read
        self._num_announced = 0

    @property
    def num_open(self) -> int:
        return len(self._handoffs)

    @property
    def is_being_read(self) -> bool:
        """Whether a target rank may be reading from here now."""
        return any(not handoff.is_read for handoff in self._handoffs.values())

    # -- commands of the own main thread -----------------------------------------------------------

    def announce(self, command: AnnounceBlocks) -> list[Action]:
        """Announce blocks to the target ranks; nothing, if the hand-off was closed before."""
        handoff = self._open(command)
        if handoff is None:
            return self._around.drop("announcement")
        if self._is_lost(handoff):
            return self._break(handoff, f"{handoff.target_pool_id} is gone")
        target = self._around.pools[handoff.target_pool_id]
        key = SegmentKey(
            source_rank=self._around.identity.rank,
            chunk=command.chunk,
            layer_start=command.layer_start,
            layer_end=command.layer_end,
        )
        assert key not in handoff.keys, f"{key} of {handoff.key} is announced twice"
        handoff.keys.add(key)
        actions: list[Action] = []
        for endpoint in target.ranks:
            if not shared_heads(self._around.layout, endpoint.layout):
                continue
            handoff.unread.setdefault(endpoint.rank, set()).add(key)
            part = _part_of(command, endpoint.cp_rank)
            message = Announce(
                *handoff.key,
                source_pool_id=self._around.identity.pool_id,
                source_epoch=self._around.epoch,
                target_epoch=handoff.target_epoch,
                segment=key,
                logical_blocks=part.logical_blocks,
                blocks=part.blocks,
                checksum=self._sum(part, endpoint.layout),
            )
            actions.append(Send(PeerName(target.pool_id, endpoint.rank), message))
        return actions

    def announced_all(self, command: AnnouncedAll) -> list[Action]:
        """Nothing more will be announced, perhaps nothing ever was."""
        handoff = self._open(command)
        if handoff is None:
            return self._around.drop("announcement")
        if self._is_lost(handoff):
            return self._break(handoff, f"{handoff.target_pool_id} is gone")
        self._advance(handoff, SourceEvent.ALL_ANNOUNCED)
        return self._finish_if_read(handoff)

    def _open(self, command: AnnounceBlocks | AnnouncedAll) -> SourceHandoff | None:
        key = command.key
        known = self._handoffs.get(key)
        if known is not None:
            return known if known.state is SourceState.ANNOUNCING else None
        if key in self._recently_ended:
            return None
        handoff = SourceHandoff(key, command.target_pool_id, command.target_epoch)
        self._handoffs[key] = handoff
        return handoff

    def _sum(self, command: AnnounceBlocks, target: KVLayout) -> int | None:
        self._num_announced += 1
        if self._policy == "off" or (self._policy == "sampled" and self._num_announced % SUM_EVERY):
            return None
        layers = range(command.layer_start, command.layer_end)
        block_ids = [ref.block_id for ref in command.blocks]
        return self._checksum(source_runs(self._around.layout, target, layers, block_ids))

    # -- messages of target ranks ------------------------------------------------------------------

    def on_read_done(self, sender: PeerName, message: ReadDone) -> list[Action]:
        """Confirm a segment if its blocks are still this rank's, and only then."""
        around = self._around
        handoff = self._handoffs.get(message.key)
        is_current = (
            message.source_epoch == around.epoch
            and around.epoch_of(message.target_pool_id) == message.target_epoch
            and sender == PeerName(message.target_pool_id, message.target_rank)
        )
        if not is_current:
            return around.drop("stale_epoch")
        # A repeated ReadDone of a hand-off that is complete. Its answer was yes, and an answer
        # never changes: the target may have lost the first one.
        is_ours = message.key in self._all_read
        was_unread = False
        if handoff is not None and handoff.target_pool_id == sender.pool_id:
            unread = handoff.unread.get(sender.rank)
            was_unread = unread is not None and message.segment in unread
            # A second ReadDone of the same segment gets the same answer.
            is_ours = handoff.is_going_on and unread is not None and message.segment in handoff.keys
            if unread is not None:
                unread.discard(message.segment)
        confirm = Confirm(
            message.request_id,
            message.attempt,
            source_epoch=message.source_epoch,
            target_epoch=message.target_epoch,
            segment=message.segment,
            valid=is_ours,
        )
        actions: list[Action] = [Send(sender, confirm)]
        if handoff is not None and was_unread:
            actions += self._finish_if_read(handoff)
        return actions

    def on_reads_ended(self, sender: PeerName, message: ReadsEnded) -> list[Action]:
        """A target rank has closed its side: it reads nothing of this hand-off any more."""
        if (
            sender != PeerName(message.target_pool_id, message.target_rank)
            or self._around.epoch_of(sender.pool_id) != message.target_epoch
        ):
            return self._around.drop("stale_epoch")
        handoff = self._handoffs.get(message.key)
        if handoff is None or handoff.target_pool_id != sender.pool_id:
            return []
        handoff.unread.pop(sender.rank, None)
        if handoff.state is SourceState.CLOSING:
            return self._finish_if_read(handoff)
        return self._break(handoff, "the target has closed it")

    def on_close(self, message: Close) -> list[Action]:
        """The leader ends a hand-off. ``Closed`` answers as soon as all its readers have ended."""
        key = message.key
        handoff = self._handoffs.get(key)
        if handoff is None:
            # Its announcements may still be on their way from the main thread and must not
            # open it.
            self._recently_ended.add(key)
            return [self._closed(key)]
        if handoff.state is not SourceState.CLOSING:
            self._advance(handoff, SourceEvent.CLOSE)
        return self._finish_if_read(handoff)

    # -- time and membership -----------------------------------------------------------------------

    def on_pools_changed(self) -> list[Action]:
        """A pool that is gone reads nothing any more, and nothing can be committed to it."""
        actions: list[Action] = []
        for handoff in list(self._handoffs.values()):
            if not self._is_lost(handoff):
                continue
            handoff.unread.clear()
            if handoff.state is SourceState.CLOSING:
                actions += self._finish_if_read(handoff)
            else:
                actions += self._break(handoff, f"{handoff.target_pool_id} is gone")
        return actions

    def tick(self, now: float) -> list[Action]:
        """Let leases run out."""
        actions: list[Action] = []
        for handoff in list(self._handoffs.values()):
            if handoff.state is not SourceState.CLOSING:
                continue
            if handoff.closing_since is None:
                handoff.closing_since = now
            if now - handoff.closing_since > self._lease_s:
                self._around.counters["leases_expired"] += 1
                silent = sorted(rank for rank, unread in handoff.unread.items() if unread)
                handoff.unread.clear()
                text = f"{handoff.target_pool_id} ranks {silent} may still be reading {handoff.key}"
                actions += [Warn(f"lease expired: {text}"), *self._finish_if_read(handoff)]
        return actions

    # -- small things ------------------------------------------------------------------------------

    def _finish_if_read(self, handoff: SourceHandoff) -> list[Action]:
        if not handoff.is_read or handoff.state in (SourceState.ANNOUNCING, SourceState.BROKEN):
            return []
        if handoff.state is SourceState.DRAINING:
            self._advance(handoff, SourceEvent.ALL_READ)
            self._all_read.add(handoff.key)
            keys = tuple(sorted(handoff.keys, key=_order))
            done = SourceDone(*handoff.key, rank=self._around.identity.rank, keys=keys)
            actions: list[Action] = [Send(self._around.leader, done)]
        else:
            self._advance(handoff, SourceEvent.READS_ENDED)
            actions = [self._closed(handoff.key)]
        del self._handoffs[handoff.key]
        self._recently_ended.add(handoff.key)
        return actions

    def _is_lost(self, handoff: SourceHandoff) -> bool:
        return self._around.epoch_of(handoff.target_pool_id) != handoff.target_epoch

    def _break(self, handoff: SourceHandoff, reason: str) -> list[Action]:
        if not handoff.is_going_on:
            return []
        self._advance(handoff, SourceEvent.BREAK)
        failed = HandoffFailed(
            *handoff.key, rank=self._around.identity.rank, reason=reason, side="source"
        )
        return [Send(self._around.leader, failed)]

    def _closed(self, key: RequestKey) -> Send:
        return Send(
            self._around.leader, Closed(*key, rank=self._around.identity.rank, side="source")
        )

    @staticmethod
    def _advance(handoff: SourceHandoff, event: SourceEvent) -> None:
        handoff.state = advance(SOURCE_TABLE, handoff.state, event, of=handoff.key[0])


def _part_of(command: AnnounceBlocks, cp_rank: int) -> AnnounceBlocks:
    """The blocks of an announcement that lie on that cp rank of the target.

    Perhaps none, which is announced as well, so that a manifest is the same for every target rank.
    """
    if not command.owners:
        return command
    blocks = zip(command.logical_blocks, command.blocks, command.owners, strict=True)
    mine = [(logical, ref) for logical, ref, owner in blocks if owner == cp_rank]
    return replace(
        command,
        logical_blocks=tuple(logical for logical, _ in mine),
        blocks=tuple(ref for _, ref in mine),
        owners=(),
    )


def _order(key: SegmentKey) -> tuple[int, int, int]:
    return key.chunk, key.layer_start, key.source_rank
