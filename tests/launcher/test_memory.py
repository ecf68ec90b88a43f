"""The memory of a machine is shared out before anybody touches it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.host_memory import Room
from launcher.memory import COORDINATOR_BYTES, body_bytes, share_out, text_worker_bytes
from protocol.errors import ConfigError

GIB, MIB = 1 << 30, 1 << 20


@given(st.integers(1, 64), st.integers(0, 8 * GIB), st.integers(0, 512 * GIB))
def test_all_parts_together_are_no_more_than_there_is(
    num_ranks: int, store: int, room: int
) -> None:
    if store > room:
        with pytest.raises(ConfigError):
            share_out("auto", num_ranks, store, Room(room, "free memory"))
        return
    plan = share_out("auto", num_ranks, store, Room(room, "free memory"))
    assert plan.kv_bytes == 0 and plan.budget_bytes >= 1
    if room >= store + COORDINATOR_BYTES + num_ranks:
        assert plan.budget_bytes * num_ranks + store + COORDINATOR_BYTES <= room


@pytest.mark.parametrize(("asked", "num_ranks"), [("900GiB", 1), ("20GiB", 2)])
def test_more_than_there_is_is_one_line_with_the_numbers(asked: str, num_ranks: int) -> None:
    with pytest.raises(ConfigError) as caught:
        share_out(asked, num_ranks, 0, Room(24 * GIB, "the limit of /sys/fs/cgroup/x"))
    message = str(caught.value)
    assert "\n" not in message
    for word in (f"--kv-memory {asked}", "24576 MiB", "/sys/fs/cgroup/x", "auto"):
        assert word in message


def test_a_size_that_fits_is_taken_as_it_is() -> None:
    assert share_out("2GiB", 2, GIB, Room(24 * GIB, "free memory")).kv_bytes == 2 * GIB
    assert share_out("900GiB", 2, 0, None).kv_bytes == 900 * GIB, "the ranks look for themselves"


@pytest.mark.parametrize(
    ("memory", "bodies", "worker"),
    [
        (GIB, 128 * MIB, 512 * MIB),
        (8 * GIB, GIB, 2 * GIB),
        (256 * GIB, GIB, 4 * GIB),
        (MIB, 64 * MIB, 512 * MIB),
    ],
)
def test_shares_of_what_there_is(memory: int, bodies: int, worker: int) -> None:
    assert (body_bytes(memory), text_worker_bytes(memory)) == (bodies, worker)
