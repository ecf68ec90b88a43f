"""Messages between the ranks of a ring, behind one interface.

1. The ring loop posts an :meth:`RingComm.exchange` before it computes a step: its receives name
   the buffers of the next step's data, so that a message always finds its receive posted.
2. It computes; bytes move meanwhile.
3. ``Pending.wait`` returns when all of the exchange's buffers may be used again.

Both sides know every size from the plan: messages are exact, and empty ones are never sent.
Between two ranks the n-th message sent meets the n-th receive posted, over all exchanges.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from protocol.errors import PeerError

Message = tuple[int, torch.Tensor]  # the peer's cp rank, and what to send or where to receive


class Pending(ABC):
    """An exchange under way: its tensors belong to it until ``wait`` has returned."""

    @abstractmethod
    def wait(self) -> None:
        """Until every message of the exchange has been sent and received.

        Raises:
            PeerError: a peer did not do its part within the budget. The ring is then unusable:
                bytes may still land in the buffers.
        """


class RingComm(ABC):
    """One rank's way to the other cp ranks of its pool that share its tp rank."""

    @abstractmethod
    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Post sends and receives, and return without waiting for them.

        Args:
            sends: contiguous, not empty; not to be written before the wait.
            receives: contiguous, of exactly the size that the peer sends.

        Raises:
            PeerError: a peer is gone.
        """


class GlooRing(RingComm):
    """Point-to-point over a gloo group of the whole pool; its I/O thread moves the bytes.

    Args:
        tp_size, tp_rank: the ring peers of a rank share its tp rank; in the group, the rank of
            ``cp_rank`` is ``cp_rank * tp_size + tp_rank``.
        timeout_s: budget of a wait, over all messages of an exchange.
        group: None is the default group.
    """

    def __init__(
        self,
        *,
        tp_size: int = 1,
        tp_rank: int = 0,
        timeout_s: float,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.tp_size = tp_size
        self.tp_rank = tp_rank
        self.timeout_s = timeout_s
        self.group = group

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        works: list[dist.Work | None] = []
        try:
            # Receives first: gloo's sends complete only once their receive is posted.
            for peer, tensor in receives:
                works.append(dist.irecv(tensor, group=self.group, group_src=self._rank(peer)))
            for peer, tensor in sends:
                works.append(dist.isend(tensor, group=self.group, group_dst=self._rank(peer)))
        except RuntimeError as error:
            raise PeerError(f"cannot reach a ring peer: {error}") from error
        posted = [work for work in works if work is not None]
        return _GlooPending(posted, [tensor for _, tensor in (*sends, *receives)], self.timeout_s)

    def _rank(self, cp_rank: int) -> int:
        return cp_rank * self.tp_size + self.tp_rank


@dataclass(slots=True)
class _GlooPending(Pending):
    works: list[dist.Work]
    tensors: list[torch.Tensor]  # kept alive until the bytes have moved
    timeout_s: float

    def wait(self) -> None:
        deadline = time.monotonic() + self.timeout_s
        for work in self.works:
            # In milliseconds inside, and 0 would mean the group's own timeout.
            left_s = max(deadline - time.monotonic(), 0.001)
            try:
                work.wait(timedelta(seconds=left_s))
            except RuntimeError as error:
                raise PeerError(f"a ring peer did not answer in time: {error}") from error
        self.tensors.clear()


class NcclRing(RingComm):
    """Point-to-point over an NCCL group that carries nothing but this pool's rings.

    Every exchange is one ``batch_isend_irecv``, the only form that cannot deadlock. Waits order the
    current stream after the messages and do not block; a lost peer is noticed by NCCL's watchdog,
    which ends the process after the group's timeout.

    Args:
        group: of all ranks of the pool, of its own, with NCCL as its backend. Every rank of it
            constructs the ring at the same time: the first use joins all of them.
    """

    def __init__(self, group: dist.ProcessGroup, *, tp_size: int = 1, tp_rank: int = 0) -> None:
        self.group = group
        self.tp_size = tp_size
        self.tp_rank = tp_rank
        dist.all_reduce(torch.zeros(1, device="cuda"), group=group)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        operations = [self._operation(dist.isend, *message) for message in sends]
        operations += [self._operation(dist.irecv, *message) for message in receives]
        try:
            return _NcclPending(dist.batch_isend_irecv(operations))
        except RuntimeError as error:
            raise PeerError(f"cannot reach a ring peer: {error}") from error

    def _operation(
        self, kind: Callable[..., object], cp_rank: int, tensor: torch.Tensor
    ) -> dist.P2POp:
        peer = cp_rank * self.tp_size + self.tp_rank
        return dist.P2POp(kind, tensor, group=self.group, group_peer=peer)


@dataclass(slots=True)
class _NcclPending(Pending):
    works: list[dist.Work]

    def wait(self) -> None:
        for work in self.works:
            work.wait()
