"""A rank's part in every hand-off, carried out. Without clock, socket, thread or torch.

1. A command of the own main thread, a message of another rank, the end of a read, a change of the
   pools or the passing of time goes into the logic (kvtransfer/handoff/handoffs.py), which answers
   with actions.
2. The actions are carried out in order, through three *ports*: ``send`` a message to another rank,
   ``read`` bytes from one, ``emit`` an event to the main thread.
3. Messages of this rank to itself are taken in as soon as all those actions are done.

A process, the simulations, the exhaustive search and the tests differ in their ports alone.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from kvtransfer.events import Command, Event
from kvtransfer.handoff.actions import Action, Emit, RankState, Send, StartRead, Warn
from kvtransfer.handoff.handoffs import Checksums, HandoffPolicy, Handoffs
from kvtransfer.identity import PeerName, RankIdentity
from protocol.handoff import HandoffMessage
from protocol.kv import KVLayout, PoolEndpoint

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
        self.around = RankState(identity, layout)
        self.handoffs = Handoffs(self.around, memory, policy)
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
        return self.handoffs.num_open

    @property
    def is_being_read(self) -> bool:
        """Whether another rank may be reading from here now, so that UCX must be polled often."""
        return self.handoffs.is_being_read

    # -- what comes in -----------------------------------------------------------------------------

    def welcomed(self, epoch: int) -> None:
        """The coordinator has given this rank's pool an epoch."""
        self.around.epoch = epoch

    def pools_changed(self, pools: Sequence[PoolEndpoint], now: float) -> None:
        """These pools, and no others, are there from now on."""
        self._do(self.handoffs.pools_changed(pools), now)

    def command(self, command: Command, now: float) -> None:
        """Take in a command of the own main thread."""
        self._do(self.handoffs.command(command, now), now)

    def message(self, sender: PeerName, message: HandoffMessage, now: float) -> None:
        """Take in a message of another rank. One that it may not send is dropped and counted."""
        self._do(self.handoffs.message(sender, message, now), now)

    def read_ended(self, read_id: int, now: float, *, is_done: bool) -> None:
        """A read that was in flight has ended; nothing of it lands any more."""
        self._do(self.handoffs.read_ended(read_id, now, is_done=is_done), now)

    def tick(self, now: float) -> None:
        """Let time pass: call it often, for what ends by time alone."""
        self._do(self.handoffs.tick(now), now)

    # -- what goes out -----------------------------------------------------------------------------

    def _do(self, actions: Iterable[Action], now: float) -> None:
        pending = deque(actions)
        # Not taken in before ``pending`` is empty: the sides expect the actions of one input to be
        # done before the next input comes.
        to_self = deque[HandoffMessage]()
        me = self.identity.name
        while pending or to_self:
            if not pending:
                pending += self.handoffs.message(me, to_self.popleft(), now)
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
                        pending += self.handoffs.read_ended(read.read_id, now, is_done=is_done)
                case Warn(text):
                    _log.warning("%s", text)
