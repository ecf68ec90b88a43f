"""The two state tables of a hand-off: what they never have."""

from kvtransfer.handoff.states import (
    SOURCE_TABLE,
    TARGET_TABLE,
    SourceEvent,
    SourceState,
    TargetEvent,
    TargetState,
)


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
