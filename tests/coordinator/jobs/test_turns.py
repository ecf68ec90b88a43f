"""Whose turn it is."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.jobs.engine.turns import FairSlots, Turns


class Site:
    """Turns in virtual time: everything takes a second."""

    def __init__(self, count: int, most: int) -> None:
        self.turns = Turns(count, most)
        self.now = 0.0
        self.running: dict[int, str] = {}
        self.tenants: dict[int, str] = {}

    def ask(self, tenant: str, priority: int = 0) -> int:
        number = len(self.tenants)
        self.tenants[number] = tenant
        self.turns.ask(number, tenant, (-priority,))
        return number

    def step(self) -> list[int]:
        """What runs ends; who runs now."""
        self.now += 1
        for number in list(self.running):
            self.turns.end(number, self.now)
            del self.running[number]
        granted = self.turns.grant(self.now)
        self.running.update({number: self.tenants[number] for number in granted})
        return granted


def test_a_tenant_with_many_does_not_keep_another_waiting() -> None:
    site = Site(1, 1)
    for _ in range(1000):
        site.ask("many")
    site.step()
    single = site.ask("few")
    assert site.step() == [single]


def test_a_slot_is_free_for_another_tenant_at_once() -> None:
    site = Site(3, 2)
    for _ in range(1000):
        site.ask("many")
    assert [site.tenants[number] for number in site.step()] == ["many"] * 2
    single = site.ask("few")
    assert site.turns.grant(site.now) == [single]


def test_a_priority_ranks_its_tenants_own() -> None:
    site = Site(1, 1)
    first = [site.ask("loud", 100) for _ in range(3)]
    low, high = site.ask("quiet", -5), site.ask("quiet", 5)
    order = [number for _ in range(5) for number in site.step()]
    assert order == [first[0], high, first[1], low, first[2]]


def test_who_comes_back_is_not_owed_the_time_it_did_not_ask_for() -> None:
    site = Site(1, 1)
    site.ask("a")
    site.step()
    site.step()
    for _ in range(100):
        site.ask("b")
    for _ in range(50):
        site.step()
    for _ in range(100):
        site.ask("a")
    served = Counter(site.tenants[number] for _ in range(20) for number in site.step())
    assert served == {"a": 10, "b": 10}


@given(
    count=st.integers(1, 4),
    asked=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(-9, 9)), max_size=60),
    data=st.data(),
)
def test_everybody_gets_on_and_nobody_has_too_much(
    count: int, asked: list[tuple[str, int]], data: st.DataObject
) -> None:
    most = data.draw(st.integers(1, count))
    site, seen = Site(count, most), []
    for tenant, priority in asked:
        site.ask(tenant, priority)
        if data.draw(st.booleans()):
            seen += site.step()
            assert len(site.running) <= count
            assert all(n <= most for n in Counter(site.running.values()).values())
    for _ in asked:
        seen += site.step()
    assert sorted(seen) == list(range(len(asked)))


async def _cancelled_in_every_state() -> None:
    slots = FairSlots(1, 1)
    async with slots.turn("a", (0,)) as renew:
        waiting = [asyncio.create_task(slots.acquire(name, (0,))) for name in "bc"]
        await asyncio.sleep(0)
        waiting[0].cancel()
        renewing = asyncio.ensure_future(renew())
        number = await waiting[1]  # it was its turn
        renewing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await renewing
        slots.release(number)
    async with asyncio.timeout(5), slots.turn("d", (0,)):
        pass


def test_a_turn_that_is_given_up_leaves_its_slot() -> None:
    asyncio.run(_cancelled_in_every_state())
