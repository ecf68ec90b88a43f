"""The target side of hand-offs on one rank. Pure.

1. ``OpenTarget`` from the own leader names the blocks to read into; ``TargetOpened`` answers.
2. ``Announce`` from a source rank names logical blocks. They are read into the blocks that the *own
   leader* named for them, a few reads at one time, the rest in the order of arrival.
3. When a read has ended, its checksum is compared, and ``ReadDone`` asks the source whether the
   blocks were still its own.
4. Confirmed segments are held. When they are exactly the manifest of ``Commit``, and every layer
   and head of every block of the prompt is among them, ``TargetReady`` goes to the leader.
5. A failed read, a wrong checksum, a refusal, a surplus segment or a source that is gone breaks the
   hand-off: ``HandoffFailed``, and nothing more is read.
6. ``Close`` waits for the reads in flight. Then ``ReadsEnded`` goes to every source that has
   announced, and ``Closed`` to the leader, with the number of leading blocks that are whole
   (target_handoff.py). A later announcement is answered by ReadsEnded at once.
"""

from collections import deque
from collections.abc import Callable, Sequence

from kvtransfer.handoff.actions import Action, RankState, Send, StartRead
from kvtransfer.handoff.recently_ended import RecentlyEnded
from kvtransfer.handoff.states import TARGET_TABLE, TargetEvent, TargetState
from kvtransfer.handoff.target_handoff import Read, TargetHandoff, layer_head_bits
from kvtransfer.identity import PeerName
from kvtransfer.plan import ByteRun, plan, shared_heads
from protocol.errors import PeerError
from protocol.handoff import (
    Announce,
    Close,
    Closed,
    Commit,
    Confirm,
    HandoffFailed,
    OpenTarget,
    ReadDone,
    ReadsEnded,
    TargetOpened,
    TargetReady,
)
from protocol.request import RequestKey
from protocol.transitions import advance


