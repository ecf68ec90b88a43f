"""Messages between ranks' transfer threads: each arrives exactly once, and in order.

Every rank has one socket that all others send to, and one to each other rank. What is lost with a
connection is sent again on the next one (delivery.py, pure), for as long as both processes live and
know each other:

- A frame's sender is known by the routing id of its socket, SENDER+STREAM+RECEIVER: pool, rank and
  incarnation of the sender, the number of the stream, the incarnation of the receiver. Frames of a
  sender that is not in the coordinator's topology, or that are for another receiver, are dropped.
- A peer that leaves the topology is forgotten, with all that was kept for it. If it comes back as
  the same process, it gets a new stream, which starts anew at both ends. Of its own stream we still
  know how far we got: it may not have noticed that we were gone.
- A peer of another pool that acknowledges nothing for half a minute is given up: what was kept for
  it is dropped, and a new stream starts. The coordinator decides whether it lives, and hand-offs
  have budgets of their own. What comes through later finds a stream without a gap.
- libzmq's threads probe each peer every second. A pool of which a rank has not answered for some
  seconds is *cut off*: the coordinator is told, and has other pools work together until the
  connection is back, which libzmq goes on trying by itself.
- In a gang there is no such budget, because a lost message would never be sent again, and ranks
  that do not reach each other are no gang any more. A silent rank of the own pool ends the gang.
"""

import contextlib
import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import zmq

from kvtransfer.identity import PeerName, RankIdentity
from kvtransfer.links.delivery import Inbox, Outbox
from protocol.codec import Codec
from protocol.errors import PeerError, VersionError
from protocol.frames import Acknowledgement, Frame, Numbered
from protocol.handoff import HandoffMessage
from protocol.kv import PoolEndpoint
from protocol.sockets import Dealer, Pulse, Router

MAX_GONE = 1_000  # incarnations of which we still know how far we got
PULSE = Pulse(interval_s=1.0, timeout_s=2.5)
RETURN_S = 1.0  # for a connection that has broken to come back, or a new one to stand
LOOK_INTERVAL_S = 0.25

_CODEC: Codec[Frame] = Codec(Frame)
_log = logging.getLogger(__name__)


def is_milestone(count: int) -> bool:
    """Whether to log what has happened ``count`` times: 1, 2, 4, 8... so no peer fills the log."""
    return count & (count - 1) == 0


@dataclass(slots=True, eq=False)
class Link:
    """One peer, for as long as the stream to it lasts."""

    name: PeerName
    routing_id: str  # without the number of a stream
    dealer: Dealer
    stream: int
    inbox: Inbox[HandoffMessage]
    outbox: Outbox[HandoffMessage] = field(default_factory=Outbox)
    up_at: float | None = None  # when the connection stood last; None: not looked at yet

    def is_cut_off(self, now: float) -> bool:
        """Whether the connection has been down for longer than one needs to come back."""
        if self.dealer.is_up or self.up_at is None:
            self.up_at = now
        return now - self.up_at > RETURN_S

    @property
    def due_at(self) -> float:
        return min(self.outbox.due_at, self.inbox.due_at)


