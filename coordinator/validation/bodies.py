"""Bodies of requests in flight: where their bytes lie, and how many there may be.

A short body is in memory. A long one goes, as it comes in, into a file without a name, which a text
worker is given and the event loop never reads; its memory goes back to the system with the file.
``Budget`` bounds what all callers, and each of them, may have here at one time. Pure, but for it.
"""

import asyncio
import contextlib
import math
import os
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from coordinator.config import Limits
from coordinator.jobs.batches.batch import LineEdit
from coordinator.text.frames import INLINE_BYTES, memory_file, write_all
from protocol.errors import RequestError

RESERVED_BYTES = 1 << 20  # a declared length above is taken before its bytes come


@dataclass(frozen=True, slots=True)
class Body:
    """``data``, or ``length`` bytes of ``file`` from ``offset`` on; ``line`` if it is a batch's."""

    data: bytes = b""
    file: int | None = None
    offset: int = 0
    length: int = 0
    line: LineEdit | None = None

    @property
    def size(self) -> int:
        return len(self.data) if self.file is None else self.length

    @contextlib.contextmanager
    def lent(self) -> Iterator[int | None]:
        """The file, which stays open while the block runs whoever closes the body."""
        if self.file is None:
            yield None
            return
        file = os.dup(self.file)
        try:
            yield file
        finally:
            os.close(file)


NO_BODY = Body()


class Budget:
    """Bytes of bodies. Time comes as an argument.

    Args:
        limits: of all together, and the share of one tenant while there are several.
        num_tenants: who share them at the moment: a file of keys may change.
    """

    def __init__(self, limits: Limits, num_tenants: Callable[[], int]) -> None:
        self._limits = limits
        self._num_tenants = num_tenants
        self._held: Counter[str] = Counter()
        self.num_bytes = 0
        self._typical_s = 1.0  # that a body is held

    def take(self, tenant: str, num_bytes: int) -> None:
        """Count them.

        Raises:
            RequestError: there is no room for them now.
        """
        most_own = self._limits.tenant_body_bytes(self._num_tenants())
        is_full = self.num_bytes + num_bytes > self._limits.max_total_body_bytes
        if is_full or self._held[tenant] + num_bytes > most_own:
            raise RequestError(
                "the bodies of other requests take all memory that there is for them",
                code="overloaded",
                status=503,
                retry_after_s=max(1, math.ceil(self._typical_s)),
            )
        self._held[tenant] += num_bytes
        self.num_bytes += num_bytes

    def give_back(self, tenant: str, num_bytes: int, held_s: float) -> None:
        """They are gone, after so long."""
        self.num_bytes -= num_bytes
        self._held[tenant] -= num_bytes
        if not self._held[tenant]:
            del self._held[tenant]
        self._typical_s += 0.1 * (held_s - self._typical_s)


@asynccontextmanager
async def receive_body(
    stream: AsyncIterable[bytes], declared: int, budget: Budget, tenant: str
) -> AsyncIterator[Body]:
    """The body of a request, which is there while the block runs.

    Args:
        stream: its pieces, as they come.
        declared: how many bytes it says it has; 0 if it does not.
        budget: that it takes from.
        tenant: whose it is.

    Raises:
        RequestError: there is no room for it, or it did not arrive.
    """
    loop_time = asyncio.get_running_loop().time
    began, taken, size = loop_time(), 0, 0
    pieces: list[bytes] = []
    with contextlib.ExitStack() as leaving:
        leaving.callback(lambda: budget.give_back(tenant, taken, loop_time() - began))
        if declared > RESERVED_BYTES:
            budget.take(tenant, declared)
            taken = declared
        file: int | None = None
        async for piece in stream:
            size += len(piece)
            if size > taken:
                budget.take(tenant, size - taken)
                taken = size
            pieces.append(piece)
            if file is None and size > INLINE_BYTES:
                file = memory_file()
                leaving.callback(os.close, file)
            if file is not None:
                for kept in pieces:
                    write_all(file, kept)
                pieces.clear()
        if file is None:
            yield Body(b"".join(pieces))
        else:
            yield Body(file=file, length=size)
