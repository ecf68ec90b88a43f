"""Allocators: nothing is wasted where nothing can be, and each counts what it holds."""

import pytest

from bench.simulate.allocators import Buddy, ContiguousMax, Need, Paged
from bench.simulate.blocks import allocators, draw_needs, null_cases, replay, ring_waste
from bench.simulate.report import Scale


def test_lengths_that_all_sizes_divide_waste_nothing() -> None:
    for null in null_cases():
        assert null.holds, null


def test_larger_blocks_waste_more_and_contiguous_regions_most() -> None:
    needs = draw_needs("chat", 0, Scale(2, 0.1))
    waste = {name: replay(make(), needs)["internal_waste"] for name, make in allocators().items()}
    paged = [found for name, found in waste.items() if name.startswith("paged")]
    assert paged == sorted(paged)
    assert paged[0] == 0
    assert paged[-1] < waste["buddy, limit"] < waste["contiguous max"]


@pytest.mark.parametrize("size", [1, 16])
def test_paged_reserves_whole_blocks(size: int) -> None:
    paged, need = Paged(64, size), Need(0, 20, 10, 10)
    assert paged.admit(need, 20)
    assert paged.num_reserved == -(-20 // size) * size
    assert paged.grow(need, 33)
    assert not paged.admit(Need(1, 60, 1, 1), 60)
    paged.release(need)
    assert paged.num_reserved == 0


def test_buddies_split_and_join() -> None:
    buddy = Buddy(64, knows_length=True)
    needs = [Need(number, 10, 3, 50) for number in range(4)]
    assert all(buddy.admit(need, 10) for need in needs)
    assert (buddy.num_reserved, buddy.num_largest) == (64, 0)
    for need in (needs[0], needs[2]):
        buddy.release(need)
    assert (buddy.num_free, buddy.num_largest) == (32, 16)  # free, but not in one piece
    assert not buddy.admit(Need(9, 30, 1, 1), 30)
    for need in (needs[1], needs[3]):
        buddy.release(need)
    assert buddy.num_largest == 64
    assert Buddy(64, knows_length=False).admit(needs[0], 10)


def test_contiguous_max_reserves_the_longest() -> None:
    regions = ContiguousMax(100, 40)
    assert [regions.admit(Need(n, 1, 1, 1), 1) for n in range(3)] == [True, True, False]
    assert regions.num_largest == 0


def test_a_ring_pads_its_busiest_rank() -> None:
    assert ring_waste(32, 32, 1) == 0
    assert ring_waste(32, 32, 4) == pytest.approx(3 / 4)  # one block, three ranks have none
    assert ring_waste(5 * 32, 32, 2) == pytest.approx(1 / 6)
