"""What a run leaves behind: ``manifest.json`` and one line of ``requests.jsonl`` per request.

Every figure of a summary is computed from these two files and from nothing else, so a run can be
judged again later, by other rules, or by other programs. What a Baton cluster said of itself on the
way stands beside them (``samples.py``): a report draws it, and no figure depends on it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from bench.load.samples import ClusterSample, write_samples
from protocol.errors import ConfigError

MANIFEST_FILE = "manifest.json"
RECORDS_FILE = "requests.jsonl"
FORMAT_VERSION = 1

OK, CANCELLED = "ok", "cancelled"
OUTCOMES = (
    OK,
    CANCELLED,  # by plan: we closed the connection when the schedule said so
    "http_error",  # a status that is not 200, or an error event inside the stream
    "timeout",  # its budget ended
    "disconnect",  # the connection ended without the stream's end marker
    "incomplete",  # it ended properly with another number of tokens than it reported or had to
    "refused",  # no connection
    "unsent",  # the run ended, or its session's turn before it failed
)


class RequestRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request of the schedule and what became of it, in the order of its life.

    Times are seconds from the run's start on the driver's CLOCK_MONOTONIC.
    """

    target: str
    index: int
    session: str
    turn: int
    kind: str
    """The workload's class: "short", "long", "document", "question", ..."""
    intended_s: float
    sent_s: float
    headers_s: float | None = None
    token_times_s: tuple[float, ...] = ()
    """When each event that carried tokens arrived."""
    token_counts: tuple[int, ...] = ()
    """How many tokens each of them carried."""
    finished_s: float | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int | None = None
    max_tokens: int = 0
    outcome: str = "unsent"
    status: int | None = None
    error_code: str = ""
    finish_reason: str = ""
    request_id: str = ""
    path: str = ""
    """``x-baton-path``: the pools it took."""
    timeline: dict[str, Any] | None = None
    """``/v1/requests/{id}/timeline`` of a Baton server, joined after the run."""


class Manifest(msgspec.Struct, omit_defaults=True):
    """What makes a run repeatable, and whether it may be believed."""

    version: int
    command: str
    seed: int
    workload: dict[str, Any]
    arrival: dict[str, Any]
    targets: list[dict[str, Any]]
    """Each has ``name``, ``url`` and ``model``."""
    slo: dict[str, Any] | None
    duration_s: float
    environment: dict[str, str]
    started_at: str
    """ISO 8601, UTC; the only wall clock time of a run."""
    schedule_sha256: str
    valid: bool
    invalid_reasons: list[str]
    send_lag: dict[str, float]
    """``p50``, ``p99`` and ``max``, in seconds."""
    metrics_version: str
    driver: dict[str, Any] = {}
    """How the load was driven: ``loop`` (open or closed), ``num_processes``, ``cpu_share``, ..."""


_ENCODER = msgspec.json.Encoder()
_RECORD = msgspec.json.Decoder(RequestRecord)
_MANIFEST = msgspec.json.Decoder(Manifest)


def write_records(path: Path, records: Iterable[RequestRecord]) -> None:
    """One JSON object per line, in the order given."""
    with path.open("wb") as file:
        for record in records:
            file.write(_ENCODER.encode(record) + b"\n")


def read_records(path: Path) -> list[RequestRecord]:
    """Every record of a file.

    Raises:
        ConfigError: the file is missing, or a line of it is not a record.
    """
    records: list[RequestRecord] = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            records.append(_RECORD.decode(line))
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}:{number}: {error}") from error
    return records


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Indented, since people read it."""
    path.write_bytes(msgspec.json.format(_ENCODER.encode(manifest), indent=2) + b"\n")


def read_manifest(path: Path) -> Manifest:
    """A run's manifest.

    Raises:
        ConfigError: the file is missing or not a manifest.
    """
    try:
        return _MANIFEST.decode(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: {error}") from error


def write_run(
    folder: Path,
    manifest: Manifest,
    records: Iterable[RequestRecord],
    samples: Iterable[ClusterSample] = (),
) -> None:
    """The files of a run; the manifest last, so that a folder that has one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    write_records(folder / RECORDS_FILE, records)
    write_samples(folder, samples)
    write_manifest(folder / MANIFEST_FILE, manifest)


def read_run(folder: Path) -> tuple[Manifest, list[RequestRecord]]:
    """Both files of a run.

    Raises:
        ConfigError: as ``read_manifest`` and ``read_records``.
    """
    return read_manifest(folder / MANIFEST_FILE), read_records(folder / RECORDS_FILE)
