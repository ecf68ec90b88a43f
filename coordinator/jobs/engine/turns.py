"""Whose turn it is: slots that several tenants share fairly. ``Turns`` is pure; time comes in.

1. A free slot goes to the tenant that has the fewest, and of those to the one that has had the
   least of their time; who comes back after a while is not owed what it did not ask for.
2. Of one tenant's, what has the lowest ``order`` goes first: its priority ranks its own alone.
3. A tenant never has more than ``most`` slots, so that another one finds a free one at once.
"""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

Order = tuple[float, ...]
Renew = Callable[[], Awaitable[None]]  # lets whoever's turn it is go first


class Turns:
    """See the module's docstring.

    Args:
        count: slots there are.
        most: of them that one tenant may have.
    """

    def __init__(self, count: int, most: int) -> None:
        self._count = count
        self._most = most
        self._waiting: dict[str, dict[int, Order]] = {}  # by tenant: numbers, and their orders
        self._running: dict[int, tuple[str, float]] = {}  # the tenant, and since when
        self._busy: Counter[str] = Counter()
        self._served_s: dict[str, float] = {}
        self._floor_s = 0.0  # what whoever comes now is taken to have had

    def ask(self, number: int, tenant: str, order: Order) -> None:
        """``number`` waits for a slot."""
        if not self._busy[tenant] and not self._waiting.get(tenant):
            self._served_s[tenant] = max(self._served_s.get(tenant, 0.0), self._floor_s)
        self._waiting.setdefault(tenant, {})[number] = order

    def leave(self, number: int, tenant: str) -> None:
        """It waits no more."""
        waiting = self._waiting.get(tenant, {})
        waiting.pop(number, None)
        if not waiting:
            self._waiting.pop(tenant, None)

    def end(self, number: int, now: float) -> None:
        """Its slot is free."""
        tenant, since = self._running.pop(number)
        self._served_s[tenant] += now - since
        self._busy[tenant] -= 1

    def grant(self, now: float) -> list[int]:
        """Who has a slot now, and did not before."""
        granted: list[int] = []
        while len(self._running) < self._count:
            tenants = [tenant for tenant in self._waiting if self._busy[tenant] < self._most]
            if not tenants:
                break
            tenant = min(tenants, key=lambda name: (self._busy[name], self._served_s[name]))
            waiting = self._waiting[tenant]
            number = min(waiting, key=lambda n: (waiting[n], n))
            self.leave(number, tenant)
            self._running[number] = (tenant, now)
            self._busy[tenant] += 1
            self._floor_s = max(self._floor_s, self._served_s[tenant])
            granted.append(number)
        return granted


class FairSlots:
    """Turns for one event loop.

    Args:
        count: slots there are.
        most: of them that one tenant may have.
    """

    def __init__(self, count: int, most: int) -> None:
        self._turns = Turns(count, most)
        self._numbers = itertools.count()
        self._granted: dict[int, asyncio.Event] = {}

    @asynccontextmanager
    async def turn(self, tenant: str, order: Order) -> AsyncIterator[Renew]:
        """Have a slot while the block runs; what it is given offers the slot to others in it."""
        number: int | None = await self.acquire(tenant, order)

        async def renew() -> None:
            nonlocal number
            had, number = number, None
            number = await self.acquire(tenant, order, had)

        try:
            yield renew
        finally:
            if number is not None:
                self.release(number)

    async def acquire(self, tenant: str, order: Order, had: int | None = None) -> int:
        """Wait for a slot; its number. ``had`` is given up in the same moment."""
        number, granted = next(self._numbers), asyncio.Event()
        self._granted[number] = granted
        self._turns.ask(number, tenant, order)
        if had is not None:
            self._turns.end(had, time.monotonic())
        self._deal()
        try:
            await granted.wait()
        except asyncio.CancelledError:
            if granted.is_set():
                self.release(number)
            else:
                self._turns.leave(number, tenant)
            raise
        finally:
            del self._granted[number]
        return number

    def release(self, number: int) -> None:
        """Give back a slot."""
        self._turns.end(number, time.monotonic())
        self._deal()

    def _deal(self) -> None:
        for number in self._turns.grant(time.monotonic()):
            self._granted[number].set()
