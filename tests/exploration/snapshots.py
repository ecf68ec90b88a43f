"""Copies of the cluster's own objects, and what makes two of them the same state.

``clone`` copies an object with all that it can change; what is frozen is shared. ``freeze`` makes a
hashable value of it, the same for two objects that will behave alike from now on:

- what only counts or measures is left out (``LEFT_OUT``), and so are functions and configurations,
  which never change;
- the order of a mapping is kept, but for those whose order is never looked at (``UNORDERED``);
- reads in flight are named by what they read, not by the number that they were given.
"""

import dataclasses
import enum
import functools
from collections import Counter, deque
from collections.abc import Hashable, Iterable
from types import BuiltinMethodType, FunctionType, MethodType
from typing import TypeVar, cast

import msgspec

from coordinator.request import Wait
from kvtransfer.events import HandoffBroken
from kvtransfer.handoff.recently_ended import RecentlyEnded
from protocol.errors import RequestError
from protocol.handoff import FetchRefused, HandoffFailed
from protocol.messages import RequestFailed, Tokens
from protocol.plans import DecodePlan, PrefillPlan

T = TypeVar("T")

# Attributes that say nothing of what will happen, by class.
LEFT_OUT: dict[str, frozenset[str]] = {
    "RankState": frozenset({"counters", "identity", "layout"}),
    "RankNode": frozenset({"_ports"}),
    "SourceSide": frozenset({"_num_announced", "_around", "_policy", "_lease_s"}),
    "TargetSide": frozenset({"_num_reads", "_around", "_transport_name", "_max_reads"}),
    "LeaderSide": frozenset({"_around", "_world_size"}),
    "Fetches": frozenset({"_around", "_source", "_leader"}),
    "TargetHandoff": frozenset(
        {"num_bytes", "num_descriptors", "reading_since", "read_s", "layer_landed"}
        | {"prefill_ended"}
    ),
    "DecodeScheduler": frozenset({"facts", "_totals", "_step_started_s"}),
    "PrefixExports": frozenset({"num_blocks_total"}),
    "Batch": frozenset({"_facts", "_num_steps", "num_preemptions", "num_recomputed_tokens"}),
    "Admission": frozenset({"_facts"}),
    "Attempts": frozenset({"_by_request", "_max_ended"}),
    "PrefillScheduler": frozenset(
        {"facts", "_costs", "_step", "num_computed_tokens", "num_cached_tokens"}
        | {"num_fetched_tokens"}
    ),
    "RequestMemory": frozenset({"_facts", "_costs"}),
    "CoordinatorNode": frozenset({"is_complete"}),
    "Service": frozenset(
        {"num_non_finite", "num_quarantined", "_config", "_is_sweeping", "admission", "loads"}
    ),
    "Holding": frozenset({"_ending"}),
    "Placement": frozenset({"_config"}),
    "Failover": frozenset({"_config"}),
    "Registry": frozenset({"_requirements", "_timeouts"}),
    "Rank": frozenset({"last_seen"}),
    "Request": frozenset({"timeline", "stats", "loads", "_share"}),
}
# Mappings of which only the keys and values matter, by attribute.
UNORDERED = frozenset(
    {"announced", "asked", "covered", "layer_heads", "unread", "done", "ready", "closed"}
    | {"_latest", "_counts", "_by_hash", "pools", "_hashes", "_first_of", "_length_of"}
)
NUMBERED = frozenset({"_reads", "reads"})  # their keys are numbers that mean nothing
_LEAVES = (int, float, str, bytes, type(None), enum.Enum, range, msgspec.Struct, Exception)


def clone(value: T) -> T:
    """A copy that shares nothing that can change."""
    return cast(T, _clone(value, {}))


def _clone(value: object, known: dict[int, object]) -> object:
    if _is_leaf(value) or isinstance(value, frozenset | FunctionType | BuiltinMethodType):
        return value
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, tuple):
        return value if all(map(_is_leaf, value)) else tuple(_clone_all(value, known))
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _clone(value.__self__, known))
    if isinstance(value, set | bytearray):
        return value.copy()
    return _clone_structure(value, known)


def _clone_all(values: Iterable[object], known: dict[int, object]) -> list[object]:
    return [_clone(value, known) for value in values]


def _clone_structure(value: object, known: dict[int, object]) -> object:
    made: object
    if isinstance(value, list | deque):
        made = known[id(value)] = type(value)()
        made.extend(_clone_all(value, known))
    elif isinstance(value, dict):
        made = known[id(value)] = type(value)()
        for key, item in value.items():
            made[key] = _clone(item, known)
    else:
        made = known[id(value)] = object.__new__(type(value))
        for name in _attributes(value):
            object.__setattr__(made, name, _clone(getattr(value, name), known))
    return made


def freeze(value: object) -> Hashable:
    """What two objects that will behave alike have in common, and no other two have."""
    return _freeze(value, "", {})


def _freeze(value: object, name: str, known: dict[int, int]) -> Hashable:
    if _is_leaf(value):
        return freeze_leaf(value)
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, tuple | list | deque):
        return tuple(_freeze(item, "", known) for item in value)
    if isinstance(value, set | frozenset):
        return frozenset(value)
    if isinstance(value, dict):
        return _freeze_mapping(value, name, known)
    if isinstance(value, FunctionType | BuiltinMethodType | MethodType):
        return None
    return _freeze_object(value, known)


def freeze_leaf(value: object) -> Hashable:
    """The same of what cannot change: what is only told to people is left out."""
    match value:
        case DecodePlan() | PrefillPlan() | Tokens():
            return repr(msgspec.structs.replace(value, step=0))
        case HandoffFailed() | FetchRefused():
            return repr(msgspec.structs.replace(value, reason=""))
        case HandoffBroken():
            return repr(dataclasses.replace(value, reason=""))
        case RequestFailed():
            return repr(msgspec.structs.replace(value, message=""))
        case Wait():
            return (value.since, value.until, value.not_before, value.home, value.closing)
        case RequestError():
            return value.code
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


def _freeze_mapping(value: dict[Hashable, object], name: str, known: dict[int, int]) -> Hashable:
    if isinstance(value, Counter):
        return frozenset(item for item in value.items() if item[1])
    if name in NUMBERED:
        return frozenset(Counter(value.values()).items())
    items = ((key, _freeze(item, "", known)) for key, item in value.items())
    return frozenset(items) if name in UNORDERED else tuple(items)


def _freeze_object(value: object, known: dict[int, int]) -> Hashable:
    seen = known.get(id(value))
    if seen is not None:
        return ("seen", seen)
    known[id(value)] = len(known)
    if isinstance(value, RecentlyEnded):
        return frozenset(value._keys)  # in order for the sake of those alone that are forgotten
    left_out = LEFT_OUT.get(type(value).__name__, frozenset())
    return tuple(
        _freeze(getattr(value, name), name, known)
        for name in _attributes(value)
        if name not in left_out
    )


def _attributes(value: object) -> list[str]:
    """The names of what an object has, in an order that its class decides."""
    found = [
        name
        for base in type(value).__mro__
        for name in base.__dict__.get("__slots__", ())
        if hasattr(value, name)
    ]
    return found + sorted(getattr(value, "__dict__", ()))


def _is_leaf(value: object) -> bool:
    return isinstance(value, _LEAVES) or _is_frozen(cast(Hashable, type(value)))


@functools.cache
def _is_frozen(kind: Hashable) -> bool:
    parameters = getattr(kind, "__dataclass_params__", None)
    return parameters is not None and parameters.frozen
