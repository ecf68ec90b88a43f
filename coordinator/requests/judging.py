"""What follows when a pool says that it cannot go on with a request. Pure; time is an argument.

Another pool may be able to, or be the one that tells whose fault it is; else the request ends.
"""

from dataclasses import dataclass

from coordinator.cluster.placement import Placement
from coordinator.config import CoordinatorConfig
from coordinator.errors import pool_failure
from coordinator.records.records import Record
from coordinator.requests.failover import HEALED_BY_ANOTHER, TOO_SMALL
from coordinator.requests.flaws import Flaws
from protocol.errors import RequestError
from protocol.messages import RequestFailed
from protocol.request import NoToken


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with a request."""

    error: RequestError  # for which the attempt is over
    goes_on: bool  # with another attempt
    home: str = ""  # a pool that still has something of it
    pause: bool = False  # there is nobody else to ask
    is_doubtful: bool = False  # its KV may be wrong, wherever it lies


class Judge:
    """Knows who failed before.

    Args:
        config: how often a pool may.
        placement: which pools there are.
    """

    def __init__(self, config: CoordinatorConfig, placement: Placement) -> None:
        self._placement = placement
        self.flaws = Flaws(config.non_finite_requests, config.non_finite_window_s)

    def on_failed(
        self, record: Record, pool_id: str, message: RequestFailed, now: float
    ) -> Verdict:
        """A pool has failed on its present attempt."""
        error = pool_failure(message.code, message.message)
        named = pool_failure(message.code, f"{pool_id}: {message.message}")
        if message.code == TOO_SMALL:
            record.too_small.add(pool_id)
            fits = record.num_output_tokens > 0 or not self._placement.is_too_large(record)
            home = record.decode_pool if pool_id != record.decode_pool else ""
            return Verdict(named if fits else error, fits, home)
        if message.code == NoToken.NON_FINITE:
            # What one has computed, the other may have spoilt on the way: both are avoided.
            record.blamed |= {record.decode_pool, record.prefill_pool} - {""}
            can_avoid = self._placement.can_avoid(record, pool_id)
            goes_on = self.flaws.on_flaw(record, pool_id, now, can_avoid=can_avoid)
            return Verdict(named if goes_on else error, goes_on, is_doubtful=True)
        if message.code in HEALED_BY_ANOTHER:
            # Who computed it is the first to be avoided, who was to receive it the second.
            suspect = record.prefill_pool or record.decode_pool
            record.blamed.add(record.decode_pool if suspect in record.blamed else suspect)
            pause = not self._placement.has_blameless(record)
            return Verdict(named, True, record.decode_pool, pause)
        return Verdict(error, goes_on=False)
