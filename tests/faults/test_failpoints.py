"""The grammar of failpoints, when they fire, and what a wrong one is told."""

from collections import Counter
from typing import Any

import pytest

from engine.rank_config import RankConfig
from protocol.errors import ConfigError
from protocol.handoff import Announce, ReadDone
from protocol.messages import Ticket
from protocol.process.failpoints import ACTIONS, Failpoints, Fault, kind_of


def _hits(text: str, name: str, count: int, kind: str = "") -> list[int]:
    """Which of the first ``count`` times something happens, from 1."""
    points = Failpoints(text)
    return [i for i in range(1, count + 1) if points.reach(name, kind) is not None]


def test_none_by_default() -> None:
    assert not Failpoints("")
    assert not Failpoints("  ")
    assert Failpoints("").reach("step") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("step:hang@3", [3]),
        ("step:hang@1", [1]),
        ("step:hang@every:4", [4, 8]),
        ("step:hang", list(range(1, 11))),
        ("step:hang%1:1", list(range(1, 11))),
        ("step:hang%1:0", []),
    ],
)
def test_triggers(text: str, expected: list[int]) -> None:
    assert _hits(text, "step", 10) == expected


def test_chances_are_the_seeds_alone() -> None:
    first = _hits("transfer.read:fail%7:0.3", "transfer.read", 1000)
    assert first == _hits("transfer.read:fail%7:0.3", "transfer.read", 1000)
    assert first != _hits("transfer.read:fail%8:0.3", "transfer.read", 1000)
    assert 200 < len(first) < 400


def test_kinds_narrow_a_place() -> None:
    text = "handoff.send.read_done:drop@2"
    assert _hits(text, "handoff.send", 5, "read_done") == [2]
    assert _hits(text, "handoff.send", 5, "announce") == []
    assert _hits("handoff.send:drop@2", "handoff.send", 5, "announce") == [2]
    assert [kind_of(kind) for kind in (ReadDone, Announce, Ticket)] == [
        "read_done",
        "announce",
        "ticket",
    ]


def test_hits_are_counted_and_the_first_of_several_is_done() -> None:
    counters: Counter[str] = Counter(dropped_duplicate=3)
    points = Failpoints("handoff.send:delay=0.25@2, handoff.send.commit:drop@every:2", counters)
    assert points.reach("handoff.send", "commit") is None
    assert points.reach("handoff.send", "commit") == Fault("delay", 0.25)
    assert points.reach("handoff.send", "commit") is None
    assert points.reach("handoff.send", "commit") == Fault("drop")
    assert counters == {
        "dropped_duplicate": 3,
        "failpoint:handoff.send:delay": 1,
        "failpoint:handoff.send.commit:drop": 1,
    }


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("step", "write NAME:ACTION"),
        ("transfer.write:fail", "no place 'transfer.write'"),
        ("step.announce:hang", "no place 'step.announce'"),
        ("handoff.send.:drop", "no place 'handoff.send.'"),
        ("handoff.send.ticket:drop", "no place 'handoff.send.ticket'"),
        ("control.send.announce:drop", "no place 'control.send.announce'"),
        ("step:drop@3", "step cannot 'drop'"),
        ("handoff.send:explode", "cannot 'explode'"),
        ("step:hang@0", "'@0'"),
        ("step:hang@-1", "'@-1'"),
        ("step:hang@every:", "'@every:'"),
        ("step:hang@soon", "'@soon'"),
        ("step:hang%0.5", "'%0.5'"),
        ("step:hang%x:0.5", "'%x:0.5'"),
        ("step:hang%1:1.5", "probability 1.5"),
        ("step:hang%1:nan", "'nan'"),
        ("step:delay@3", "delay=SECONDS"),
        ("step:hang=3", "delay=SECONDS"),
        ("step:delay=long", "'long'"),
        ("step:delay=-1", "'-1'"),
        ("step:hang,,step:hang", "''"),
    ],
)
def test_what_is_wrong_is_named(text: str, part: str) -> None:
    with pytest.raises(ConfigError, match="failpoints: ") as caught:
        Failpoints(text)
    assert part in str(caught.value)


def test_every_action_of_every_place_is_understood() -> None:
    for place, actions in ACTIONS.items():
        for action in actions:
            text = f"{place}:{action}=1" if action in ("delay", "hold") else f"{place}:{action}"
            fault = Failpoints(text).reach(place)
            assert fault is not None
            assert fault.action == action


def test_a_rank_refuses_wrong_ones_before_it_starts() -> None:
    fields: dict[str, Any] = {
        "model": "arithmetic",
        "pool_id": "d",
        "control_address": "x",
        "token": "t",
    }
    RankConfig(**fields, listen="ipc:///x", failpoints="step:hang@3")
    with pytest.raises(ConfigError, match="step cannot 'drop'"):
        RankConfig(**fields, listen="ipc:///x", failpoints="step:drop")