class Peers:
    """Messages to and from other ranks. For the transfer thread alone.

    Args:
        context: the thread's ZMQ context.
        identity: of this rank.
        listen: "ipc:///DIR" or "tcp://HOST".
        counters: counts what is dropped and what is sent again.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        identity: RankIdentity,
        listen: str,
        counters: Counter[str],
    ) -> None:
        self._context = context
        self._identity = identity
        self._counters = counters
        # Short: the path of a Unix socket ends at some hundred bytes.
        address = f"{listen}/{uuid.uuid4().hex[:12]}" if listen.startswith("ipc") else f"{listen}:*"
        # A peer that has seen the end of a connection before we have comes back under its name.
        self.router = Router(context, address, hands_over=True)
        self._num_streams = 0
        self._links: dict[str, Link] = {}  # by the peer's routing id
        self._by_name: dict[PeerName, Link] = {}
        self._inboxes: dict[str, Inbox[HandoffMessage]] = {}  # of peers that are gone, oldest first
        self._awake: dict[str, Link] = {}  # those with something to send again or to acknowledge
        self._look_at = 0.0
        self.cut_off: tuple[str, ...] = ()  # other pools, of which a rank does not answer

    @property
    def address(self) -> str:
        return self.router.address

    @property
    def due_at(self) -> float:
        """When :meth:`keep_up` has something to do; infinite while nothing is open."""
        return min((link.due_at for link in self._awake.values()), default=math.inf)

    def set_pools(self, pools: Sequence[PoolEndpoint]) -> None:
        """Reach exactly the ranks of ``pools``."""
        wanted = {
            f"{pool.pool_id}/{endpoint.rank}/{endpoint.incarnation}": (pool, endpoint)
            for pool in pools
            for endpoint in pool.ranks
        }
        wanted.pop(self._identity.routing_id, None)
        for gone in self._links.keys() - wanted.keys():
            self._forget(gone)
        for routing_id in wanted.keys() - self._links.keys():
            pool, endpoint = wanted[routing_id]
            self._links[routing_id] = self._open_link(
                PeerName(pool.pool_id, endpoint.rank),
                routing_id,
                endpoint.address,
                self._inboxes.pop(routing_id, Inbox(stream=0)),
            )
        self._by_name = {link.name: link for link in self._links.values()}

    def _open_link(
        self, name: PeerName, routing_id: str, address: str, inbox: Inbox[HandoffMessage]
    ) -> Link:
        self._num_streams += 1
        incarnation = routing_id.rpartition("/")[2]
        socket_id = f"{self._identity.routing_id}+{self._num_streams}+{incarnation}"
        dealer = Dealer(self._context, address, socket_id, PULSE)
        return Link(name, routing_id, dealer, self._num_streams, inbox)

    def _forget(self, routing_id: str) -> None:
        link = self._links.pop(routing_id)
        self._awake.pop(routing_id, None)
        link.dealer.close()
        link.inbox.rest()
        self._inboxes[routing_id] = link.inbox
        if len(self._inboxes) > MAX_GONE:
            del self._inboxes[next(iter(self._inboxes))]

    # -- sending -----------------------------------------------------------------------------------

    def send(self, peer: PeerName, message: HandoffMessage) -> None:
        """Send without blocking. A message to a peer that is gone is dropped, and counted.

        Raises:
            PeerError: a rank of the own pool has far too much to acknowledge.
        """
        link = self._by_name.get(peer)
        if link is None:
            self._counters["dropped_unsendable"] += 1
            if is_milestone(self._counters["dropped_unsendable"]):
                kind = type(message).__name__
                _log.warning("%s not sent: %s is not in the topology", kind, peer)
            return
        self._awake[link.routing_id] = link
        number = link.outbox.add(message, time.monotonic())
        self._transmit(link, self._numbered(link, number, message))
        if link.outbox.is_hopeless:
            self._give_up(link)

    def keep_up(self, now: float) -> None:
        """Send again what is overdue, and send acknowledgements that no message has carried.

        Raises:
            PeerError: a rank of the own pool no longer acknowledges anything.
        """
        for link in list(self._awake.values()):
            if link.due_at == math.inf:
                del self._awake[link.routing_id]
                continue
            for number, message in link.outbox.take_due(now):
                self._counters["messages_resent"] += 1
                self._transmit(link, self._numbered(link, number, message))
            if link.outbox.is_hopeless:
                self._give_up(link)
            elif link.inbox.due_at <= now:
                ack, held = link.inbox.acknowledgement()
                self._transmit(
                    link, Acknowledgement(ack_stream=link.inbox.stream, ack=ack, held=held)
                )

    def look(self, now: float) -> bool:
        """Look at the connections, if it is time to; whether :attr:`cut_off` has changed."""
        if now < self._look_at:
            return False
        # Too late: this process was stopped, and what connections have brought meanwhile is unread.
        is_late = now - self._look_at > RETURN_S
        self._look_at = now + LOOK_INTERVAL_S
        own = self._identity.pool_id
        others = [link for link in self._links.values() if link.name.pool_id != own]
        if is_late:
            for link in others:
                link.up_at = None
        before = self.cut_off
        self.cut_off = tuple(sorted({x.name.pool_id for x in others if x.is_cut_off(now)}))
        if self.cut_off != before:
            _log.warning("pools that are cut off: %s", ", ".join(self.cut_off) or "none any more")
        return self.cut_off != before

    def _numbered(self, link: Link, number: int, message: HandoffMessage) -> Numbered:
        ack, held = link.inbox.acknowledgement()
        return Numbered(number, message, ack_stream=link.inbox.stream, ack=ack, held=held)

    def _transmit(self, link: Link, frame: Frame) -> None:
        """Send a frame; if the socket takes none now, it is sent again when it is due."""
        try:
            link.dealer.send(_CODEC.encode(frame))
        except PeerError as error:
            self._counters["frames_not_taken"] += 1
            if is_milestone(self._counters["frames_not_taken"]):
                _log.warning("%s", error)

    def _give_up(self, link: Link) -> None:
        num_waiting = link.outbox.num_waiting
        what = f"{link.name} acknowledges nothing, {num_waiting} messages wait"
        if link.name.pool_id == self._identity.pool_id:
            raise PeerError(f"{what}: the gang's ranks do not reach each other")
        self._counters["peers_given_up"] += 1
        self._counters["dropped_unacknowledged"] += num_waiting
        _log.warning("%s: dropped, a new connection is tried", what)
        link.dealer.close()
        self._awake.pop(link.routing_id, None)
        fresh = self._open_link(link.name, link.routing_id, link.dealer.address, link.inbox)
        self._links[link.routing_id] = self._by_name[link.name] = fresh

    # -- receiving ---------------------------------------------------------------------------------

    def receive(self) -> Iterator[tuple[PeerName, HandoffMessage]]:
        """The messages that have arrived, of each peer in the order in which they were sent."""
        while (received := self.router.receive()) is not None:
            socket_id, data = received
            sender, _, rest = socket_id.partition("+")
            stream, _, receiver = rest.partition("+")
            link = self._links.get(sender)
            if link is None or receiver != self._identity.incarnation or not stream.isdecimal():
                self._counters["dropped_unknown_sender"] += 1
                continue
            try:
                frame = _CODEC.decode(data)
            except VersionError as error:
                self._counters["dropped_undecodable"] += 1
                if is_milestone(self._counters["dropped_undecodable"]):
                    _log.warning("from %s: %s", socket_id, error)
                continue
            for message in self._take(link, int(stream), frame):
                yield link.name, message

    def _take(self, link: Link, stream: int, frame: Frame) -> Sequence[HandoffMessage]:
        """Take in a frame; the messages that can be delivered now."""
        if frame.ack_stream == link.stream and not link.outbox.acknowledge(frame.ack, frame.held):
            self._counters["dropped_wrong_acknowledgement"] += 1
        if isinstance(frame, Acknowledgement):
            return ()
        if stream < link.inbox.stream:
            self._counters["dropped_old_stream"] += 1
            return ()
        if stream > link.inbox.stream:
            link.inbox = Inbox(stream)  # the sender has begun anew, and so must its numbers
        self._awake[link.routing_id] = link
        ready = link.inbox.take(frame.number, frame.message, time.monotonic())
        if ready is None:
            self._counters["dropped_repeated"] += 1
            return ()
        return ready

    def close(self) -> None:
        with contextlib.suppress(zmq.ZMQError):
            for link in self._links.values():
                link.dealer.close()
            self.router.close()
