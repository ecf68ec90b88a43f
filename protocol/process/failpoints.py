"""Failpoints: named places at which a process can be made to fail. Pure; off unless configured.

A configuration is a list of ``NAME:ACTION[TRIGGER]``, separated by commas:

    transfer.read:corrupt@3                 the third read
    handoff.send.announce:drop@every:10     each tenth announcement
    handoff.send:delay=0.05%7:0.1           one message of ten, drawn with the seed 7
    step:hang                               each time, which here is the first

``control.send`` and ``handoff.send`` can be narrowed to one kind of message: ``.announce``,
``.read_done``, ``.ticket``..., ``jobs.commit.before`` and ``.after`` to one kind of change, and
``jobs.file.*`` to one kind of file (see ``KINDS``). ``handoff.send`` is reached by frames on their
way to another rank. A frame that is dropped there is sent again, and reaches it again.
``.acknowledgement`` is a kind too.

``loop`` is reached by the coordinator's event loop before it sends a message to a rank, and can be
narrowed as ``control.send``: ``loop.alive:hold=8@20`` keeps the GIL and a core for 8 s, ``delay=8``
blocks the loop without either, ``hang`` does so for good, ``stop`` is SIGSTOP.

A place calls ``reach`` and carries out the fault that it gets. Every hit is counted, and the
heartbeat carries the counts, so that a test can see that its fault took effect.
"""

import random
import re
import typing
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from protocol.errors import ConfigError
from protocol.frames import Acknowledgement
from protocol.handoff import HandoffMessage
from protocol.messages import ToCoordinator, ToRank

DROP, DUPLICATE, DELAY, EXIT = "drop", "duplicate", "delay", "exit"
CORRUPT, FAIL, HANG = "corrupt", "fail", "hang"
HOLD, STOP = "hold", "stop"
COUNTER_PREFIX = "failpoint:"

HANDOFF_SEND, CONTROL_SEND = "handoff.send", "control.send"
TRANSFER_READ, STEP, LOOP = "transfer.read", "step", "loop"
# What jobs and packs make durable: each place lies between two effects that outlive the process.
COMMIT_BEFORE, COMMIT_AFTER = "jobs.commit.before", "jobs.commit.after"
FILE_WRITE, FILE_RENAMED = "jobs.file.write", "jobs.file.renamed"
FILE_REMOVED = "jobs.file.removed"
PARSE = "jobs.parse"
SEGMENT_BEFORE, SEGMENT_AFTER = "jobs.segment.before", "jobs.segment.after"
RESULT_ANSWERED, RESULT_APPEND = "jobs.result.answered", "jobs.result.append"
RESULT_DONE = "jobs.result.done"
PACK_WRITTEN, PACK_SYNCED = "pack.written", "pack.synced"
PACK_RENAMED, PACK_DELETED = "pack.renamed", "pack.deleted"

_TIMED = frozenset({DELAY, HOLD})
_LATE = frozenset({DELAY, EXIT})  # it is done: nothing can fail any more
_FULL = frozenset({DELAY, EXIT, FAIL})  # a full disk, before it is done

ACTIONS: dict[str, frozenset[str]] = {
    HANDOFF_SEND: frozenset({DROP, DUPLICATE, DELAY, EXIT}),
    CONTROL_SEND: frozenset({DROP, DUPLICATE, DELAY, EXIT}),
    TRANSFER_READ: frozenset({CORRUPT, DELAY, FAIL, EXIT}),
    STEP: frozenset({DELAY, HANG, EXIT}),
    LOOP: frozenset({DELAY, HANG, HOLD, STOP, EXIT}),
    COMMIT_BEFORE: _FULL,  # the changes of a transaction are made, and not committed
    COMMIT_AFTER: _LATE,
    FILE_WRITE: _FULL,  # all of a file is on the disk, under another name
    FILE_RENAMED: _LATE,  # it has its name, or its link; the folder is not synced
    FILE_REMOVED: _LATE,
    PARSE: _LATE,  # an uploaded file is to be read
    SEGMENT_BEFORE: _LATE,
    SEGMENT_AFTER: _LATE,  # a document's segment is stored, and not recorded
    RESULT_ANSWERED: _LATE,  # a line of a batch is answered, and not recorded
    RESULT_APPEND: _LATE,  # lines are in the files of a batch, which are not synced
    RESULT_DONE: _LATE,  # both files are whole, neither has its name
    PACK_WRITTEN: _FULL,
    PACK_SYNCED: _FULL,
    PACK_RENAMED: _FULL,  # the folder is not synced
    PACK_DELETED: _LATE,
}


