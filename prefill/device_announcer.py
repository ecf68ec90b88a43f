"""Announcements on a GPU, where the host runs ahead.

A group of layers is final when the device has got there, so each announcement waits for an event in
its stream, and is looked at again with every further layer.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch

from kvtransfer.events import AnnounceBlocks, Command
from prefill.announcer import Announcer


class DeviceAnnouncer(Announcer):
    """One rank's announcements of what is computed on a GPU."""

    def __init__(
        self,
        submit: Callable[[Command], None],
        *,
        cp_rank: int,
        block_size: int,
        groups: Sequence[range],
    ) -> None:
        super().__init__(submit, cp_rank=cp_rank, block_size=block_size, groups=groups)
        self._pending: deque[tuple[torch.cuda.Event, AnnounceBlocks]] = deque()

    def _announce(self, announcement: AnnounceBlocks) -> None:
        computed = torch.cuda.Event()
        computed.record()
        self._pending.append((computed, announcement))

    def _flush(self, *, wait: bool) -> None:
        while self._pending:
            computed, announcement = self._pending[0]
            if wait:
                computed.synchronize()
            elif not computed.query():
                return
            self._pending.popleft()
            self._submit(announcement)
