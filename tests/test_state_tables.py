"""The state tables: drawn as they are, and refusing whatever they do not have."""

import itertools
from enum import Enum
from pathlib import Path

import pytest

import decode.states
import kvtransfer.states
import prefill.states
from bench.state_tables import drawing, redrawn, tables
from coordinator.records import TABLE, Record, State, Step
from kvtransfer.states import (
    SOURCE_TABLE,
    TARGET_TABLE,
    SourceEvent,
    SourceState,
    TargetEvent,
    TargetState,
)
from protocol.errors import IllegalTransition
from protocol.request import SamplingParams
from protocol.token_ids import TokenIds

DOCUMENT = Path(__file__).resolve().parents[1] / "docs/protocol.md"


def test_the_document_shows_the_tables_as_they_are() -> None:
    text = DOCUMENT.read_text()
    assert redrawn(text) == text, "run: python -m bench.state_tables --write docs/protocol.md"
    for name, ways in tables().items():
        assert drawing(ways) in text, name


@pytest.mark.parametrize(("state", "step"), list(itertools.product(State, Step)))
def test_a_record_takes_only_the_steps_of_its_table(state: State, step: Step) -> None:
    record = Record(
        "r", 1, TokenIds.of((1, 2)), SamplingParams(max_tokens=1), "tenant", state=state
    )
    if (state, step) in TABLE:
        record.step(step)
        assert record.state is TABLE[state, step]
    else:
        with pytest.raises(IllegalTransition):
            record.step(step)
        assert record.state is state


@pytest.mark.parametrize(
    ("states", "events", "table"),
    [(SourceState, SourceEvent, SOURCE_TABLE), (TargetState, TargetEvent, TARGET_TABLE)],
)
def test_a_handoff_takes_only_the_ways_of_its_table(
    states: type[Enum], events: type[Enum], table: dict
) -> None:
    for state, event in itertools.product(states, events):
        if (state, event) in table:
            assert kvtransfer.states.advance(table, state, event) is table[state, event]
        else:
            with pytest.raises(IllegalTransition):
                kvtransfer.states.advance(table, state, event)


@pytest.mark.parametrize("module", [prefill.states, decode.states])
def test_a_scheduler_takes_only_the_ways_of_its_table(module) -> None:  # noqa: ANN001
    for state, change in itertools.product(module.State, module.Change):
        after = module.TABLE[state].get(change)
        if after is None:
            with pytest.raises(IllegalTransition):
                module.advance(state, change)
        else:
            assert module.advance(state, change) is after


@pytest.mark.parametrize("name", sorted(tables()))
def test_every_state_is_reached_and_every_path_can_end(name: str) -> None:
    """From the first state of a table to each other one, and from each to an end."""
    ways = tables()[name]
    following: dict[str, set[str]] = {}
    for state, _, after in ways:
        following.setdefault(state, set()).add(after)
    states = {state for state, _, _ in ways} | {after for _, _, after in ways}
    assert _reachable(ways[0][0], following) == states
    ends = states - following.keys() or {ways[0][0]}  # blocks go round: their end is the start
    for state in states:
        assert _reachable(state, following) & ends, state


def _reachable(start: str, following: dict[str, set[str]]) -> set[str]:
    found, todo = {start}, [start]
    while todo:
        new = following.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found
