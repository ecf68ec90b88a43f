"""Prefixes that come up from a store, into a cluster that lives in memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from decode.loading import LOAD_TIMEOUT_S, NUM_OPEN
from protocol.messages import RequestFailed

MakeCluster = Callable[..., Any]
PROMPT = tuple(range(10, 40))  # seven blocks of four, and a half


@pytest.fixture(name="make_cluster")
def with_small_pieces(make_cluster: MakeCluster) -> MakeCluster:
    return partial(make_cluster, load_part_blocks=2)


def test_what_a_store_has_is_not_computed(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(num_blocks=20)
    key = cluster.reserve_stored("a", PROMPT, max_tokens=3, num_store_tokens=24)
    assert cluster.step() is None
    assert sorted(cluster.opened) == [("a~0", 0), ("a~1", 0), ("a~2", 0)]
    for number in (1, 0):
        cluster.bring(key, number)
    assert not cluster.tickets, "half of it is not all of it"
    cluster.bring(key, 2)
    assert list(cluster.opened) == [key] and cluster.opened[key].first_logical == 6
    cluster.open(key)
    assert cluster.tickets == {key: 24}
    cluster.compute_here(key)
    cluster.close(key)
    plan = cluster.step()
    assert [(step.start, len(step.token_ids)) for step in plan.sequences] == [(24, 6)]
    cluster.run()
    assert len(cluster.outputs[key]) == 3
    cluster.assert_empty()


def test_the_next_request_finds_it_here(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(num_blocks=20)
    key = cluster.reserve_stored("a", PROMPT, max_tokens=1, num_store_tokens=16)
    cluster.step()
    cluster.bring(key, 0), cluster.bring(key, 1)
    cluster.abort(key)
    cluster.close(key)
    again = cluster.reserve_stored("b", PROMPT, max_tokens=1, num_store_tokens=16)
    cluster.step()
    cluster.open(again)
    assert cluster.tickets[again] == 16
    cluster.abort(again)
    cluster.close(again)
    cluster.assert_empty()


def test_pieces_are_opened_a_few_at_a_time(make_cluster: MakeCluster) -> None:
    prompt = tuple(range(50))
    cluster = make_cluster(num_blocks=20)
    key = cluster.reserve_stored("a", prompt, max_tokens=1, num_store_tokens=48)
    cluster.step()
    for number in range(6):
        assert len(cluster.opened) == min(NUM_OPEN, 6 - number)
        cluster.bring(key, number)
    cluster.open(key)
    assert cluster.tickets == {key: 48}
    cluster.commit(key)
    cluster.run()
    cluster.assert_empty()


def test_what_a_store_refuses_is_computed(make_cluster: MakeCluster) -> None:
    """Pieces behind one that did not come are of no use, and nothing waits for ever."""
    cluster = make_cluster(num_blocks=20)
    key = cluster.reserve_stored("a", PROMPT, max_tokens=2, num_store_tokens=24)
    cluster.step()
    cluster.bring(key, 0)
    cluster.bring(key, 2)
    cluster.break_handoff(("a~1", 0))
    assert cluster.closing == {("a~1", 0)} and not cluster.tickets
    cluster.land_garbage(("a~1", 0))
    cluster.close(("a~1", 0))
    cluster.open(key)
    assert cluster.tickets == {key: 8}
    cluster.commit(key)
    cluster.run()
    assert len(cluster.outputs[key]) == 2 and not cluster.failed
    cluster.assert_empty()


def test_a_silent_store_is_given_up(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(num_blocks=20)
    key = cluster.reserve_stored("a", PROMPT, max_tokens=2, num_store_tokens=8)
    cluster.step()
    cluster.now += LOAD_TIMEOUT_S + 1
    cluster.step()
    assert cluster.closing == {("a~0", 0)}
    cluster.close(("a~0", 0))
    cluster.open(key)
    cluster.commit(key)
    cluster.run()
    assert len(cluster.outputs[key]) == 2
    assert not any(isinstance(line, RequestFailed) for line in cluster.log)
    cluster.assert_empty()


def test_little_is_computed_rather_than_brought(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(num_blocks=20, min_tokens_to_load=12)
    key = cluster.reserve_stored("a", PROMPT, max_tokens=1, num_store_tokens=8)
    cluster.step()
    assert list(cluster.opened) == [key]
    cluster.open(key)
    cluster.commit(key)
    cluster.run()
    cluster.assert_empty()
