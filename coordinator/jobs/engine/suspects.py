"""Durable work that ends the process that does it. Pure; time comes as an argument.

What lies on the disk is begun again after every start, so that one document which kills the
coordinator would kill it for good. As in :mod:`coordinator.requests.quarantine`:

1. When a process dies, everything that it had in work at that moment may have been the cause: the
   death is counted against each, at the *position* that it had reached.
2. Work that gets past that position is cleared; a death further on is the first of another cause.
3. What one more death would condemn is done while nothing else is (gate.py), so that
   this death tells who it was. A bystander is not set aside.
4. What was on board of ``max_deaths`` deaths, the only one of which that is true, is set aside
   until somebody asks for it again.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

LINE = "line"  # of a batch; other kinds are those of jobs


class Name(NamedTuple):
    """What is done: a kind, and an id that is unique in it."""

    kind: str
    key: str


class Work(msgspec.Struct, frozen=True, array_like=True):
    """A piece of work, and how far it has got: positions grow, their unit is the kind's own."""

    kind: str
    key: str
    position: int = 0

    @property
    def name(self) -> Name:
        return Name(self.kind, self.key)


class Suspect(msgspec.Struct, frozen=True):
    """Work that was on board of deaths, and is not cleared of them. Times are Unix seconds."""

    work: Work
    num_deaths: int
    first_at: float
    last_at: float
    is_set_aside: bool = False


def after_death(
    on_board: Iterable[Work], known: Mapping[Name, Suspect], now: float, max_deaths: int
) -> list[Suspect]:
    """What is known of those on board, now that one more process has died; one may be set aside."""
    following = [_counted(work, known.get(work.name), now) for work in _furthest_back(on_board)]
    guilty = [suspect for suspect in following if suspect.num_deaths >= max_deaths]
    if len(guilty) != 1:
        return following
    condemned = msgspec.structs.replace(guilty[0], is_set_aside=True)
    return [condemned if suspect is guilty[0] else suspect for suspect in following]


def is_doubtful(suspect: Suspect | None, max_deaths: int) -> bool:
    """Whether one more death could tell that it was this one."""
    return suspect is not None and suspect.num_deaths >= max(1, max_deaths - 1)


def is_cleared(suspect: Suspect, work: Work) -> bool:
    """Whether work that has been done shows that the suspect is none."""
    return not suspect.is_set_aside and work.position >= suspect.work.position


def held_until(deaths: Sequence[float], most: int, window_s: float) -> float:
    """Until when nothing durable is begun, so that it ends no more than ``most`` processes in any
    window: whoever starts them has a budget, and what serves requests needs some of it.

    Args:
        deaths: when processes died that had durable work, in order.
        most: deaths in a window; 0 for any number.
        window_s: its length in seconds.
    """
    if most == 0 or len(deaths) < most:
        return 0.0
    return deaths[-most] + window_s


def _furthest_back(on_board: Iterable[Work]) -> list[Work]:
    found: dict[Name, Work] = {}
    for work in on_board:
        other = found.get(work.name)
        if other is None or work.position < other.position:
            found[work.name] = work
    return list(found.values())


def _counted(work: Work, known: Suspect | None, now: float) -> Suspect:
    if known is None or work.position > known.work.position:
        return Suspect(work, 1, now, now)
    return Suspect(work, known.num_deaths + 1, known.first_at, now, known.is_set_aside)
