"""The sockets between ranks' transfer threads: one that all others send to, one to each other rank.

A frame's sender is known by the routing id of its socket, which names pool, rank and incarnation;
who is not in the coordinator's topology is not listened to. A number behind it tells connections
apart: a ROUTER ignores a second one of the same name until it has seen the end of the first.
"""

import contextlib
import logging
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence

import zmq

from kvtransfer.identity import PeerName, RankIdentity
from protocol.codec import Codec
from protocol.errors import PeerError, VersionError
from protocol.handoff import HandoffMessage
from protocol.kv import PoolEndpoint
from protocol.sockets import Dealer, Router

_CODEC: Codec[HandoffMessage] = Codec(HandoffMessage)
_log = logging.getLogger(__name__)


def is_milestone(count: int) -> bool:
    """Whether to log what has happened ``count`` times: 1, 2, 4, 8... so no peer fills the log."""
    return count & (count - 1) == 0


class Peers:
    """Messages to and from other ranks. For the transfer thread alone.

    Args:
        context: the thread's ZMQ context.
        identity: who this rank is.
        listen: "ipc:///DIR" or "tcp://HOST".
        counters: counts what is dropped.
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
        self.router = Router(context, address)
        self._dealers: dict[str, Dealer] = {}  # by routing id
        self._num_lines = 0
        self._names: dict[str, PeerName] = {}  # routing id -> who that is
        self._routing_ids: dict[PeerName, str] = {}

    @property
    def address(self) -> str:
        return self.router.address

    def set_pools(self, pools: Sequence[PoolEndpoint]) -> None:
        """Reach exactly the ranks of ``pools``."""
        wanted = {
            f"{pool.pool_id}/{endpoint.rank}/{endpoint.incarnation}": (pool, endpoint)
            for pool in pools
            for endpoint in pool.ranks
        }
        wanted.pop(self._identity.routing_id, None)
        for gone in self._dealers.keys() - wanted.keys():
            self._dealers.pop(gone).close()
        for routing_id in wanted.keys() - self._dealers.keys():
            address = wanted[routing_id][1].address
            self._num_lines += 1
            name = f"{self._identity.routing_id}+{self._num_lines}"
            self._dealers[routing_id] = Dealer(self._context, address, name)
        self._names = {
            routing_id: PeerName(pool.pool_id, endpoint.rank)
            for routing_id, (pool, endpoint) in wanted.items()
        }
        self._routing_ids = {name: routing_id for routing_id, name in self._names.items()}

    def send(self, peer: PeerName, message: HandoffMessage) -> None:
        """Send without blocking; to a peer that is gone nothing can be said."""
        dealer = self._dealers.get(self._routing_ids.get(peer, ""))
        try:
            if dealer is None:
                raise PeerError(f"{peer} is not in the topology")
            dealer.send(_CODEC.encode(message))
        except PeerError as error:
            self._counters["dropped_unsendable"] += 1
            if is_milestone(self._counters["dropped_unsendable"]):
                _log.warning("%s not sent: %s", type(message).__name__, error)

    def receive(self) -> Iterator[tuple[PeerName, HandoffMessage]]:
        """Everything that has arrived."""
        while (received := self.router.receive()) is not None:
            routing_id, frame = received
            sender = self._names.get(routing_id.partition("+")[0])
            if sender is None:
                self._counters["dropped_unknown_sender"] += 1
                continue
            try:
                message = _CODEC.decode(frame)
            except VersionError as error:
                self._counters["dropped_undecodable"] += 1
                if is_milestone(self._counters["dropped_undecodable"]):
                    _log.warning("from %s: %s", routing_id, error)
                continue
            yield sender, message

    def close(self) -> None:
        with contextlib.suppress(zmq.ZMQError):
            for dealer in self._dealers.values():
                dealer.close()
            self.router.close()