def kind_of(message: type) -> str:
    """The name of a kind of message as failpoints write it: ``ReadDone`` is ``read_done``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", message.__name__).lower()


CHANGES = frozenset(
    {
        *("owner_claimed", "document_added", "document_changed", "document_deleted"),
        *("batch_added", "batch_changed", "batch_closed", "cleaned_up", "judged"),
        *("lines_added", "lines_removed", "line_answered"),
        *("file_added", "file_deleted", "files_expired"),
    }
)
KINDS: dict[str, frozenset[str]] = {
    HANDOFF_SEND: frozenset(map(kind_of, typing.get_args(HandoffMessage | Acknowledgement))),
    CONTROL_SEND: frozenset(map(kind_of, typing.get_args(ToCoordinator | ToRank))),
    LOOP: frozenset(map(kind_of, typing.get_args(ToRank))),
    COMMIT_BEFORE: CHANGES,
    COMMIT_AFTER: CHANGES,
    FILE_WRITE: frozenset({"upload", "output", "source", "text", "tokens"}),
    FILE_RENAMED: frozenset({"upload", "output", "input", "source", "text", "tokens"}),
    FILE_REMOVED: frozenset({"upload", "input", "source", "text", "tokens"}),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """The action for a place; ``seconds`` of those that take time."""

    action: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Failpoint:
    """One entry of a configuration; ``fires`` gets the number of the pass, from 1."""

    name: str
    fault: Fault
    fires: Callable[[int], bool]

    @property
    def counter(self) -> str:
        """Its name in the heartbeat's counters."""
        return f"{COUNTER_PREFIX}{self.name}:{self.fault.action}"


class Failpoints:
    """The failpoints of one thread. False when there are none.

    Args:
        text: see the module's docstring; empty for none.
        hits: where they are counted; a new counter by default.

    Raises:
        ConfigError: it names the part of ``text`` that is wrong.
    """

    def __init__(self, text: str, hits: Counter[str] | None = None) -> None:
        entries = [part.strip() for part in text.split(",")] if text.strip() else []
        self._points = tuple(_parse(entry) for entry in entries)
        self._num_reached = [0] * len(self._points)
        self.hits: Counter[str] = Counter() if hits is None else hits

    def __bool__(self) -> bool:
        return bool(self._points)

    def reach(self, name: str, kind: str = "") -> Fault | None:
        """The fault to carry out here now, if any; of several that fire, the first one."""
        found: Fault | None = None
        for index, point in enumerate(self._points):
            if point.name != name and point.name != f"{name}.{kind}":
                continue
            self._num_reached[index] += 1
            if point.fires(self._num_reached[index]) and found is None:
                self.hits[point.counter] += 1
                found = point.fault
        return found


def _parse(entry: str) -> Failpoint:
    name, colon, rest = entry.partition(":")
    if not colon:
        raise ConfigError(f"failpoints: {entry!r}: write NAME:ACTION, then @N, @every:N or %SEED:P")
    place = next((p for p in ACTIONS if name == p), None)
    if place is None:
        base, _, kind = name.rpartition(".")
        place = base if kind in KINDS.get(base, ()) else None
    if place is None:
        raise ConfigError(
            f"failpoints: {entry!r}: there is no place {name!r}, only {', '.join(ACTIONS)}"
        )
    fault_text, fires = _split_trigger(entry, rest)
    return Failpoint(name, _parse_fault(entry, place, fault_text), fires)


def _parse_fault(entry: str, place: str, text: str) -> Fault:
    action, equals, amount = text.partition("=")
    if action not in ACTIONS[place]:
        choices = ", ".join(sorted(ACTIONS[place]))
        raise ConfigError(f"failpoints: {entry!r}: {place} cannot {action!r}, only {choices}")
    if (action in _TIMED) != bool(equals):
        raise ConfigError(
            f"failpoints: {entry!r}: write delay=SECONDS or hold=SECONDS, and no other with '='"
        )
    if not equals:
        return Fault(action)
    seconds = _number(entry, amount, "seconds")
    return Fault(action, seconds)


def _split_trigger(entry: str, text: str) -> tuple[str, Callable[[int], bool]]:
    action, at, trigger = text.partition("@")
    if at:
        every = trigger.removeprefix("every:")
        if not (every.isascii() and every.isdigit() and int(every) > 0):
            raise ConfigError(f"failpoints: {entry!r}: '@{trigger}' is not @N or @every:N from 1")
        number = int(every)
        if every == trigger:
            return action, lambda count: count == number
        return action, lambda count: count % number == 0
    action, percent, trigger = text.partition("%")
    if not percent:
        return action, lambda _: True
    seed, colon, chance = trigger.partition(":")
    if not (colon and seed.isascii() and seed.isdigit()):
        raise ConfigError(f"failpoints: {entry!r}: '%{trigger}' is not %SEED:PROBABILITY")
    probability = _number(entry, chance, "probability")
    if probability > 1:
        raise ConfigError(f"failpoints: {entry!r}: the probability {chance} is above 1")
    rng = random.Random(int(seed))
    return action, lambda _: rng.random() < probability


def _number(entry: str, text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise ConfigError(f"failpoints: {entry!r}: {what} {text!r} is not a number from 0 on")
    return value
