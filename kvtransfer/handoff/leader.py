"""The leader's part in hand-offs: one is open, ready, done or closed when *all* ranks are. Pure.

Source: ``CommitWhenRead`` comes from the leader node and ``SourceDone`` from every own rank, in any
order. What the ranks announced must be what the plan dealt; then ``Commit`` goes to every target
rank.
Target: ``TargetOpened``, then ``TargetReady`` comes from every own rank.
Either: ``Close`` goes to every own rank and ``Closed`` comes back from each. Blocks that are whole
on each rank of a target are whole.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from kvtransfer.events import (
    CloseSource,
    CloseTarget,
    CommitWhenRead,
    HandoffBroken,
    OpenTargetBlocks,
    SourceClosed,
    TargetClosed,
    TargetCommitted,
    TargetIsOpen,
)
from kvtransfer.handoff.actions import Action, Emit, RankState, Send
from kvtransfer.handoff.recently_ended import RecentlyEnded
from kvtransfer.identity import PeerName
from protocol.handoff import (
    Close,
    Closed,
    Commit,
    HandoffFailed,
    OpenTarget,
    SegmentKey,
    SourceDone,
    TargetOpened,
    TargetReady,
)
from protocol.request import RequestKey, TransferStats

SOURCE, TARGET = "source", "target"


@dataclass(slots=True)
class _Gathering:
    """What has come from the ranks for one side of one hand-off."""

    done: dict[int, SourceDone] = field(default_factory=dict)
    commit: CommitWhenRead | None = None
    commit_asked: float = 0.0
    opened: set[int] = field(default_factory=set)
    ready: dict[int, TargetReady] = field(default_factory=dict)
    is_closing: bool = False
    closed: dict[int, int] = field(default_factory=dict)  # by rank: leading whole blocks
    is_broken: bool = False


class LeaderSide:
    """The leader's view of its pool's hand-offs, as source and as target."""

    def __init__(self, around: RankState) -> None:
        self._around = around
        self._gatherings: dict[tuple[str, RequestKey], _Gathering] = {}
        self._committed = RecentlyEnded()  # as source
        self._over = {SOURCE: RecentlyEnded(), TARGET: RecentlyEnded()}
        self._world_size = around.identity.world_size

    @property
    def num_open(self) -> int:
        return len(self._gatherings)

    # -- source ------------------------------------------------------------------------------------

    def commit_when_read(self, command: CommitWhenRead, now: float) -> list[Action]:
        key = command.key
        if key in self._over[SOURCE]:
            return self._around.drop("late_commit")
        gathering = self._gather(SOURCE, key)
        if gathering.is_closing or gathering.commit is not None:
            return []
        gathering.commit = command
        gathering.commit_asked = now
        return self._commit_if_done(gathering, now)

    def on_source_done(self, message: SourceDone, now: float) -> list[Action]:
        key = message.key
        if key in self._over[SOURCE]:
            return self._around.drop("late_done")
        gathering = self._gather(SOURCE, key)
        gathering.done[message.rank] = message
        return self._commit_if_done(gathering, now)

    def _commit_if_done(self, gathering: _Gathering, now: float) -> list[Action]:
        command = gathering.commit
        if command is None or len(gathering.done) < self._world_size:
            return []
        if gathering.is_closing or gathering.is_broken:
            return []
        key = command.key
        announced = {segment for done in gathering.done.values() for segment in done.keys}
        if announced != set(command.manifest):
            return self._broken(SOURCE, key, "what was announced is not what was dealt")
        if self._around.epoch_of(command.target_pool_id) != command.target_epoch:
            return self._broken(SOURCE, key, f"{command.target_pool_id} is gone")
        self._end(SOURCE, key)
        self._committed.add(key)
        commit = Commit(
            *key,
            source_pool_id=self._around.identity.pool_id,
            source_epoch=self._around.epoch,
            target_epoch=command.target_epoch,
            manifest=tuple(sorted(announced, key=_order)),
            num_tokens=command.num_tokens,
            first_token_id=command.first_token_id,
            prefill_age_s=now - gathering.commit_asked,
        )
        ranks = self._around.pools[command.target_pool_id].ranks
        sends: list[Action] = [
            Send(PeerName(command.target_pool_id, endpoint.rank), commit) for endpoint in ranks
        ]
        return [*sends, Emit(SourceClosed(*key, committed=True))]

    def close_source(self, command: CloseSource) -> list[Action]:
        key = command.key
        if key in self._committed:
            return [Emit(SourceClosed(*key, committed=True))]
        return self._close(SOURCE, key)

    # -- target ------------------------------------------------------------------------------------

    def open_target(self, command: OpenTargetBlocks) -> list[Action]:
        key = command.key
        self._gather(TARGET, key)
        message = OpenTarget(
            *key,
            target_epoch=self._around.epoch,
            first_logical=command.first_logical,
            blocks=command.blocks,
            owners=command.owners,
        )
        return [Send(rank, message) for rank in self._around.own_ranks()]

    def on_target_opened(self, message: TargetOpened) -> list[Action]:
        key = message.key
        gathering = self._gatherings.get((TARGET, key))
        if gathering is None or message.rank in gathering.opened:
            return self._around.drop("late_opened")
        gathering.opened.add(message.rank)
        if len(gathering.opened) < self._world_size or gathering.is_closing:
            return []
        return [Emit(TargetIsOpen(*key))]

    def on_target_ready(self, message: TargetReady) -> list[Action]:
        key = message.key
        gathering = self._gatherings.get((TARGET, key))
        if gathering is None:
            return self._around.drop("late_ready")
        gathering.ready[message.rank] = message
        if len(gathering.ready) < self._world_size:
            return []
        if gathering.is_closing or gathering.is_broken:
            return []
        self._end(TARGET, key)
        stats = _sum(gathering.ready.values())
        committed = TargetCommitted(
            *key, num_tokens=message.num_tokens, first_token_id=message.first_token_id, stats=stats
        )
        return [Emit(committed)]

    def expects(self, key: RequestKey) -> bool:
        """Whether a hand-off into the own pool is open."""
        return (TARGET, key) in self._gatherings

    def close_target(self, command: CloseTarget) -> list[Action]:
        return self._close(TARGET, command.key)

    # -- both --------------------------------------------------------------------------------------

    def _close(self, side: str, key: RequestKey) -> list[Action]:
        gathering = self._gather(side, key)
        if gathering.is_closing:
            return []
        gathering.is_closing = True
        return [Send(rank, Close(*key, side=side)) for rank in self._around.own_ranks()]

    def on_closed(self, message: Closed) -> list[Action]:
        key = message.key
        gathering = self._gatherings.get((message.side, key))
        if gathering is None or not gathering.is_closing:
            return self._around.drop("late_closed")
        gathering.closed[message.rank] = message.num_whole_blocks
        if len(gathering.closed) < self._world_size:
            return []
        self._end(message.side, key)
        if message.side == SOURCE:
            return [Emit(SourceClosed(*key, committed=False))]
        return [Emit(TargetClosed(*key, num_whole_blocks=min(gathering.closed.values())))]

    def on_failed(self, message: HandoffFailed) -> list[Action]:
        key = message.key
        return self._broken(message.side, key, f"rank {message.rank}: {message.reason}")

    def _broken(self, side: str, key: RequestKey, reason: str) -> list[Action]:
        if key in self._over[side]:
            return self._around.drop("late_failure")
        gathering = self._gather(side, key)
        if gathering.is_broken or gathering.is_closing:
            return []
        gathering.is_broken = True
        self._around.counters["handoffs_broken"] += 1
        return [Emit(HandoffBroken(*key, side=side, reason=reason))]

    def _end(self, side: str, key: RequestKey) -> None:
        del self._gatherings[side, key]
        self._over[side].add(key)

    def _gather(self, side: str, key: RequestKey) -> _Gathering:
        return self._gatherings.setdefault((side, key), _Gathering())


def _sum(ready: Iterable[TargetReady]) -> TransferStats:
    stats = [message.stats for message in ready]
    return TransferStats(
        transport=stats[0].transport,
        num_bytes=sum(s.num_bytes for s in stats),
        num_segments=sum(s.num_segments for s in stats),
        num_descriptors=sum(s.num_descriptors for s in stats),
        num_layers_overlapped=min(s.num_layers_overlapped for s in stats),
        num_layers=stats[0].num_layers,
        read_s=max(s.read_s for s in stats),
        exposed_s=max(s.exposed_s for s in stats),
    )


def _order(key: SegmentKey) -> tuple[int, int, int]:
    return key.chunk, key.layer_start, key.source_rank
