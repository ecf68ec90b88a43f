"""Pins: what a caller may promise itself about a document's KV, and for how long. Pure.

*soft* is kept as long as there is room and evicted after what nobody has pinned; *hard* is kept,
and counts against its tenant's quota when it is asked for. Both end by themselves. What is pinned
by all tenants together never takes more than a share of the store, and what one has pinned leaves
some of that to the others.
"""

import re
from dataclasses import dataclass

from coordinator.config import JobLimits
from coordinator.errors import invalid_value
from coordinator.jobs.documents.document import ANY_TIER, HARD, NO_PIN, SOFT, Pin
from protocol.errors import RequestError

MODES = (NO_PIN, SOFT, HARD)
TIERS = ("gpu", "cpu", "disk", ANY_TIER)
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(s|m|h|d)")
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def read_duration(value: str | float, param: str) -> float:
    """Seconds, from a number of them or a text such as ``90s``, ``2h`` or ``7d``.

    Raises:
        RequestError: neither, or nothing at all.
    """
    if isinstance(value, str):
        match = _DURATION.fullmatch(value)
        seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    else:
        seconds = float(value)
    if not seconds > 0:
        raise invalid_value(
            param.split(".")[0], f"{param}: a duration is a text such as '90s', '15m', '2h' or '7d'"
        )
    return seconds


def read_pin(
    mode: str,
    ttl: str | float | None,
    tier: str | None,
    sliding: bool | None,
    limits: JobLimits,
    tiers: tuple[str, ...],
) -> Pin:
    """A pin as it was asked for, checked.

    Args:
        mode: none, soft or hard.
        ttl: how long; None takes the default.
        tier: where; None takes any.
        sliding: whether questions extend it.
        limits: the longest pin.
        tiers: that this cluster has.

    Raises:
        RequestError: naming the field at fault.
    """
    tier = ANY_TIER if tier is None else tier
    if tier not in TIERS:
        raise invalid_value("pin", f"pin.tier must be one of {', '.join(TIERS)}")
    if tier != ANY_TIER and tier not in tiers:
        raise invalid_value(
            "pin", f"pin.tier: this cluster has no {tier} tier, but {', '.join(tiers)}"
        )
    if mode == NO_PIN:
        return Pin(tier=tier)
    ttl_s = limits.default_pin_s if ttl is None else read_duration(ttl, "pin.ttl")
    if ttl_s > limits.max_pin_s:
        raise invalid_value(
            "pin", f"pin.ttl is {ttl_s:.0f} s, a pin lasts at most {limits.max_pin_s:.0f} s"
        )
    return Pin(mode, ttl_s, tier, bool(sliding))


@dataclass(frozen=True, slots=True)
class Pinned:
    """What is pinned already, but for the document in question."""

    num_tokens: int  # by anybody, in any mode
    num_hard_tokens: int  # by the tenant
    num_own_tokens: int = 0  # by the tenant, in any mode


class PinPolicy:
    """Decides which pins there is room for.

    Args:
        limits: the store's size, and the shares of it.
        bytes_per_token: of KV, of the whole model.
    """

    def __init__(self, limits: JobLimits, bytes_per_token: int) -> None:
        self.bytes_per_token = bytes_per_token
        self.max_bytes = int(limits.disk_quota_bytes * limits.pinned_share)
        self.max_own_bytes = int(limits.disk_quota_bytes * limits.tenant_pin_share)
        self.max_hard_bytes = int(limits.disk_quota_bytes * limits.hard_pin_share)

    def check(self, pin: Pin, num_tokens: int, pinned: Pinned) -> None:
        """Whether a document may be pinned so.

        Raises:
            RequestError: ``pin_quota_exceeded``, with both numbers.
        """
        for what, num_pinned, allowed, is_meant in (
            ("your hard pins", pinned.num_hard_tokens, self.max_hard_bytes, pin.mode == HARD),
            ("all pins together", pinned.num_tokens, self.max_bytes, pin.is_set),
            ("your pins", pinned.num_own_tokens, self.max_own_bytes, pin.is_set),
        ):
            needed = (num_pinned + num_tokens) * self.bytes_per_token
            if is_meant and needed > allowed:
                raise RequestError(
                    f"with this document {what} would take {needed} bytes, of {allowed} that may "
                    f"be pinned: unpin another document, or choose a lesser pin",
                    code="pin_quota_exceeded",
                    param="pin",
                    status=409,
                )
