"""The ring of virtual ranks that are threads of one process; on a GPU, of one stream."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from protocol.errors import PeerError
from ring_attention.comm import Message, Pending, RingComm


@dataclass(slots=True)
class _Post:
    tensor: torch.Tensor
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True)
class _Channel:
    """What one virtual rank has posted towards another and the other has not yet met."""

    sends: deque[_Post] = field(default_factory=deque)
    receives: deque[_Post] = field(default_factory=deque)


class LocalRing:
    """The ring of virtual ranks that are threads of one process; on a GPU, of one stream.

    Whoever comes second copies, so a message needs no thread of its own.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._channels: dict[tuple[int, int], _Channel] = {}

    def comm(self, cp_rank: int) -> "LocalComm":
        return LocalComm(self, cp_rank)

    def post_send(self, source: int, target: int, tensor: torch.Tensor) -> threading.Event:
        with self._lock:
            channel = self._channels.setdefault((source, target), _Channel())
            send = _Post(tensor)
            channel.sends.append(send)
            self._meet(channel)
        return send.done

    def post_receive(self, source: int, target: int, tensor: torch.Tensor) -> threading.Event:
        with self._lock:
            channel = self._channels.setdefault((source, target), _Channel())
            receive = _Post(tensor)
            channel.receives.append(receive)
            self._meet(channel)
        return receive.done

    def assert_idle(self) -> None:
        """Every message met its receive."""
        for pair, channel in self._channels.items():
            assert not channel.sends and not channel.receives, f"messages left over at {pair}"

    def _meet(self, channel: _Channel) -> None:
        while channel.sends and channel.receives:
            send, receive = channel.sends.popleft(), channel.receives.popleft()
            assert send.tensor.shape == receive.tensor.shape, "a message of another size"
            assert send.tensor.dtype == receive.tensor.dtype
            receive.tensor.copy_(send.tensor)
            send.done.set()
            receive.done.set()


class LocalComm(RingComm):
    """One virtual rank's end of a :class:`LocalRing`."""

    def __init__(self, ring: LocalRing, cp_rank: int) -> None:
        self.ring = ring
        self.cp_rank = cp_rank

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        me, ring = self.cp_rank, self.ring
        events = [ring.post_receive(peer, me, tensor) for peer, tensor in receives]
        events += [ring.post_send(me, peer, tensor) for peer, tensor in sends]
        return _LocalPending(events, ring.timeout_s)


@dataclass(slots=True)
class _LocalPending(Pending):
    events: list[threading.Event]
    timeout_s: float

    def wait(self) -> None:
        deadline = time.monotonic() + self.timeout_s
        for event in self.events:
            if not event.wait(max(0.0, deadline - time.monotonic())):
                raise PeerError(f"a ring peer did not answer within {self.timeout_s} s")
