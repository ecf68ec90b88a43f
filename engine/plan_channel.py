"""The gang channel: a pool's leader sends each step's plan, and its followers their results.

1. The leader binds a ROUTER; its address travels in ``Hello`` and ``Welcome``.
2. A follower connects and joins with its rank.
3. ``broadcast`` hands one plan to every follower. ``collect`` waits for every follower's result.
4. A follower that is silent past the deadline is a ``PeerError``: the gang shares one fate.

Used by the main threads alone: a plan never waits for the transfer thread.
"""

import time
from collections.abc import Callable

import msgspec
import zmq

from protocol.codec import Codec
from protocol.errors import PeerError, VersionError
from protocol.plans import Plan, StepResult
from protocol.sockets import Dealer, Poller, Router

CHECK_INTERVAL_S = 0.5


class Join(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """follower -> leader, first of all."""

    rank: int


_PLANS: Codec[Plan] = Codec(Plan)
_RESULTS: Codec[Join | StepResult] = Codec(Join | StepResult)


def _ignore() -> None:
    """The default of ``check``."""


class LeaderChannel:
    """The leader's end, of the main thread. With a ``world_size`` of 1 nothing is ever sent.

    Args:
        context: the process's ZMQ context.
        address: ``ipc://PATH`` or ``tcp://HOST:*``.
        world_size: ranks of the gang, the leader's included.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        *,
        world_size: int,
    ) -> None:
        self._router = Router(context, address)
        self._poller = Poller(self._router)
        self._followers = range(1, world_size)
        self._peers: dict[int, str] = {}  # rank -> routing id
        self._ranks: dict[str, int] = {}
        self._results: dict[int, StepResult] = {}

    @property
    def address(self) -> str:
        return self._router.address

    def wait_joined(self, timeout_s: float, check: Callable[[], None] = _ignore) -> None:
        """Block until every follower has joined; ``check`` is called twice a second and may raise.

        Raises:
            PeerError: one has not within ``timeout_s``.
        """
        self._wait(lambda: len(self._peers) == len(self._followers), timeout_s, check)
        missing = [rank for rank in self._followers if rank not in self._peers]
        if missing:
            raise PeerError(f"ranks {missing} have not joined the gang after {timeout_s:.0f} s")

    def broadcast(self, plan: Plan) -> None:
        """Send ``plan`` to every follower. Does not block.

        Raises:
            PeerError: a follower is gone.
        """
        self._results.clear()
        frame = _PLANS.encode(plan)
        for peer in self._peers.values():
            self._router.send(peer, frame)

    def collect(
        self, step: int, timeout_s: float, check: Callable[[], None] = _ignore
    ) -> list[StepResult]:
        """Every follower's result of ``step``, by rank; blocks until all are there.

        Raises:
            PeerError: one has not answered within ``timeout_s``.
        """

        def missing() -> list[int]:
            results = self._results
            return [r for r in self._followers if r not in results or results[r].step != step]

        self._wait(lambda: not missing(), timeout_s, check)
        if late := missing():
            raise PeerError(f"ranks {late} have not answered step {step} after {timeout_s:.0f} s")
        return [self._results[rank] for rank in self._followers]

    def close(self) -> None:
        self._router.close()

    def _wait(
        self, is_done: Callable[[], bool], timeout_s: float, check: Callable[[], None]
    ) -> None:
        deadline = time.monotonic() + timeout_s
        self._receive_all()
        while not is_done() and (left_s := deadline - time.monotonic()) > 0:
            if self._poller.wait(min(left_s, CHECK_INTERVAL_S)):
                self._receive_all()
            else:
                check()

    def _receive_all(self) -> None:
        while (received := self._router.receive()) is not None:
            peer, frame = received
            try:
                message = _RESULTS.decode(frame)
            except VersionError:
                continue  # not a follower of this gang: those run the same installation
            if isinstance(message, Join):
                self._join(peer, message)
            elif self._ranks.get(peer) == message.rank:
                self._results[message.rank] = message

    def _join(self, peer: str, join: Join) -> None:
        if join.rank not in self._followers or self._peers.get(join.rank, peer) != peer:
            raise PeerError(f"a second process joined the gang as rank {join.rank}")
        self._peers[join.rank] = peer
        self._ranks[peer] = join.rank


class FollowerChannel:
    """A follower's end, of its main thread. Joins on construction.

    Args:
        context: the process's ZMQ context.
        address: the leader's, from ``Welcome``.
        rank: this rank, at least 1.
        routing_id: unique to this process, such as ``prefill0/1/INCARNATION``.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        *,
        rank: int,
        routing_id: str,
    ) -> None:
        self._dealer = Dealer(context, address, routing_id)
        self._poller = Poller(self._dealer)
        self._dealer.send(_RESULTS.encode(Join(rank=rank)))

    def receive(self, timeout_s: float) -> Plan | None:
        """The next plan, or None when there is none within ``timeout_s``.

        Raises:
            VersionError: the leader speaks another protocol version.
        """
        frame = self._dealer.receive()
        if frame is None and self._poller.wait(timeout_s):
            frame = self._dealer.receive()
        return None if frame is None else _PLANS.decode(frame)

    def reply(self, result: StepResult) -> None:
        """Send this rank's result to the leader. Does not block.

        Raises:
            PeerError: the leader has not read for so long that the queue is full.
        """
        self._dealer.send(_RESULTS.encode(result))

    def close(self) -> None:
        self._dealer.close()
