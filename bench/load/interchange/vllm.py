"""``vllm bench serve --save-result --save-detailed``: one JSON object with a list per quantity.

Its ``ttfts`` and ``latencies`` count from sending, which is after the wait for a free place when
``--max-concurrency`` is set; ``queue_times`` is that wait. Its ``itls`` are gaps between events. A
failed request has an ``errors`` entry and stays in the lists, but not in the means.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any

import numpy as np

from bench.load.analysis.metrics import gaps_of, summarise, ttft_sent_of
from bench.load.analysis.slo import Slo, tpot_of
from bench.load.interchange.foreign import (
    counts_of,
    imported,
    read_bytes,
    read_object,
    running_times,
)
from bench.load.record import OK, Manifest, RequestRecord
from protocol.errors import ConfigError

SOURCE = "vllm bench serve"
DETAILED = ("input_lens", "output_lens", "ttfts", "itls", "errors")
WHY = (
    "its clock starts when a request was handed to the client, not when it was due, so what its "
    "pacing lost is not in these figures"
)


def export_vllm(
    manifest: Manifest, records: Sequence[RequestRecord], slo: Slo | None = None
) -> dict[str, Any]:
    """One target's records, under vLLM's names and by vLLM's definitions."""
    asked = sorted((r for r in records if r.outcome != "unsent"), key=lambda r: r.sent_s)
    answered = [record for record in asked if record.outcome == OK]
    throughput = summarise(asked, slo).throughput
    duration_s = throughput.span_s
    num_input = sum(record.num_prompt_tokens for record in answered)
    num_output = sum(record.num_output_tokens for record in answered)
    per_s = 1.0 / duration_s if duration_s else 0.0
    target = next((t for t in manifest.targets if asked and t["name"] == asked[0].target), {})
    result: dict[str, Any] = {
        "date": _date(manifest.started_at),
        "endpoint_type": "openai",
        "backend": "openai",
        "label": target.get("name"),
        "model_id": target.get("model", ""),
        "tokenizer_id": target.get("model", ""),
        "num_prompts": len(asked),
        "request_rate": manifest.arrival.get("rate", "inf"),
        "burstiness": 1.0,
        "max_concurrency": manifest.driver.get("max_concurrency"),
        "duration": duration_s,
        "completed": len(answered),
        "failed": len(asked) - len(answered),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(answered) * per_s,
        "request_goodput": throughput.good_requests,
        "output_throughput": num_output * per_s,
        "total_token_throughput": (num_input + num_output) * per_s,
        "input_lens": [record.num_prompt_tokens for record in asked],
        "output_lens": [record.num_output_tokens for record in asked],
        "ttfts": [ttft_sent_of(record) or 0.0 for record in asked],
        "itls": [gaps_of(record) for record in asked],
        "latencies": [_latency(record) for record in asked],
        "start_times": [record.sent_s for record in asked],
        "queue_times": [record.sent_s - record.intended_s for record in asked],
        "generated_texts": [""] * len(asked),
        "errors": [_error(record) for record in asked],
    }
    for name, values in (
        ("ttft", [value for r in answered if (value := ttft_sent_of(r)) is not None]),
        ("tpot", [value for r in answered if (value := tpot_of(r)) is not None]),
        ("itl", [gap for record in answered for gap in gaps_of(record)]),
        ("e2el", [_latency(record) for record in answered]),
    ):
        result |= _statistics(name, values)
    return result


def _statistics(name: str, values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {f"{word}_{name}_ms": 0.0 for word in ("mean", "median", "std", "p99")}
    return {
        f"mean_{name}_ms": 1e3 * fmean(values),
        f"median_{name}_ms": 1e3 * median(values),
        f"std_{name}_ms": 1e3 * pstdev(values),
        f"p99_{name}_ms": 1e3 * float(np.percentile(values, 99)),
    }


def _latency(record: RequestRecord) -> float:
    return 0.0 if record.finished_s is None else record.finished_s - record.sent_s


def _error(record: RequestRecord) -> str:
    if record.outcome == OK:
        return ""
    return " ".join(f"{record.outcome} {record.status or ''} {record.error_code}".split())


def _date(started_at: str) -> str:
    try:
        moment = datetime.fromisoformat(started_at)
    except ValueError:
        return ""
    return moment.astimezone(UTC).strftime("%Y%m%d-%H%M%S")


def import_vllm(path: Path) -> tuple[Manifest, list[RequestRecord]]:
    """A result file as a run.

    Raises:
        ConfigError: it is no such file, or was saved without its details.
    """
    found = read_object(read_bytes(path), str(path))
    missing = [name for name in DETAILED if not isinstance(found.get(name), list)]
    if missing:
        raise ConfigError(f"{path}: no {', '.join(missing)}: save it with --save-detailed")
    if not isinstance(found.get("start_times"), list):
        raise ConfigError(f"{path}: no start_times: it is of a vLLM that did not save them")
    try:
        records = _records(found, str(found.get("label") or found.get("model_id") or "vllm"))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not what vllm bench serve writes: {error}") from error
    rate = found.get("request_rate")
    arrival = {"name": "as recorded", "rate": rate if isinstance(rate, int | float) else None}
    model = str(found.get("model_id", ""))
    return imported(records, source=SOURCE, why=WHY, arrival=arrival, model=model), records


def _records(found: dict[str, Any], target: str) -> list[RequestRecord]:
    num = len(found["ttfts"])
    starts = [float(at) for at in found["start_times"]]
    queues = [float(at) for at in found.get("queue_times") or [0.0] * num]
    origin_s = min((at - late for at, late in zip(starts, queues, strict=True)), default=0.0)
    latencies = found.get("latencies") or [None] * num
    rows = zip(
        found["ttfts"],
        found["itls"],
        found["input_lens"],
        found["output_lens"],
        found["errors"],
        latencies,
        strict=True,
    )
    records = []
    for index, (ttft, itls, num_prompt, num_output, error, latency) in enumerate(rows):
        sent_s = starts[index] - origin_s
        is_ok = not error and float(ttft) > 0.0
        times = running_times(sent_s + float(ttft), [float(gap) for gap in itls]) if is_ok else ()
        finished_s = sent_s + float(latency) if latency else (times[-1] if times else None)
        records.append(
            RequestRecord(
                target,
                index,
                f"imported-{index}",
                0,
                "imported",
                sent_s - queues[index],
                sent_s,
                token_times_s=times,
                token_counts=counts_of(len(times), int(num_output)),
                finished_s=finished_s,
                num_prompt_tokens=int(num_prompt),
                num_output_tokens=int(num_output) if is_ok else 0,
                outcome=OK if is_ok else "http_error",
                error_code="" if is_ok else "unknown",
            )
        )
    return records
