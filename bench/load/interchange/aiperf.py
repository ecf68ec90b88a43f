"""AIPerf's ``profile_export.jsonl``: one JSON object per request.

Its instants are nanoseconds of the epoch, its metrics milliseconds from sending; ``credit_issued``
is when the request was due. ``inter_token_latency`` is a mean per request, what we call TPOT, and
``inter_chunk_latency`` has the gaps between events.
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.load.analysis.metrics import gaps_of, ttft_sent_of
from bench.load.analysis.slo import tpot_of
from bench.load.interchange.foreign import (
    counts_of,
    imported,
    read_bytes,
    read_object,
    running_times,
)
from bench.load.record import CANCELLED, OK, Manifest, RequestRecord
from protocol.errors import ConfigError

SOURCE = "AIPerf"
WHY = "whether its workers kept up with its schedule is not known"
CANCELLED_CODE = 499
NS = 1e9


def export_aiperf(manifest: Manifest, records: Sequence[RequestRecord]) -> Iterator[dict[str, Any]]:
    """One target's records that were sent, by the time of sending."""
    origin_ns = _epoch_ns(manifest.started_at)
    sessions: dict[str, int] = {}
    asked = sorted((r for r in records if r.outcome != "unsent"), key=lambda r: r.sent_s)
    for record in asked:
        number = sessions.setdefault(record.session, len(sessions))
        yield {
            "metadata": _metadata(record, number, origin_ns),
            "metrics": _metrics(record),
            "error": _error(record),
        }


def _metadata(record: RequestRecord, session_num: int, origin_ns: int) -> dict[str, Any]:
    def epoch(at_s: float | None) -> int | None:
        return None if at_s is None else origin_ns + round(at_s * NS)

    is_cancelled = record.outcome == CANCELLED
    end_s = record.finished_s if record.finished_s is not None else record.sent_s
    return {
        "session_num": session_num,
        "x_request_id": record.request_id or f"{record.target}-{record.index}",
        "x_correlation_id": record.session,
        "conversation_id": record.session,
        "turn_index": record.turn,
        "credit_issued_ns": epoch(record.intended_s),
        "request_start_ns": epoch(record.sent_s),
        "request_ack_ns": epoch(record.headers_s),
        "request_end_ns": epoch(end_s),
        "worker_id": "baton",
        "record_processor_id": "baton",
        "benchmark_phase": "profiling",
        "was_cancelled": is_cancelled,
        "cancellation_time_ns": epoch(end_s) if is_cancelled else None,
    }


def _metrics(record: RequestRecord) -> dict[str, Any]:
    if record.outcome != OK:
        return {"error_isl": _value(record.num_prompt_tokens, "tokens")}
    found = {
        "input_sequence_length": _value(record.num_prompt_tokens, "tokens"),
        "output_token_count": _value(record.num_output_tokens, "tokens"),
        "output_sequence_length": _value(record.num_output_tokens, "tokens"),
    }
    ttft_s, tpot_s = ttft_sent_of(record), tpot_of(record)
    if ttft_s is not None:
        found["time_to_first_token"] = _value(1e3 * ttft_s, "ms")
    if record.finished_s is not None:
        found["request_latency"] = _value(1e3 * (record.finished_s - record.sent_s), "ms")
    if tpot_s is not None:
        found["inter_token_latency"] = _value(1e3 * tpot_s, "ms")
    gaps_ms = [1e3 * gap for gap in gaps_of(record)]
    if gaps_ms:
        found["inter_chunk_latency"] = _value(gaps_ms, "ms")
    return found


def _value(value: float | list[float], unit: str) -> dict[str, Any]:
    return {"value": value, "unit": unit}


def _error(record: RequestRecord) -> dict[str, Any] | None:
    if record.outcome == OK:
        return None
    if record.outcome == CANCELLED:
        kind = "RequestCancellationError"
        return {"code": CANCELLED_CODE, "type": kind, "message": "cancelled as planned"}
    return {"code": record.status, "type": record.outcome, "message": record.error_code}


def _epoch_ns(started_at: str) -> int:
    try:
        moment = datetime.fromisoformat(started_at)
    except ValueError:
        return 0
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return int(moment.timestamp()) * 1_000_000_000


def import_aiperf(path: Path) -> tuple[Manifest, list[RequestRecord]]:
    """A file of records as a run; requests of the warm-up are left out.

    Raises:
        ConfigError: it is no such file.
    """
    rows = []
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        if line.strip():
            row = read_object(line, f"{path}:{number}")
            if not isinstance(row.get("metadata"), dict):
                raise ConfigError(f"{path}:{number}: no metadata: not a profile_export.jsonl")
            rows.append(row)
    kept = [row for row in rows if row["metadata"].get("benchmark_phase") != "warmup"]
    try:
        origin_ns = min((_due_ns(row["metadata"]) for row in kept), default=0)
        records = [_record(index, row, origin_ns) for index, row in enumerate(kept)]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not what AIPerf writes: {error!r}") from error
    arrival = {"name": "as recorded"}
    return imported(records, source=SOURCE, why=WHY, arrival=arrival, model=""), records


def _due_ns(metadata: dict[str, Any]) -> int:
    return int(metadata.get("credit_issued_ns") or metadata["request_start_ns"])


def _record(index: int, row: dict[str, Any], origin_ns: int) -> RequestRecord:
    metadata, metrics = row["metadata"], row.get("metrics") or {}

    def at(name: str) -> float | None:
        stamp = metadata.get(name)
        return None if stamp is None else (int(stamp) - origin_ns) / NS

    def of(name: str) -> Any:  # noqa: ANN401 - a number or a list of them
        return (metrics.get(name) or {}).get("value")

    error = row.get("error") or {}
    outcome = _outcome(error, was_cancelled=bool(metadata.get("was_cancelled")))
    sent_s = at("request_start_ns") or 0.0
    ttft_ms = of("time_to_first_token")
    gaps_ms = of("inter_chunk_latency") or []
    times = () if ttft_ms is None else running_times(sent_s + ttft_ms / 1e3, _seconds(gaps_ms))
    num_output = int(of("output_sequence_length") or of("output_token_count") or 0)
    tpot_ms = of("inter_token_latency")
    if len(times) == 1 and num_output > 1 and tpot_ms is not None:
        times = (times[0], times[0] + (num_output - 1) * tpot_ms / 1e3)  # its gaps were not kept
    return RequestRecord(
        "aiperf",
        index,
        str(metadata.get("x_correlation_id") or metadata.get("conversation_id") or index),
        int(metadata.get("turn_index") or 0),
        "imported",
        (_due_ns(metadata) - origin_ns) / NS,
        sent_s,
        at("request_ack_ns"),
        times,
        counts_of(len(times), num_output),
        at("request_end_ns"),
        int(of("input_sequence_length") or of("error_isl") or 0),
        num_output,
        outcome=outcome,
        status=error.get("code") if isinstance(error.get("code"), int) else None,
        error_code=str(error.get("type") or ""),
        request_id=str(metadata.get("x_request_id") or ""),
    )


def _seconds(values_ms: Sequence[float]) -> list[float]:
    return [value / 1e3 for value in values_ms]


def _outcome(error: dict[str, Any], *, was_cancelled: bool) -> str:
    if was_cancelled:
        return CANCELLED
    if not error:
        return OK
    return "timeout" if "timeout" in str(error.get("type", "")).lower() else "http_error"
