"""The state tables: drawn as they are, and refusing whatever they do not have."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from coordinator.request import TABLE, Request, RequestEvent, RequestState
from protocol.errors import IllegalTransition
from protocol.request import SamplingParams
from protocol.token_ids import TokenIds
from protocol.transitions import advance
from tests.state_tables import TABLES, drawing, redrawn, tables

DOCUMENT = Path(__file__).resolve().parents[1] / "docs/protocol.md"


def test_the_document_shows_the_tables_as_they_are() -> None:
    text = DOCUMENT.read_text()
    assert redrawn(text) == text, "run: python -m tests.state_tables --write docs/protocol.md"
    for name, ways in tables().items():
        assert drawing(ways) in text, name


@pytest.mark.parametrize(("state", "event"), list(itertools.product(RequestState, RequestEvent)))
def test_a_request_takes_only_the_events_of_its_table(
    state: RequestState, event: RequestEvent
) -> None:
    request = Request(
        request_id="r",
        prompt_token_ids=TokenIds.of((1, 2)),
        sampling=SamplingParams(max_tokens=1),
        tenant="tenant",
        state=state,
    )
    if (state, event) in TABLE:
        request.advance(event)
        assert request.state is TABLE[state, event]
    else:
        with pytest.raises(IllegalTransition):
            request.advance(event)
        assert request.state is state


@pytest.mark.parametrize("name", sorted(TABLES))
def test_nothing_happens_but_by_the_ways_of_a_table(name: str) -> None:
    table: Any = TABLES[name]
    [states] = {type(state) for state, _ in table}
    events = {type(event) for _, event in table}  # of jobs there are those of any kind, too
    for state, event in itertools.product(states, itertools.chain(*events)):
        if (state, event) in table:
            assert advance(table, state, event, of="it") is table[state, event]
        else:
            with pytest.raises(IllegalTransition, match=f"^it: {event.value} while {state.value}$"):
                advance(table, state, event, of="it")


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
