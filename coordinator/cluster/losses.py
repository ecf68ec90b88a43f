"""How long the registry waits for whom, and what it says of a pool that must go. Pure."""

from dataclasses import dataclass
from typing import NamedTuple


class Loss(NamedTuple):
    """A pool is to be lost. ``is_over``: its gang must end; else it may come back."""

    pool_id: str
    reason: str
    is_over: bool


@dataclass(frozen=True, slots=True)
class Displaced:
    """The gang that a pool has must go for a HELLO to be taken. ``is_over``: it must end, too."""

    reason: str
    is_over: bool


@dataclass(frozen=True, slots=True)
class Timeouts:
    """For how long what is allowed; in seconds."""

    silent_s: float = 4.0  # a rank of a ready pool
    starting_s: float = 60.0  # a rank that loads its model
    step_s: float = 60.0  # one step
    rejoin_s: float = 10.0  # a gang that is expected back
    hold_s: float = 3.0  # the others wait so long with it, so that they need not connect twice
