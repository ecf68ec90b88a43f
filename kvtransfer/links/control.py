"""A rank's line to the coordinator: HELLO, heartbeats, and whatever the main thread has to say.

Each HELLO is said on a line of its own, under a routing id of its own: what was sent by, or is
meant for, a coordinator that this rank has given up reaches nobody.
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


class ControlLine:
    """The connection to the coordinator. For the transfer thread alone.

    Args:
        context: the thread's ZMQ context.
        identity: who this rank is.
        config: the coordinator's address, and after how long without a sign of life it is gone.
        counters: counts what is dropped.
        poller: waits for the line.
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
        self._num_lines = 0
        # A stopped coordinator is given up after the whole of the time-out: it answered up to one
        # interval ago, does not answer, and does not come back.
        unanswered_s = config.coordinator_timeout_s - PULSE_INTERVAL_S - RETURN_S
        self._pulse = Pulse(PULSE_INTERVAL_S, max(PULSE_INTERVAL_S, unanswered_s))
        self._dealer = self._open_line()
        self._hello: Hello | None = None
        self._status = ReportStatus(num_steps=0, step_started=None)
        self._next_beat = 0.0
        self._cut_off: tuple[str, ...] = ()

    def _open_line(self) -> Dealer:
        name = self._identity.routing_id
        if self._num_lines:
            name += f"+{self._num_lines}"
        self._num_lines += 1
        dealer = Dealer(self._context, self._config.control_address, name, self._pulse)
        self._poller.add(dealer)
        return dealer

    def _close_line(self) -> None:
        self._poller.remove(self._dealer)
        self._dealer.close()

    def say_hello(self, endpoint: RankEndpoint, gang: GangAddress | None) -> None:
        """Introduce this rank; answered by Welcome when its whole gang has, or by Refused."""
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
        """Say HELLO on a new line; what is to be aborted of what the old one has asked for."""
        assert self._hello is not None, "there was a HELLO"
        self._close_line()
        self._dealer = self._open_line()
        aborts = self.lease.end(time.monotonic())
        self.send(msgspec.structs.replace(self._hello, coordinator_epoch=self.lease.epoch))
        return aborts

    def send(self, message: ToCoordinator) -> None:
        """Send without blocking. Before WELCOME, what is of no use to the next coordinator goes
        nowhere.

        Raises:
            PeerError: the coordinator has not read for so long that the queue is full.
        """
        if self.lease.may_say(message):
            self._dealer.send(_OUT.encode(message))

    def receive(self) -> Iterator[ToRank]:
        """Everything that has arrived and is to be acted upon."""
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
        """Other pools that this rank does not reach, from now on; the next heartbeat is due."""
        self._cut_off, self._next_beat = pools, 0.0

    def report(self, status: ReportStatus) -> None:
        """What the next heartbeats say."""
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
        self._close_line()


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text().split()[1]) * _PAGE_BYTES
