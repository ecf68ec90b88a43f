"""A rank's connection to the coordinator: HELLO, heartbeats, and the main thread's messages.

Each HELLO goes over a connection of its own, under a routing id of its own. So no message from or
to a coordinator that this rank has given up is ever delivered.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import zmq

from kvtransfer.events import ReportStatus
from kvtransfer.identity import RankIdentity, TransferConfig
from kvtransfer.links.coordinator_lease import RETURN_S, CoordinatorLease
from kvtransfer.links.peers import is_milestone
from protocol.codec import Codec
from protocol.errors import VersionError
from protocol.kv import RankEndpoint
from protocol.messages import (
    PROTOCOL_VERSION,
    Abort,
    GangAddress,
    Heartbeat,
    Hello,
    ToCoordinator,
    ToRank,
)
from protocol.process.logs import LOG_LINES_DROPPED, num_dropped_lines
from protocol.sockets import Dealer, Poller, Pulse

_OUT: Codec[ToCoordinator] = Codec(ToCoordinator)
_IN: Codec[ToRank] = Codec(ToRank)
PULSE_INTERVAL_S = 0.3
_PAGE_BYTES = 4096
_log = logging.getLogger(__name__)


class CoordinatorConnection:
    """The connection to the coordinator. For the transfer thread alone.

    Args:
        context: the thread's ZMQ context.
        identity: of this rank.
        config: the coordinator's address, and after how long without a sign of life it is gone.
        counters: counts what is dropped.
        poller: waits for the connection.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        identity: RankIdentity,
        config: TransferConfig,
        counters: Counter[str],
        poller: Poller,
    ) -> None:
        self.lease = CoordinatorLease(config.coordinator_timeout_s, counters)
        self._context = context
        self._identity = identity
        self._config = config
        self._counters = counters
        self._poller = poller
        self._num_opened = 0
        # A stopped coordinator is given up after the whole of the time-out: it answered up to one
        # interval ago, does not answer, and does not come back.
        unanswered_s = config.coordinator_timeout_s - PULSE_INTERVAL_S - RETURN_S
        self._pulse = Pulse(PULSE_INTERVAL_S, max(PULSE_INTERVAL_S, unanswered_s))
        self._dealer = self._open()
        self._hello: Hello | None = None
        self._status = ReportStatus(num_steps=0, step_started=None)
        self._next_beat = 0.0
        self._cut_off: tuple[str, ...] = ()

    def _open(self) -> Dealer:
        name = self._identity.routing_id
        if self._num_opened:
            name += f"+{self._num_opened}"
        self._num_opened += 1
        dealer = Dealer(self._context, self._config.control_address, name, self._pulse)
        self._poller.add(dealer)
        return dealer

    def _close(self) -> None:
        self._poller.remove(self._dealer)
        self._dealer.close()

    def say_hello(self, endpoint: RankEndpoint, gang: GangAddress | None) -> None:
        """Introduce this rank. Welcome answers when its whole gang has done so, or Refused."""
        self._hello = Hello(
            version=PROTOCOL_VERSION,
            role=self._identity.role,
            pool_id=self._identity.pool_id,
            cp_size=self._identity.cp_size,
            tp_size=self._identity.tp_size,
            endpoint=endpoint,
            model_fingerprint=self._config.model_fingerprint,
            max_model_len=self._config.max_model_len,
            gang=gang,
            gang_start=self._config.gang_start,
        )
        self.send(self._hello)

    def change_coordinator(self) -> list[Abort]:
        """Say HELLO over a new connection.

        Returns:
            An abort of each request of the old coordinator.
        """
        assert self._hello is not None, "there was a HELLO"
        self._close()
        self._dealer = self._open()
        aborts = self.lease.end(time.monotonic())
        self.send(msgspec.structs.replace(self._hello, coordinator_epoch=self.lease.epoch))
        return aborts

    def send(self, message: ToCoordinator) -> None:
        """Send without blocking. Before WELCOME, only what the next coordinator can use is sent.

        Raises:
            PeerError: the coordinator has not read for so long that the queue is full.
        """
        if self.lease.may_say(message):
            self._dealer.send(_OUT.encode(message))

    def receive(self) -> Iterator[ToRank]:
        """The messages that have arrived and are to be acted upon."""
        dealer = self._dealer
        while dealer is self._dealer and (frame := dealer.receive()) is not None:
            try:
                message = _IN.decode(frame)
            except VersionError as error:
                self._counters["dropped_undecodable"] += 1
                if is_milestone(self._counters["dropped_undecodable"]):
                    _log.warning("from the coordinator: %s", error)
                continue
            if self.lease.obeys(message):
                yield message

    def is_over(self, now: float) -> bool:
        """Whether the coordinator is gone. Ask many times a second."""
        return self.lease.is_over(now, is_up=self._dealer.is_up)

    def tell_cut_off(self, pools: tuple[str, ...]) -> None:
        """Report the pools that this rank does not reach, by a heartbeat that is due at once."""
        self._cut_off = pools
        self._next_beat = 0.0

    def report(self, status: ReportStatus) -> None:
        """Set the content of the next heartbeats."""
        self._status = status

    def beat(self, now: float) -> None:
        """Send a heartbeat if one is due."""
        if now < self._next_beat:
            return
        self._next_beat = now + self._config.heartbeat_interval_s
        status = self._status
        load = status.load
        counters = {**load.counters, **self._counters}
        if num_dropped := num_dropped_lines():  # counters are of what happened: none is 0
            counters[LOG_LINES_DROPPED] = num_dropped
        self.send(
            Heartbeat(
                num_steps=status.num_steps,
                step_age_s=now - status.step_started if status.step_started is not None else 0.0,
                num_waiting=load.num_waiting,
                num_running=load.num_running,
                pending_tokens=load.pending_tokens,
                blocks=load.blocks,
                rss_bytes=_resident_bytes(),
                counters=counters,
                cut_off=self._cut_off,
            )
        )

    def close(self) -> None:
        self._close()


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text().split()[1]) * _PAGE_BYTES
