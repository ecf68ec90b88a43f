"""A rank's line to the coordinator: HELLO, heartbeats, and whatever the main thread has to say."""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import zmq

from kvtransfer.events import ReportStatus
from kvtransfer.identity import RankIdentity, TransferConfig
from kvtransfer.peers import is_milestone
from protocol.codec import Codec
from protocol.errors import VersionError
from protocol.kv import RankEndpoint
from protocol.messages import (
    PROTOCOL_VERSION,
    BlockCounts,
    GangAddress,
    Heartbeat,
    Hello,
    ToCoordinator,
    ToRank,
)
from protocol.sockets import Dealer

_OUT: Codec[ToCoordinator] = Codec(ToCoordinator)
_IN: Codec[ToRank] = Codec(ToRank)
_PAGE_BYTES = 4096
_log = logging.getLogger(__name__)


class ControlLine:
    """The connection to the coordinator. For the transfer thread alone."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        identity: RankIdentity,
        config: TransferConfig,
        counters: Counter[str],
    ) -> None:
        self.dealer = Dealer(context, config.control_address, identity.routing_id)
        self._identity = identity
        self._config = config
        self._counters = counters
        self._status = ReportStatus(num_steps=0, step_started=None)
        self._next_beat = 0.0

    def say_hello(self, endpoint: RankEndpoint, gang: GangAddress | None) -> None:
        """Introduce this rank; answered by Welcome when its whole gang has, or by Refused."""
        self.send(
            Hello(
                version=PROTOCOL_VERSION,
                token=self._config.token,
                role=self._identity.role,
                pool_id=self._identity.pool_id,
                cp_size=self._identity.cp_size,
                tp_size=self._identity.tp_size,
                endpoint=endpoint,
                model_fingerprint=self._config.model_fingerprint,
                max_model_len=self._config.max_model_len,
                gang=gang,
            )
        )

    def send(self, message: ToCoordinator) -> None:
        """Send without blocking.

        Raises:
            PeerError: the coordinator has not read for so long that the queue is full.
        """
        self.dealer.send(_OUT.encode(message))

    def receive(self) -> Iterator[ToRank]:
        """Everything that has arrived."""
        while (frame := self.dealer.receive()) is not None:
            try:
                yield _IN.decode(frame)
            except VersionError as error:
                self._counters["dropped_undecodable"] += 1
                if is_milestone(self._counters["dropped_undecodable"]):
                    _log.warning("from the coordinator: %s", error)

    def report(self, status: ReportStatus) -> None:
        """What the next heartbeats say."""
        self._status = status

    def beat(self, now: float) -> None:
        """Send a heartbeat if one is due."""
        if now < self._next_beat:
            return
        self._next_beat = now + self._config.heartbeat_interval_s
        status = self._status
        self.send(
            Heartbeat(
                num_steps=status.num_steps,
                step_age_s=now - status.step_started if status.step_started is not None else 0.0,
                num_waiting=status.num_waiting,
                num_running=status.num_running,
                pending_tokens=status.pending_tokens,
                blocks=tuple(BlockCounts(*counts) for counts in status.blocks),
                rss_bytes=_resident_bytes(),
                counters={**dict(status.counters), **self._counters},
            )
        )

    def close(self) -> None:
        self.dealer.close()


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text().split()[1]) * _PAGE_BYTES
