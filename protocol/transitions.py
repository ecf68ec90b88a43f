"""State tables: what every state machine of the cluster is written as. Pure.

A table has one entry for each way there is: (state, event) -> the state after. Whatever it does not
have cannot happen. The tables are drawn into docs/protocol.md, as they are.
"""

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

from protocol.errors import IllegalTransition

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)


def advance(table: Mapping[tuple[S, E], S], state: S, event: E, *, of: str) -> S:
    """The state after an event.

    Args:
        of: what is in that state, for the error: "a batch".

    Raises:
        IllegalTransition: the table has no such way.
    """
    following = table.get((state, event))
    if following is None:
        raise IllegalTransition(f"{of}: {event.value} while {state.value}")
    return following
