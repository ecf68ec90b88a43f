"""A rank's part in every hand-off, decided and carried out. Without clock, socket, thread or torch.

1. A command of the own main thread, a message of another rank, the end of a read, a change of the
   pools or the passing of time goes to the side of the hand-off that it is for (source.py,
   target.py, leader.py or fetch.py of kvtransfer/handoff, all pure), which answers with actions.
2. The actions are carried out in order, through three *ports*: ``send`` a message to another rank,
   ``read`` bytes from one, ``emit`` an event to the main thread.
3. Messages of this rank to itself are taken in as soon as all those actions are done.

A process, the simulations, the exhaustive search and the tests differ in their ports alone.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvtransfer.events import (
    AnnounceBlocks,
    AnnouncedAll,
    CloseSource,
    CloseTarget,
    Command,
    CommitWhenRead,
    Event,
    OpenTargetBlocks,
)
from kvtransfer.handoff.actions import Action, Emit, RankState, Send, StartRead, Warn
from kvtransfer.handoff.fetch import Fetches
from kvtransfer.handoff.leader import LeaderSide
from kvtransfer.handoff.source import SourceSide
from kvtransfer.handoff.target import TargetSide
from kvtransfer.identity import PeerName, RankIdentity
from kvtransfer.plan import ByteRun
from protocol.handoff import (
    Announce,
    Close,
    Closed,
    Commit,
    Confirm,
    Fetch,
    FetchRefused,
    HandoffFailed,
    HandoffMessage,
    OpenTarget,
    ReadDone,
    ReadsEnded,
    Serve,
    SourceDone,
    TargetOpened,
    TargetReady,
)
from protocol.kv import KVLayout, PoolEndpoint

FromOwnRank = TargetOpened | SourceDone | TargetReady | HandoffFailed | Closed

_log = logging.getLogger(__name__)


class RankPorts(Protocol):
    """The ways out of a rank node. No port calls the node back."""

    def send(self, peer: PeerName, message: HandoffMessage) -> None:
        """Send a message to another rank; a peer that is unknown, or gone, gets nothing."""
        ...

    def read(self, read: StartRead) -> bool | None:
        """Post a read.

        Returns:
            True if all of it has landed already, False if it has failed or could not be posted.
            None while it is in flight; ``RankNode.read_ended`` gets its end.
        """
        ...

    def emit(self, event: Event) -> None:
        """Give an event to the main thread."""
        ...


class Checksums(Protocol):
    """Sums over a rank's KV memory."""

    def source_checksum(self, runs: Sequence[ByteRun]) -> int:
        """The sum of the bytes that a target is to read here."""
        ...

    def target_checksum(self, runs: Sequence[ByteRun]) -> int:
        """The sum of the bytes that were read into here."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffPolicy:
    """How a rank does its hand-offs."""

    transport_name: str  # for the statistics
    checksum: str  # "off", "sampled" or "always"
    lease_s: float  # how long a closing source waits for a silent reader
    max_reads: int  # in flight at one time


class RankNode:
    """One rank's hand-offs, as source, as target and as leader.

    Args:
        identity: of this rank.
        layout: of its KV memory.
        memory: sums runs of bytes there.
        ports: to everything around it.
        policy: how hand-offs are done.
    """

    def __init__(
        self,
        identity: RankIdentity,
        layout: KVLayout,
        memory: Checksums,
        ports: RankPorts,
        policy: HandoffPolicy,
    ) -> None:
        self.around = around = RankState(identity, layout)
        self.source = SourceSide(around, memory.source_checksum, policy.checksum, policy.lease_s)
        self.target = TargetSide(
            around, memory.target_checksum, policy.transport_name, policy.max_reads
        )
        self.leader = LeaderSide(around)
        self.fetches = Fetches(around, self.source, self.leader)
        self._ports = ports

    @property
    def identity(self) -> RankIdentity:
        return self.around.identity

    @property
    def counters(self) -> Counter[str]:
        """What was dropped, expired or broken, for the heartbeat."""
        return self.around.counters

    @property
    def num_open(self) -> int:
        """Hand-offs that are not over, on any side."""
        return self.source.num_open + self.target.num_open + self.leader.num_open

    @property
    def is_being_read(self) -> bool:
        """Whether another rank may be reading from here now, so that UCX must be polled often."""
        return self.source.is_being_read

    # -- what comes in -----------------------------------------------------------------------------

    def welcomed(self, epoch: int) -> None:
        """The coordinator has given this rank's pool an epoch."""
        self.around.epoch = epoch

    def pools_changed(self, pools: Sequence[PoolEndpoint], now: float) -> None:
        """These pools, and no others, are there from now on."""
        self.around.pools = {pool.pool_id: pool for pool in pools}
        self._do([*self.source.on_pools_changed(), *self.target.on_pools_changed()], now)

    def command(self, command: Command, now: float) -> None:
        """Take in a command of the own main thread."""
        self._do(self._on_command(command, now), now)

    def message(self, sender: PeerName, message: HandoffMessage, now: float) -> None:
        """Take in a message of another rank. One that it may not send is dropped and counted."""
        self._do(self._on_message(sender, message, now), now)

    def read_ended(self, read_id: int, now: float, *, is_done: bool) -> None:
        """A read that was in flight has ended; nothing of it lands any more."""
        self._do(self.target.on_read_ended(read_id, now, is_done=is_done), now)

    def tick(self, now: float) -> None:
        """Let time pass: call it often, for what ends by time alone."""
        self._do(self.source.tick(now), now)

    # -- to the side that it is for ----------------------------------------------------------------

    def _on_command(self, command: Command, now: float) -> list[Action]:
        match command:
            case AnnounceBlocks():
                return self.source.announce(command)
            case AnnouncedAll():
                return self.source.announced_all(command)
            case CommitWhenRead():
                return self.leader.commit_when_read(command, now)
            case CloseSource():
                return self.leader.close_source(command)
            case OpenTargetBlocks():
                return self.leader.open_target(command)
            case CloseTarget():
                return self.leader.close_target(command)
            case Fetch() | Serve() | FetchRefused():
                return self.fetches.command(command, now)
            case _:
                raise AssertionError(f"not a hand-off's command: {command}")

    def _on_message(self, sender: PeerName, message: HandoffMessage, now: float) -> list[Action]:
        match message:
            case Announce():
                return self.target.on_announce(sender, message, now)
            case Confirm():
                return self.target.on_confirm(sender, message, now)
            case Commit():
                return self.target.on_commit(sender, message, now)
            case ReadDone():
                return self.source.on_read_done(sender, message)
            case ReadsEnded():
                return self.source.on_reads_ended(sender, message)
            case OpenTarget() | Close():
                if sender != self.around.leader:
                    return self.around.drop("not_our_leader")
                if isinstance(message, OpenTarget):
                    return self.target.on_open(message)
                side = self.source if message.side == "source" else self.target
                return side.on_close(message)
            case Fetch() | FetchRefused() | Serve():
                return self.fetches.message(sender, message)
            case _:
                return self._on_own_rank(sender, message, now)

    def _on_own_rank(self, sender: PeerName, message: FromOwnRank, now: float) -> list[Action]:
        if sender != PeerName(self.identity.pool_id, message.rank):
            return self.around.drop("not_our_rank")
        match message:
            case TargetOpened():
                return self.leader.on_target_opened(message)
            case TargetReady():
                return self.leader.on_target_ready(message)
            case SourceDone():
                return self.leader.on_source_done(message, now)
            case HandoffFailed():
                return self.leader.on_failed(message)
            case Closed():
                return self.leader.on_closed(message)

    # -- what goes out -----------------------------------------------------------------------------

    def _do(self, actions: Iterable[Action], now: float) -> None:
        pending = deque(actions)
        # Not taken in before ``pending`` is empty: the sides expect the actions of one input to be
        # done before the next input comes.
        to_self = deque[HandoffMessage]()
        me = self.identity.name
        while pending or to_self:
            if not pending:
                pending += self._on_message(me, to_self.popleft(), now)
                continue
            match pending.popleft():
                case Send(peer, message) if peer == me:
                    to_self.append(message)
                case Send(peer, message):
                    self._ports.send(peer, message)
                case Emit(event):
                    self._ports.emit(event)
                case StartRead() as read:
                    is_done = self._ports.read(read)
                    if is_done is not None:
                        pending += self.target.on_read_ended(read.read_id, now, is_done=is_done)
                case Warn(text):
                    _log.warning("%s", text)
