"""What every import has in common: a manifest that says where the figures are from.

Whether a foreign driver kept its schedule is not in its files, so an imported run is never called
valid; its report says UNAUDITED.
"""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec

from bench.load.analysis.intervals import percentile
from bench.load.analysis.metrics import METRICS_VERSION
from bench.load.record import FORMAT_VERSION, Manifest, RequestRecord
from protocol.errors import ConfigError

LATE = (("p50", 0.5), ("p99", 0.99), ("max", 1.0))


def imported(
    records: Sequence[RequestRecord], *, source: str, why: str, arrival: dict[str, Any], model: str
) -> Manifest:
    """The manifest of an import; ``why`` tells what its figures do not hold."""
    late = sorted(record.sent_s - record.intended_s for record in records)
    lag = {name: percentile(late, q) for name, q in LATE} if late else {}
    names = list(dict.fromkeys(record.target for record in records))
    return Manifest(
        version=FORMAT_VERSION,
        command=f"imported from {source}",
        seed=0,
        workload={"name": f"as {source} recorded it"},
        arrival=arrival,
        targets=[{"name": name, "url": "", "model": model} for name in names],
        slo=None,
        duration_s=max((record.finished_s or record.intended_s for record in records), default=0.0),
        environment={},
        started_at="",
        schedule_sha256="",
        valid=False,
        invalid_reasons=[f"imported from {source}: {why}"],
        send_lag=lag,
        metrics_version=METRICS_VERSION,
        driver={"imported_from": source},
    )


def read_object(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConfigError: it is none.
    """
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"{where}: {error}") from error


def read_bytes(path: Path) -> bytes:
    """A file's content.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def running_times(start_s: float, gaps_s: Sequence[float]) -> tuple[float, ...]:
    """``start_s`` and the instants that the gaps lead to."""
    return tuple(accumulate(gaps_s, initial=start_s))


def counts_of(num_events: int, num_tokens: int) -> tuple[int, ...]:
    """One token per event where that is what the numbers say; nothing where it is not known."""
    return (1,) * num_events if num_events == num_tokens else ()
