"""What should have come of a request, and has not. Pure; time comes as an argument.

Messages are lost when a connection to the coordinator breaks; between ranks they are sent again,
but two pools may not reach each other at all. No request depends on a single message: a pool that
is silent about it is asked how it stands, and what cannot come any more costs an attempt.
"""

from coordinator.config import CoordinatorConfig
from coordinator.records.records import Record, RecordState
from protocol.errors import RequestError


def overdue(
    record: Record, config: CoordinatorConfig, now: float, *, is_cut: bool = False
) -> RequestError | None:
    """Why this attempt will come to nothing, or None while it may. Call it once in a while.

    Args:
        record: the request's.
        config: budgets.
        now: on the clock of the record.
        is_cut: its two pools do not reach each other at the moment.
    """
    if record.state is RecordState.WAITING or not record.is_active:
        return None
    if is_cut and record.state is RecordState.PREFILLING:
        text = f"{record.prefill_pool} and {record.decode_pool} do not reach each other"
        return RequestError(text, code="handoff_failed", status=503)
    if not record.lacks_a_message:
        record.stalled_since = None
    elif record.stalled_since is None:
        record.stalled_since = now
    elif now - record.stalled_since > config.stall_timeout_s:
        return _stalled("a message about this request was lost")
    is_handing_over = record.state is RecordState.PREFILLING and record.path is not None
    if is_handing_over and now - record.prefilled_at > config.handoff_timeout_s:
        return _stalled("its KV was not handed over in time")
    return None


def pools_to_ask(record: Record, config: CoordinatorConfig, now: float) -> list[str]:
    """Pools that work on it, when none has said anything of it for a while."""
    if record.state is RecordState.WAITING or not record.is_active:
        return []
    if now - record.heard_at <= config.stall_timeout_s:
        return []
    record.heard_at = now
    return sorted(pool_id for pool_id, attempt in record.holders if attempt == record.attempt)


def _stalled(message: str) -> RequestError:
    return RequestError(message, code="stalled", status=503)
