"""All hand-offs of one rank: passes each command and message to the side that handles it. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvtransfer.events import (
    AnnounceBlocks,
    AnnouncedAll,
    CloseSource,
    CloseTarget,
    Command,
    CommitWhenRead,
    OpenTargetBlocks,
)
from kvtransfer.handoff.actions import Action, RankState
from kvtransfer.handoff.fetch import Fetches
from kvtransfer.handoff.leader import LeaderSide
from kvtransfer.handoff.source import SourceSide
from kvtransfer.handoff.target import TargetSide
from kvtransfer.identity import PeerName
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
from protocol.kv import PoolEndpoint

FromRank = TargetOpened | SourceDone | TargetReady | HandoffFailed | Closed


class Checksums(Protocol):
    """A rank's KV memory, as far as hand-offs look into it."""

    def source_checksum(self, runs: Sequence[ByteRun]) -> int:
        """The sum of what a target is to read here."""
        ...

    def target_checksum(self, runs: Sequence[ByteRun]) -> int:
        """The sum of what was read into here."""
        ...


@dataclass(frozen=True, slots=True)
class HandoffPolicy:
    """How a rank does its hand-offs.

    ``transport_name`` is for the statistics. ``checksum`` is "off", "sampled" or "always".
    ``lease_s`` is how long a closing source waits for a silent reader, and ``max_reads`` how many
    reads are in flight at one time.
    """

    transport_name: str
    checksum: str
    lease_s: float
    max_reads: int


class Handoffs:
    """One rank's hand-offs, as source, as target and as leader.

    Args:
        around: this rank's identity, epoch and peers.
        memory: the rank's own.
        policy: how they are done.
    """

    def __init__(self, around: RankState, memory: Checksums, policy: HandoffPolicy) -> None:
        self.around = around
        self.source = SourceSide(around, memory.source_checksum, policy.checksum, policy.lease_s)
        self.target = TargetSide(
            around, memory.target_checksum, policy.transport_name, policy.max_reads
        )
        self.leader = LeaderSide(around)
        self.fetches = Fetches(around, self.source, self.leader)

    @property
    def num_open(self) -> int:
        """Hand-offs that are not over, on any side."""
        return self.source.num_open + self.target.num_open + self.leader.num_open

    @property
    def is_being_read(self) -> bool:
        """Whether another rank may be reading from here now, so that UCX must be polled often."""
        return self.source.is_being_read

    def command(self, command: Command, now: float) -> list[Action]:
        """A command of the own main thread."""
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

    def message(self, sender: PeerName, message: HandoffMessage, now: float) -> list[Action]:
        """A message of a rank, which is dropped if that rank may not send it."""
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
                return self._from_rank(sender, message, now)

    def _from_rank(self, sender: PeerName, message: FromRank, now: float) -> list[Action]:
        if sender != PeerName(self.around.identity.pool_id, message.rank):
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

    def read_ended(self, read_id: int, now: float, *, is_done: bool) -> list[Action]:
        """The transport has seen a read of this rank to its end."""
        return self.target.on_read_ended(read_id, now, is_done=is_done)

    def pools_changed(self, pools: Sequence[PoolEndpoint]) -> list[Action]:
        """These pools, and no others, can be reached from now on."""
        self.around.pools = {pool.pool_id: pool for pool in pools}
        return [*self.source.on_pools_changed(), *self.target.on_pools_changed()]

    def tick(self, now: float) -> list[Action]:
        """Let time pass: call it often, for what ends by time alone."""
        return self.source.tick(now)