class TargetSide:
    """All hand-offs that this rank is a target of.

    Args:
        around: this rank's identity, epoch and peers.
        checksum: the sum of runs in the own pool.
        transport_name: for the statistics.
        max_reads: in flight at one time.
    """

    def __init__(
        self,
        around: RankState,
        checksum: Callable[[Sequence[ByteRun]], int],
        transport_name: str,
        max_reads: int,
    ) -> None:
        self._around = around
        self._checksum = checksum
        self._transport_name = transport_name
        self._max_reads = max_reads
        self._handoffs: dict[RequestKey, TargetHandoff] = {}
        self._recently_ended = RecentlyEnded()
        self._waiting: deque[Read] = deque()
        self._reads: dict[int, Read] = {}  # in flight
        self._num_reads = 0

    @property
    def num_open(self) -> int:
        return len(self._handoffs)

    # -- messages ----------------------------------------------------------------------------------

    def on_open(self, message: OpenTarget) -> list[Action]:
        """The own leader opens a hand-off into these blocks."""
        key = message.key
        if key in self._recently_ended or message.target_epoch != self._around.epoch:
            return self._around.drop("stale_open")
        owners = enumerate(message.owners, message.first_logical)
        cp_rank = self._around.identity.cp_rank
        elsewhere = frozenset(logical for logical, owner in owners if owner != cp_rank)
        handoff = TargetHandoff(key, message.first_logical, message.blocks, elsewhere)
        self._handoffs.setdefault(key, handoff)
        return [Send(self._around.leader, TargetOpened(*key, rank=self._around.identity.rank))]

    def on_announce(self, sender: PeerName, message: Announce, now: float) -> list[Action]:
        """Read a segment, now or as soon as other reads have ended."""
        if not self._is_current(sender, message.source_pool_id, message.source_epoch, message):
            return self._around.drop("stale_epoch")
        key = message.key
        handoff = self._handoffs.get(key)
        if handoff is None:
            if key not in self._recently_ended:
                return self._around.drop("unknown_handoff")
            # The hand-off was closed while the announcement was on its way. Without an answer the
            # source would keep its blocks, waiting for a read that never comes.
            return [self._reads_ended(key, sender)]
        if not self._is_from_its_source(handoff, message):
            self._around.drop("second_source")
            return [self._reads_ended(key, sender)]
        handoff.sources.add(sender)
        if not handoff.is_going_on:
            return []
        known = handoff.announced.get(message.segment)
        if known == message:
            return self._around.drop("duplicate")
        if known is not None:
            return self._doubt(handoff, f"{message.segment} was announced in two ways")
        read = self._plan(handoff, sender, message)
        if isinstance(read, str):
            return self._doubt(handoff, read)
        handoff.announced[message.segment] = message
        for logical in message.logical_blocks:
            handoff.layer_heads[logical] += read.layer_heads
        self._waiting.append(read)
        return self._start_reads(now)

    def on_read_ended(self, read_id: int, now: float, *, is_done: bool) -> list[Action]:
        """A read has ended: nothing of it lands any more."""
        read = self._reads.pop(read_id)
        handoff = self._handoffs[read.key]
        handoff.end_read(now)
        return [*self._take_in(handoff, read, now, is_done=is_done), *self._start_reads(now)]

    def _take_in(
        self, handoff: TargetHandoff, read: Read, now: float, *, is_done: bool
    ) -> list[Action]:
        """Ask the source about a segment that is here, unless the hand-off is closing or broken."""
        if not handoff.is_going_on:
            self._around.counters["reads_landed_late"] += is_done
            return self._finish_if_quiet(handoff) if handoff.state is TargetState.CLOSING else []
        announce = read.announce
        if not is_done:
            return self._break(handoff, f"the read of {announce.segment} failed")
        if announce.checksum is not None and self._checksum(read.runs) != announce.checksum:
            self._around.counters["checksum_mismatches"] += 1
            return self._doubt(handoff, f"the bytes of {announce.segment} do not add up")
        for layer in range(announce.segment.layer_start, announce.segment.layer_end):
            handoff.layer_landed[layer] = now
        handoff.asked[announce.segment] = read.bits
        identity = self._around.identity
        done = ReadDone(
            *read.key,
            target_pool_id=identity.pool_id,
            target_rank=identity.rank,
            target_epoch=self._around.epoch,
            source_epoch=announce.source_epoch,
            segment=announce.segment,
        )
        return [Send(read.source, done)]

    def on_confirm(self, sender: PeerName, message: Confirm, now: float) -> list[Action]:
        """The source's answer: its blocks were still its own when they had been read, or not."""
        if not self._is_current(sender, sender.pool_id, message.source_epoch, message):
            return self._around.drop("stale_epoch")
        handoff = self._handoffs.get(message.key)
        if handoff is None:
            return self._around.drop("late_confirm")
        if (
            handoff.source_pool != (sender.pool_id, message.source_epoch)
            or message.segment.source_rank != sender.rank
            or message.segment not in handoff.asked
            or message.segment in handoff.held
        ):
            return self._around.drop("unasked_confirm")
        if not message.valid:
            return self._break(handoff, f"{message.segment} was given up by its source")
        handoff.hold(message.segment)
        return self._finish_if_complete(handoff, now)

    def on_commit(self, sender: PeerName, message: Commit, now: float) -> list[Action]:
        """The source's leader names the exact set of segments that has to be here."""
        if not self._is_current(sender, message.source_pool_id, message.source_epoch, message):
            return self._around.drop("stale_epoch")
        handoff = self._handoffs.get(message.key)
        if handoff is None or handoff.state is not TargetState.OPEN:
            return self._around.drop("late_commit")
        if sender.rank != 0 or not self._is_from_its_source(handoff, message):
            return self._around.drop("second_source")
        self._advance(handoff, TargetEvent.MANIFEST)
        handoff.commit = message
        handoff.prefill_ended = now - message.prefill_age_s
        return self._finish_if_complete(handoff, now)

    def on_close(self, message: Close) -> list[Action]:
        """The leader ends a hand-off. ``Closed`` answers as soon as all its reads have ended."""
        key = message.key
        handoff = self._handoffs.get(key)
        if handoff is None:
            self._recently_ended.add(key)
            return [self._closed(key)]
        if handoff.state is TargetState.CLOSING:
            return []
        self._advance(handoff, TargetEvent.CLOSE)
        self._waiting = deque(read for read in self._waiting if read.key != key)
        return self._finish_if_quiet(handoff)

    # -- reads -------------------------------------------------------------------------------------

    def _plan(self, handoff: TargetHandoff, sender: PeerName, message: Announce) -> Read | str:
        """The read of a segment, or why it cannot be read."""
        endpoint = self._around.endpoint(sender)
        assert endpoint is not None, "the sender's epoch is known"
        if len(message.logical_blocks) != len(message.blocks) or message.segment.source_rank != (
            sender.rank
        ):
            return f"{message.segment} is not what {sender} can announce"
        pairs: list[tuple[int, int]] = []
        for logical, ref in zip(message.logical_blocks, message.blocks, strict=True):
            block_id = handoff.block_id(logical)
            if block_id is None:
                return f"{message.segment} is of logical block {logical} that nobody asked for"
            pairs.append((ref.block_id, block_id))
        layers = range(message.segment.layer_start, message.segment.layer_end)
        try:
            runs = plan(endpoint.layout, self._around.layout, layers, pairs)
        except PeerError as error:
            return str(error)
        heads = shared_heads(endpoint.layout, self._around.layout)
        return Read(
            key=handoff.key,
            source=sender,
            incarnation=endpoint.incarnation,
            announce=message,
            runs=tuple(runs),
            layer_heads=len(layers) * len(heads),
            bits=layer_head_bits(self._around.layout, layers, heads),
        )

    def _start_reads(self, now: float) -> list[Action]:
        actions: list[Action] = []
        while self._waiting and len(self._reads) < self._max_reads:
            read = self._waiting.popleft()
            handoff = self._handoffs[read.key]
            handoff.begin_read(read, now)
            self._num_reads += 1
            self._reads[self._num_reads] = read
            actions.append(
                StartRead(read_id=self._num_reads, incarnation=read.incarnation, runs=read.runs)
            )
        return actions

    # -- the end -----------------------------------------------------------------------------------

    def _finish_if_complete(self, handoff: TargetHandoff, now: float) -> list[Action]:
        commit = handoff.commit
        if commit is None or handoff.state is not TargetState.MANIFESTED:
            return []
        pool = self._around.pools[commit.source_pool_id]
        mine = {
            key
            for key in commit.manifest
            if 0 <= key.source_rank < len(pool.ranks)
            and shared_heads(pool.ranks[key.source_rank].layout, self._around.layout)
        }
        surplus = handoff.announced.keys() - mine
        if surplus:
            return self._doubt(handoff, f"{next(iter(surplus))} is not in the manifest")
        if handoff.held != mine:
            return []
        # The manifest is what the source believes. What this prompt needs is known here too, so a
        # source that forgot a block is found out.
        layout = self._around.layout
        needed = range(handoff.first_logical, -(-commit.num_tokens // layout.block_size))
        missing = handoff.not_whole(needed, layout)
        if missing is not None:
            return self._doubt(handoff, f"logical block {missing} is not whole")
        self._advance(handoff, TargetEvent.COMPLETE)
        self._forget(handoff)
        ready = TargetReady(
            *handoff.key,
            rank=self._around.identity.rank,
            num_tokens=commit.num_tokens,
            first_token_id=commit.first_token_id,
            stats=handoff.stats(self._transport_name, layout, now),
        )
        return [Send(self._around.leader, ready)]

    def _finish_if_quiet(self, handoff: TargetHandoff) -> list[Action]:
        if handoff.num_in_flight:
            return []
        self._advance(handoff, TargetEvent.QUIET)
        self._forget(handoff)
        sources = sorted(handoff.sources)  # a set's order differs from process to process
        ended: list[Action] = [self._reads_ended(handoff.key, source) for source in sources]
        return [*ended, self._closed(handoff.key, handoff.num_whole_blocks(self._around.layout))]

    def _doubt(self, handoff: TargetHandoff, reason: str) -> list[Action]:
        """Break a hand-off in which something is wrong: none of its blocks may be used any more."""
        handoff.is_doubtful = True
        return self._break(handoff, reason)

    def _break(self, handoff: TargetHandoff, reason: str) -> list[Action]:
        """Break a hand-off that can never be whole. The leader will close it."""
        if not handoff.is_going_on:
            return []
        self._advance(handoff, TargetEvent.BREAK)
        self._waiting = deque(read for read in self._waiting if read.key != handoff.key)
        failed = HandoffFailed(
            *handoff.key, rank=self._around.identity.rank, reason=reason, side="target"
        )
        return [Send(self._around.leader, failed)]

    def on_pools_changed(self) -> list[Action]:
        """A source that is gone confirms nothing any more: break its hand-offs."""
        actions: list[Action] = []
        for handoff in list(self._handoffs.values()):
            if handoff.source_pool is not None:
                pool_id, epoch = handoff.source_pool
                if self._around.epoch_of(pool_id) != epoch:
                    actions += self._break(handoff, f"{pool_id} is gone")
        return actions

    # -- small things ------------------------------------------------------------------------------

    @staticmethod
    def _is_from_its_source(handoff: TargetHandoff, message: Announce | Commit) -> bool:
        """Segment keys name ranks of one pool, so the first pool that speaks is the only source."""
        source_pool = (message.source_pool_id, message.source_epoch)
        handoff.source_pool = handoff.source_pool or source_pool
        return handoff.source_pool == source_pool

    def _is_current(
        self, sender: PeerName, pool_id: str, epoch: int, message: Announce | Confirm | Commit
    ) -> bool:
        return (
            sender.pool_id == pool_id
            and self._around.epoch_of(pool_id) == epoch
            and message.target_epoch == self._around.epoch
        )

    def _forget(self, handoff: TargetHandoff) -> None:
        del self._handoffs[handoff.key]
        self._recently_ended.add(handoff.key)

    def _reads_ended(self, key: RequestKey, source: PeerName) -> Send:
        identity = self._around.identity
        ended = ReadsEnded(
            *key,
            target_pool_id=identity.pool_id,
            target_rank=identity.rank,
            target_epoch=self._around.epoch,
        )
        return Send(source, ended)

    def _closed(self, key: RequestKey, num_whole_blocks: int = 0) -> Send:
        closed = Closed(
            *key, rank=self._around.identity.rank, side="target", num_whole_blocks=num_whole_blocks
        )
        return Send(self._around.leader, closed)

    @staticmethod
    def _advance(handoff: TargetHandoff, event: TargetEvent) -> None:
        handoff.state = advance(TARGET_TABLE, handoff.state, event, of=handoff.key[0])
