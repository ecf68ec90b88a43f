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
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any, TypeVar

import msgspec

from coordinator.records import Wait
from kvtransfer.events import HandoffBroken, RefuseFetch
from protocol.errors import RequestError
from protocol.handoff import FetchRefused, HandoffFailed
from protocol.messages import RequestFailed, Tokens
from protocol.plans import DecodePlan, PrefillPlan

T = TypeVar("T")

# Attributes that say nothing of what will happen, by class.
LEFT_OUT: dict[str, frozenset[str]] = {
    "Surroundings": frozenset({"counters", "identity", "layout"}),
    "SourceSide": frozenset({"_num_announced", "_around", "_policy", "_lease_s"}),
    "TargetSide": frozenset({"_num_reads", "_around", "_transport_name", "_max_reads"}),
    "LeaderSide": frozenset({"_around", "_world_size"}),
    "Fetches": frozenset({"_around", "_source", "_leader"}),
    "TargetHandoff": frozenset(
        {"num_bytes", "num_descriptors", "reading_since", "read_s", "layer_landed"}
        | {"prefill_ended"}
    ),
    "DecodeScheduler": frozenset({"_totals", "_step_started_s", "_model_fingerprint"}),
    "Serving": frozenset({"num_blocks_total"}),
    "Batch": frozenset({"_limits", "_num_steps", "num_preemptions", "num_recomputed_tokens"}),
    "Admission": frozenset({"_limits"}),
    "PrefillScheduler": frozenset(
        {"facts", "_costs", "_step", "num_computed_tokens", "num_cached_tokens"}
        | {"num_fetched_tokens"}
    ),
    "RequestMemory": frozenset({"_facts", "_costs"}),
    "Service": frozenset({"metrics", "_config"}),
    "Placement": frozenset({"_config"}),
    "Failover": frozenset({"_config"}),
    "Registry": frozenset({"_terms", "_patience"}),
    "Record": frozenset({"timeline", "stats"}),
}
# Mappings of which only the keys and values matter, by attribute.
UNORDERED = frozenset(
    {"announced", "asked", "covered", "layer_heads", "unread", "done", "ready", "closed"}
    | {"_latest", "_counts", "_by_hash", "pools", "_hashes", "_first_of", "_length_of"}
)
NUMBERED = frozenset({"_reads", "reads"})  # their keys are numbers that mean nothing
SETS_IN_ORDER = frozenset({"Tombs"})  # ordered only for the sake of those that are forgotten
_LEAVES = (int, float, str, bytes, bool, type(None), enum.Enum, range, msgspec.Struct, Exception)
_FUNCTIONS = (FunctionType, BuiltinMethodType, MethodType)


def clone(value: T) -> T:
    """A copy that shares nothing that can change."""
    return _clone(value, {})  # type: ignore[no-any-return]


def _clone(value: Any, known: dict[int, Any]) -> Any:
    if isinstance(value, _LEAVES) or _is_frozen(type(value)):
        return value
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, tuple):
        return value if all(map(_is_leaf, value)) else tuple(_clone(item, known) for item in value)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _clone(value.__self__, known))
    if isinstance(value, frozenset | FunctionType | BuiltinMethodType):
        return value
    copy = _CONTAINERS.get(type(value), _clone_object)
    return copy(value, known)


def _clone_list(value: list[Any], known: dict[int, Any]) -> list[Any]:
    known[id(value)] = made = []
    made.extend(_clone(item, known) for item in value)
    return made


def _clone_mapping(value: dict[Any, Any], known: dict[int, Any]) -> dict[Any, Any]:
    known[id(value)] = made = type(value)()
    for key, item in value.items():
        made[key] = _clone(item, known)
    return made


def _clone_object(value: Any, known: dict[int, Any]) -> Any:
    known[id(value)] = made = object.__new__(type(value))
    for name in _attributes(value):
        object.__setattr__(made, name, _clone(getattr(value, name), known))
    return made


_CONTAINERS: dict[type, Callable[[Any, dict[int, Any]], Any]] = {
    list: _clone_list,
    dict: _clone_mapping,
    OrderedDict: _clone_mapping,
    Counter: _clone_mapping,
    deque: lambda value, known: deque(_clone(item, known) for item in value),
    set: lambda value, _: set(value),
    bytearray: lambda value, _: bytearray(value),
}


def freeze(value: Any) -> Hashable:
    """What two objects that will behave alike have in common, and no other two have."""
    return _freeze(value, "", {})


def _freeze(value: Any, name: str, known: dict[int, int]) -> Hashable:
    if isinstance(value, _LEAVES) or _is_frozen(type(value)):
        return freeze_leaf(value)
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, tuple | list | deque):
        return tuple(_freeze(item, "", known) for item in value)
    if isinstance(value, set | frozenset):
        return frozenset(value)
    if isinstance(value, dict):
        return _freeze_mapping(value, name, known)
    if isinstance(value, _FUNCTIONS):
        return None
    return _freeze_object(value, known)


def freeze_leaf(value: Any) -> Hashable:
    """The same of what cannot change."""
    match value:
        case DecodePlan() | PrefillPlan() | Tokens():
            return repr(msgspec.structs.replace(value, step=0))
        case HandoffFailed() | FetchRefused() | HandoffBroken() | RefuseFetch():
            return repr(value).replace(repr(value.reason), "")
        case RequestFailed():
            return repr(msgspec.structs.replace(value, message=""))
        case Wait():
            return repr(dataclasses.replace(value, error=None))  # type: ignore[arg-type]
        case RequestError():
            return value.code
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value  # type: ignore[no-any-return]


def _freeze_mapping(value: dict[Any, Any], name: str, known: dict[int, int]) -> Hashable:
    if isinstance(value, Counter):
        return frozenset(item for item in value.items() if item[1])
    if name in NUMBERED:
        return frozenset(Counter(value.values()).items())
    items = ((key, _freeze(item, "", known)) for key, item in value.items())
    return frozenset(items) if name in UNORDERED else tuple(items)


def _freeze_object(value: Any, known: dict[int, int]) -> Hashable:
    seen = known.get(id(value))
    if seen is not None:
        return ("seen", seen)
    known[id(value)] = len(known)
    kind = type(value).__name__
    if kind in SETS_IN_ORDER:
        return frozenset(value._keys)
    left_out = LEFT_OUT.get(kind, frozenset())
    return tuple(
        _freeze(getattr(value, name), name, known)
        for name in _attributes(value)
        if name not in left_out
    )


def _attributes(value: Any) -> list[str]:
    """The names of what an object has, in an order that its class decides."""
    found = [
        name
        for base in type(value).__mro__
        for name in base.__dict__.get("__slots__", ())
        if hasattr(value, name)
    ]
    return found + sorted(getattr(value, "__dict__", ()))


@functools.cache
def _is_frozen(kind: type) -> bool:
    parameters = getattr(kind, "__dataclass_params__", None)
    return parameters is not None and parameters.frozen


def _is_leaf(value: Any) -> bool:
    return isinstance(value, _LEAVES) or _is_frozen(type(value))
