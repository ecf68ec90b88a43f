"""A prefill pool reads back what is cached here of a prompt."""

from collections.abc import Callable
from typing import Any

import pytest

MakeCluster = Callable[..., Any]
PROMPT = tuple(7 * position % 50 for position in range(30))


def ticket(cluster: Any) -> tuple[str, int]:
    """A request with a ticket, of whose 30 tokens 16 are cached in 4 blocks."""
    first = cluster.reserve("first", PROMPT[:18], max_tokens=1)
    cluster.compute_here(first)
    cluster.run()
    key: tuple[str, int] = cluster.reserve("a", PROMPT, max_tokens=3)
    cluster.step()
    cluster.open(key)
    assert cluster.tickets[key] == 16
    return key


def test_what_is_cached_is_served_and_then_decoded_from(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    key = ticket(cluster)
    num_expected = cluster.pool.counts().in_flight
    cluster.fetch(key, 1, 4)
    served = cluster.served[key]
    assert (served.target_pool_id, served.target_epoch, served.first_logical) == ("prefill0", 3, 1)
    assert len(served.blocks) == 3 and served.owners == (1, 0, 1)
    assert cluster.pool.counts().in_flight == num_expected + 3
    cluster.end_serving(key, committed=True)
    assert cluster.pool.counts().in_flight == num_expected
    cluster.commit(key)
    cluster.run()
    assert cluster.num_released[key] == 1
    cluster.assert_empty()


@pytest.mark.parametrize(("first", "end"), [(0, 5), (4, 5), (0, 0)])
def test_what_is_not_cached_is_refused(make_cluster: MakeCluster, first: int, end: int) -> None:
    cluster = make_cluster()
    key = ticket(cluster)
    cluster.fetch(key, first, end)
    assert "not among the 4" in cluster.refused[key] and not cluster.served


@pytest.mark.parametrize("state", ["unknown", "queued", "opening", "switching", "closing", "over"])
def test_a_request_without_a_ticket_is_refused(make_cluster: MakeCluster, state: str) -> None:
    cluster = make_cluster()
    key = ("a", 0)
    if state != "unknown":
        key = cluster.reserve("a", PROMPT, max_tokens=1)
    if state not in ("unknown", "queued"):
        cluster.step()
    if state not in ("unknown", "queued", "opening"):
        cluster.open(key)
    if state == "switching":
        cluster.compute_here(key)
    if state == "closing":
        cluster.abort(key)
    if state == "over":
        cluster.commit(key)
    cluster.fetch(key, 0, 1)
    assert "no ticket" in cluster.refused[key]


def test_a_request_is_served_once(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    key = ticket(cluster)
    cluster.fetch(key, 0, 4)
    cluster.end_serving(key, committed=True)
    cluster.fetch(key, 0, 4)
    assert "before" in cluster.refused[key]
    assert key not in cluster.served


@pytest.mark.parametrize("closes_first", ["source", "target"])
def test_an_abort_while_serving_waits_for_both_sides(
    make_cluster: MakeCluster, closes_first: str
) -> None:
    cluster = make_cluster()
    key = ticket(cluster)
    cluster.fetch(key, 0, 4)
    for _ in range(3):
        cluster.abort(key)
    assert cluster.closing == {key} and cluster.closing_served == {key}
    if closes_first == "source":
        cluster.end_serving(key, committed=False)
        assert key not in cluster.num_released
        cluster.close(key)
    else:
        cluster.close(key)
        assert key not in cluster.num_released
        assert cluster.pool.counts().in_flight == 4
        cluster.abort(key)
        assert key not in cluster.num_released
        cluster.end_serving(key, committed=False)
    assert cluster.num_released[key] == 1
    cluster.assert_empty()


def test_blocks_that_are_read_are_not_reused(make_cluster: MakeCluster) -> None:
    """Given up by their owner and not yet by the reader: other prompts have to wait."""
    cluster = make_cluster(num_blocks=10, watermark_blocks=0)
    key = ticket(cluster)
    cluster.fetch(key, 0, 4)
    cluster.abort(key)
    cluster.close(key)
    other = cluster.reserve("b", tuple(range(39)), max_tokens=1)
    cluster.compute_here(other)
    assert cluster.step() is None
    cluster.end_serving(key, committed=False)
    cluster.run()
    assert cluster.finished[other]
    cluster.assert_empty()


def test_a_broken_fetch_leaves_the_request_as_it_was(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    key = ticket(cluster)
    cluster.fetch(key, 0, 4)
    for _ in range(2):
        cluster.break_serving(key)
    assert cluster.closing_served == {key} and not cluster.failed
    cluster.commit(key)  # its prefill pool has computed everything meanwhile
    cluster.run()
    assert len(cluster.outputs[key]) == 3
    assert key not in cluster.num_released, "a reader may be late"
    cluster.end_serving(key, committed=False)
    assert cluster.num_released[key] == 1
    cluster.assert_empty()
