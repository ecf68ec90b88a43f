"""The tables alone: a request with several ranks, and several requests together."""

from typing import Any

import pytest

from bench.exploration import product
from bench.exploration.abstract import Lane, Request, problem
from decode.states import State as InDecode
from kvtransfer.states import SOURCE_TABLE, TARGET_TABLE, TargetEvent, TargetState


@pytest.mark.parametrize(("num_ranks", "num_requests", "num_blocks"), [(1, 3, 2), (2, 4, 1)])
def test_nobody_is_stuck(num_ranks: int, num_requests: int, num_blocks: int) -> None:
    found = product.explore(num_ranks, num_requests, num_blocks)
    assert not found.problem
    assert found.num_products > found.num_classes > 100


@pytest.mark.slow
def test_nobody_is_stuck_of_four_on_three_ranks() -> None:
    assert not product.explore(3, 4).problem


def test_every_way_of_the_tables_of_a_hand_off_is_taken() -> None:
    graph = product.graph_of(1)
    sources, targets = set(), set()
    for state, ways in zip(graph.states, graph.ways, strict=True):
        for _, _, number in ways:
            before, after = state.lanes[0], graph.states[number].lanes[0]
            sources.add((before.source, after.source))
            targets.add((before.target, after.target))
    assert sources >= {(state, after) for (state, _), after in SOURCE_TABLE.items()}
    by_a_death_alone = {(TargetState.MANIFESTED, TargetState.BROKEN)}
    assert targets >= {(s, after) for (s, _), after in TARGET_TABLE.items()} - by_a_death_alone


def test_classes_tell_apart_what_others_can_tell_apart() -> None:
    graph = product.graph_of(2)
    classes = product.classes_of(graph)
    can: dict[int, object] = {}
    for state, own in enumerate(classes):
        ways = {(needs, is_own, classes[after]) for needs, is_own, after in graph.ways[state]}
        assert can.setdefault(own, (product.held(graph.states[state]), ways)) == (
            product.held(graph.states[state]),
            ways,
        )


def test_a_way_that_is_missing_is_noticed(remove_way: Any) -> None:
    remove_way(TARGET_TABLE, (TargetState.MANIFESTED, TargetEvent.CLOSE))
    assert "a target: close while manifested" in product.explore(1, 1).problem


def test_what_is_wrong_with_a_request_is_told() -> None:
    decoded = Request((Lane(),), decoding=InDecode.RUNNING)
    assert problem(decoded) == "decoded with KV that was not confirmed"
    assert problem(Request((Lane(),))) == ""
