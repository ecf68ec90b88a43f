"""Hand-offs that their target asks for: a prefill pool fetches a prefix from a decode pool. Pure.

The same structs go between a rank's threads and between ranks (protocol/handoff.py):

1. target: the leader node asks with ``Fetch`` once its hand-off is open. It goes to the source's
   leader.
2. source: ``Fetch`` goes up to the leader node, which answers ``Serve``, or ``FetchRefused``. A
   refusal breaks the hand-off at the target.
3. source: ``Serve`` goes to every own rank, and the hand-off is committed when all is read.
4. Each own rank announces its heads of those blocks, all layers in one segment.
"""

import msgspec

from kvtransfer.events import AnnounceBlocks, AnnouncedAll, CommitWhenRead
from kvtransfer.handoff.actions import Action, Emit, RankState, Send
from kvtransfer.handoff.leader import LeaderSide
from kvtransfer.handoff.source import SourceSide
from kvtransfer.identity import PeerName
from protocol.handoff import Fetch, FetchRefused, HandoffFailed, SegmentKey, Serve

_CHUNK = 0  # of the one segment of each rank
_NO_TOKEN = 0  # a prefix has no first token


class Fetches:
    """One rank's part in fetches, as target and as source.

    Args:
        around: this rank's identity, epoch and peers.
        source: announces what is served.
        leader: commits it, or breaks the hand-off that is refused.
    """

    def __init__(self, around: RankState, source: SourceSide, leader: LeaderSide) -> None:
        self._around = around
        self._source = source
        self._leader = leader

    def command(self, command: Fetch | Serve | FetchRefused, now: float) -> list[Action]:
        """What the own main thread asks for."""
        match command:
            case Fetch():
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

    def _ask(self, fetch: Fetch) -> list[Action]:
        around = self._around
        if around.epoch_of(fetch.source_pool_id) != fetch.source_epoch:
            return self._broken(fetch, "target", f"{fetch.source_pool_id} is gone")
        # Epochs are the rank node's business: the leader node leaves these two fields empty.
        fetch = msgspec.structs.replace(
            fetch, target_pool_id=around.identity.pool_id, target_epoch=around.epoch
        )
        return [Send(PeerName(fetch.source_pool_id, 0), fetch)]

    def _on_refused(self, sender: PeerName, message: FetchRefused) -> list[Action]:
        around = self._around
        if (
            around.epoch_of(sender.pool_id) != message.source_epoch
            or message.target_epoch != around.epoch
            or sender.rank != 0
        ):
            return around.drop("stale_epoch")
        if not self._leader.expects(message.key):
            return around.drop("late_refusal")
        return self._broken(message, "target", f"{sender.pool_id} refused: {message.reason}")

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
        if serve.source_epoch != self._around.epoch:
            return self._broken(serve, "source", "this pool has a new epoch since it was asked")
        layout = self._around.layout
        ranks = self._around.own_ranks()
        commit = CommitWhenRead(
            *serve.key,
            target_pool_id=serve.target_pool_id,
            target_epoch=serve.target_epoch,
            manifest=tuple(_segment(peer.rank, layout.num_layers) for peer in ranks),
            num_tokens=(serve.first_logical + len(serve.blocks)) * layout.block_size,
            first_token_id=_NO_TOKEN,
        )
        sends: list[Action] = [Send(rank, serve) for rank in ranks]
        return [*sends, *self._leader.commit_when_read(commit, now)]

    def _on_serve(self, sender: PeerName, message: Serve) -> list[Action]:
        around = self._around
        if sender != around.leader or message.source_epoch != around.epoch:
            return around.drop("not_our_leader")
        first = message.first_logical
        announce = AnnounceBlocks(
            *message.key,
            target_pool_id=message.target_pool_id,
            target_epoch=message.target_epoch,
            chunk=_CHUNK,
            layer_start=0,
            layer_end=around.layout.num_layers,
            logical_blocks=tuple(range(first, first + len(message.blocks))),
            blocks=message.blocks,
            owners=message.owners,
        )
        nothing_more = AnnouncedAll(
            *message.key,
            target_pool_id=message.target_pool_id,
            target_epoch=message.target_epoch,
        )
        return [*self._source.announce(announce), *self._source.announced_all(nothing_more)]

    def _broken(self, of: Fetch | FetchRefused | Serve, side: str, reason: str) -> list[Action]:
        failed = HandoffFailed(*of.key, rank=0, reason=reason, side=side)
        return self._leader.on_failed(failed)


def _segment(rank: int, num_layers: int) -> SegmentKey:
    return SegmentKey(source_rank=rank, chunk=_CHUNK, layer_start=0, layer_end=num_layers)
