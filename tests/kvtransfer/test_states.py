"""The two state tables: what they have, and that they refuse everything else."""

import pytest

from kvtransfer.states import (
    SOURCE_TABLE,
    TARGET_TABLE,
    SourceEvent,
    SourceState,
    TargetEvent,
    TargetState,
    advance,
)
from protocol.errors import IllegalTransition

SOURCE_CASES = [(state, event) for state in SourceState for event in SourceEvent]
TARGET_CASES = [(state, event) for state in TargetState for event in TargetEvent]


@pytest.mark.parametrize(("state", "event"), SOURCE_CASES)
def test_source_has_it_or_refuses_it(state: SourceState, event: SourceEvent) -> None:
    if (state, event) in SOURCE_TABLE:
        assert advance(SOURCE_TABLE, state, event) is SOURCE_TABLE[state, event]
    else:
        with pytest.raises(IllegalTransition, match=state.value):
            advance(SOURCE_TABLE, state, event)


@pytest.mark.parametrize(("state", "event"), TARGET_CASES)
def test_target_has_it_or_refuses_it(state: TargetState, event: TargetEvent) -> None:
    if (state, event) in TARGET_TABLE:
        assert advance(TARGET_TABLE, state, event) is TARGET_TABLE[state, event]
    else:
        with pytest.raises(IllegalTransition, match=state.value):
            advance(TARGET_TABLE, state, event)


def test_closed_is_final_and_reached_from_everywhere() -> None:
    for table, closed, states in (
        (SOURCE_TABLE, SourceState.CLOSED, SourceState),
        (TARGET_TABLE, TargetState.CLOSED, TargetState),
    ):
        assert not any(state is closed for state, _ in table)
        reached = {closed}
        for _ in states:
            reached |= {state for (state, _), following in table.items() if following in reached}
        assert reached == set(states)


def test_a_broken_or_closing_side_never_commits() -> None:
    """Fail closed: the only way on from there leads to CLOSED without COMPLETE or ALL_READ."""
    for state in (SourceState.BROKEN, SourceState.CLOSING):
        assert (state, SourceEvent.ALL_READ) not in SOURCE_TABLE
    for target_state in (TargetState.BROKEN, TargetState.CLOSING, TargetState.OPEN):
        assert (target_state, TargetEvent.COMPLETE) not in TARGET_TABLE
