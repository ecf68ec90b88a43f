"""Hand-offs that their target asks for: a prefill pool fetches a prefix from a decode pool. Pure.

Target's leader: ``AskFetch``, once the target is open --> ``Fetch`` to the source's leader.
Source's leader: ``Fetch`` goes to its main thread, which answers
  ``Serve``, for every own rank, to be committed when all is read, or
  ``FetchRefused``, for the target's leader, to which the hand-off is broken.
Source's ranks: ``Serve`` --> their heads of all those blocks and layers, in one announcement.
"""

from kvtransfer.events import (
    AnnounceBlocks,
    AnnouncedAll,
    AskFetch,
    CommitWhenRead,
)
from kvtransfer.handoff.actions import Action, Emit, RankState, Send
from kvtransfer.handoff.leader import LeaderSide
from kvtransfer.handoff.source import SourceSide
from kvtransfer.identity import PeerName
from protocol.handoff import Fetch, FetchRefused, HandoffFailed, SegmentKey, Serve

_CHUNK = 0  # of the one segment of each rank
_NO_TOKEN = 0  # a prefix has no first token


class Fetches:
    """One rank's part in fetches, as the one who asks and as the one who is asked.

    Args:
        around: who and where this rank is.
        source: announces what is served.
        leader: commits it, or learns that it is refused.
    """

    def __init__(self, around: RankState, source: SourceSide, leader: LeaderSide) -> None:
        self._around = around
        self._source = source
        self._leader = leader

    def command(self, command: AskFetch | Serve | FetchRefused, now: float) -> list[Action]:
        """What the own main thread asks for."""
        match command:
            case AskFetch():
                return self._ask(command)
            case Serve():
                return self._serve(command, now)
            case FetchRefused():
                return [Send(PeerName(command.target_pool_id, 0), command)]

    def message(self, sender: PeerName, message: Fetch | FetchRefused | Serve) -> list[Action]:
        """What a leader says: another pool's, or with ``Serve`` the own one."""
        match message:
            case Fetch():
                return self._on_fetch(sender, message)
            case FetchRefused():
                return self._on_refused(sender, message)
            case Serve():
                return self._on_serve(sender, message)

    # -- the pool that misses blocks ---------------------------------------------------------------

    def _ask(self, command: AskFetch) -> list[Action]:
        key = (command.request_id, command.attempt)
        if self._around.epoch_of(command.source_pool_id) != command.source_epoch:
            reason = f"{command.source_pool_id} is gone"
            return self._leader.on_failed(HandoffFailed(*key, 0, reason, "target"))
        fetch = Fetch(
            *key,
            target_pool_id=self._around.identity.pool_id,
            target_epoch=self._around.epoch,
            source_epoch=command.source_epoch,
            first_logical=command.first_logical,
            owners=command.owners,
            block_hashes=command.block_hashes,
        )
        return [Send(PeerName(command.source_pool_id, 0), fetch)]

    def _on_refused(self, sender: PeerName, message: FetchRefused) -> list[Action]:
        around, key = self._around, (message.request_id, message.attempt)
        if (
            around.epoch_of(sender.pool_id) != message.source_epoch
            or message.target_epoch != around.epoch
            or sender.rank != 0
        ):
            return around.drop("stale_epoch")
        if not self._leader.expects(key):
            return around.drop("late_refusal")
        reason = f"{sender.pool_id} refused: {message.reason}"
        return self._leader.on_failed(HandoffFailed(*key, 0, reason, "target"))

    # -- the pool that has them --------------------------------------------------------------------

    def _on_fetch(self, sender: PeerName, message: Fetch) -> list[Action]:
        around = self._around
        if (
            sender != PeerName(message.target_pool_id, 0)
            or around.epoch_of(sender.pool_id) != message.target_epoch
            or message.source_epoch != around.epoch
            or not around.identity.is_leader
        ):
            return around.drop("stale_epoch")
        return [Emit(message)]

    def _serve(self, serve: Serve, now: float) -> list[Action]:
        key = (serve.request_id, serve.attempt)
        if serve.source_epoch != self._around.epoch:
            reason = "this pool has a new epoch since it was asked"
            return self._leader.on_failed(HandoffFailed(*key, 0, reason, "source"))
        layout = self._around.layout
        ranks = self._around.own_ranks()
        commit = CommitWhenRead(
            *key,
            target_pool_id=serve.target_pool_id,
            target_epoch=serve.target_epoch,
            manifest=tuple(SegmentKey(r.rank, _CHUNK, 0, layout.num_layers) for r in ranks),
            num_tokens=(serve.first_logical + len(serve.blocks)) * layout.block_size,
            first_token_id=_NO_TOKEN,
        )
        sends: list[Action] = [Send(rank, serve) for rank in ranks]
        return [*sends, *self._leader.commit_when_read(commit, now)]

    def _on_serve(self, sender: PeerName, message: Serve) -> list[Action]:
        around, key = self._around, (message.request_id, message.attempt)
        if sender != around.leader or message.source_epoch != around.epoch:
            return around.drop("not_our_leader")
        target_pool_id, target_epoch = message.target_pool_id, message.target_epoch
        first = message.first_logical
        announce = AnnounceBlocks(
            *key,
            target_pool_id=target_pool_id,
            target_epoch=target_epoch,
            chunk=_CHUNK,
            layer_start=0,
            layer_end=around.layout.num_layers,
            logical_blocks=tuple(range(first, first + len(message.blocks))),
            blocks=message.blocks,
            owners=message.owners,
        )
        all_of_it = AnnouncedAll(*key, target_pool_id, target_epoch)
        return [*self._source.announce(announce), *self._source.announced_all(all_of_it)]
