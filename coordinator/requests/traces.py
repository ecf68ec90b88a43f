"""What became of the latest requests: ``/v1/requests/{id}/timeline``, asked by their own tenant.

A request is kept as it is while anything may still happen to it, from then on as what is told of
it, in a table. Objects of thousands of requests, made in the middle of a burst and kept, would each
hold a page of the memory that the burst has taken.
"""

import dataclasses
import sqlite3
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import msgspec

from coordinator.request import Request
from protocol.timeline import TimelineEvent

MAX_TRACES = 1024
MAX_SEQUENCES = 8192  # of all traces together: each takes some 3 KB, and 1 when it has ended
_TABLE = """
CREATE TABLE ended (
    number INTEGER PRIMARY KEY, request_id TEXT UNIQUE, tenant TEXT, client_request_id TEXT,
    num_sequences INTEGER, told BLOB
);
CREATE INDEX by_client ON ended (tenant, client_request_id);
"""


@dataclass(slots=True)
class Trace:
    """One HTTP request and the sequences that it became."""

    request_id: str  # the server's
    client_request_id: str  # what was echoed
    tenant: str
    model: str
    created: int
    num_sequences: int = 1  # that it becomes; the requests come one by one
    requests: list[Request | msgspec.Raw] = field(default_factory=list)  # or what is told of one
    num_closed: int = 0
    number: int = 0  # in the order of their arrival

    def describe(self) -> dict[str, Any]:
        """For JSON. Times are seconds from the arrival, of the coordinator's clock."""
        return {
            "id": self.request_id,
            "object": "request.timeline",
            "client_request_id": self.client_request_id,
            "model": self.model,
            "created": self.created,
            "requests": [
                request if isinstance(request, msgspec.Raw) else _describe(request)
                for request in self.requests
            ],
        }

    def close(self, index: int) -> None:
        """Nothing more happens to one of its requests."""
        request = self.requests[index] if index < len(self.requests) else None
        if isinstance(request, Request):
            self.requests[index] = msgspec.Raw(msgspec.json.encode(_describe(request)))
            self.num_closed += 1


def _describe(request: Request) -> dict[str, Any]:
    arrived = request.timeline.times.get(TimelineEvent.ARRIVED, 0.0)
    return {
        "request_id": request.request_id,
        "attempt": request.attempt,
        "state": request.state.value,
        "finish_reason": request.finish_reason,
        "error_code": request.error_code or None,
        "num_prompt_tokens": request.num_prompt_tokens,
        "num_output_tokens": request.num_output_tokens,
        "lost_attempts": [dataclasses.asdict(ended) for ended in request.lost],
        "num_cached_tokens": request.num_cached_tokens,
        "num_prefilled_tokens": request.num_prefilled_tokens,
        "decode_pool": request.decode_pool or None,
        "prefill_pool": request.prefill_pool or None,
        "events": {
            event.value: round(request.timeline.times[event] - arrived, 6)
            for event in TimelineEvent
            if event in request.timeline.times
        },
        "prefill": None if request.path is None else _builtins(request.path),
        "transfer": None if request.stats is None else _builtins(request.stats),
        "path": request.describe_path(),
    }


def _builtins(struct: msgspec.Struct) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


class Traces:
    """The latest requests, by any id that their caller has seen.

    Args:
        max_traces: requests.
        max_sequences: of all of them together, but for the latest one.
    """

    def __init__(self, max_traces: int = MAX_TRACES, max_sequences: int = MAX_SEQUENCES) -> None:
        self._max_traces = max_traces
        self._max_sequences = max_sequences
        self._num_added = self._num_ended = self._num_sequences = 0
        self._open: OrderedDict[str, Trace] = OrderedDict()
        self._open_by_client_id: dict[tuple[str, str], Trace] = {}
        self._ended = sqlite3.connect(":memory:", isolation_level=None)
        self._ended.executescript(_TABLE)

    def __len__(self) -> int:
        return len(self._open) + self._num_ended

    def add(self, trace: Trace) -> None:
        self._num_added += 1
        trace.number = self._num_added
        self._open[trace.request_id] = trace
        self._open_by_client_id[trace.tenant, trace.client_request_id] = trace
        self._num_sequences += trace.num_sequences
        while len(self) > self._max_traces or (
            self._num_sequences > self._max_sequences and len(self) > 1
        ):
            self._forget_oldest()

    def close(self, request: Request) -> None:
        """Nothing more happens to a request. Of one that was never added, nothing is kept."""
        request_id, _, index = request.request_id.rpartition("-")
        trace = self._open.get(request_id)
        if trace is None:
            return
        trace.close(int(index))
        if trace.num_closed == trace.num_sequences:
            self._forget_open(trace)
            told = msgspec.json.encode(trace.describe())
            ids = (trace.number, trace.request_id, trace.tenant, trace.client_request_id)
            self._ended.execute(
                "INSERT INTO ended VALUES (?, ?, ?, ?, ?, ?)", (*ids, trace.num_sequences, told)
            )
            self._num_ended += 1

    def find(self, request_id: str, tenant: str) -> bytes | None:
        """What is told, as JSON: by the id of the answer, the engine's, or ``x-request-id``.

        Nothing is told to another tenant. Of several with one ``x-request-id``, it is the latest.
        """
        trace = self._open_by_client_id.get((tenant, request_id))
        found = self._ended.execute(
            "SELECT told, number FROM ended WHERE tenant = ? AND client_request_id = ? "
            "ORDER BY number DESC LIMIT 1",
            (tenant, request_id),
        ).fetchone()
        if trace is None and found is None:
            bare = request_id.removeprefix("cmpl-").removeprefix("chatcmpl-").partition("-")[0]
            trace = self._open.get(bare)
            trace = None if trace is None or trace.tenant != tenant else trace
            found = self._ended.execute(
                "SELECT told, number FROM ended WHERE tenant = ? AND request_id = ?", (tenant, bare)
            ).fetchone()
        if trace is not None and (found is None or trace.number > found[1]):
            return msgspec.json.encode(trace.describe())
        return None if found is None else bytes(found[0])

    def _forget_oldest(self) -> None:
        trace = next(iter(self._open.values()), None)
        oldest = self._ended.execute(
            "SELECT number, num_sequences FROM ended ORDER BY number LIMIT 1"
        ).fetchone()
        if trace is not None and (oldest is None or trace.number < oldest[0]):
            self._forget_open(trace)
            self._num_sequences -= trace.num_sequences
        else:
            self._ended.execute("DELETE FROM ended WHERE number = ?", oldest[:1])
            self._num_ended -= 1
            self._num_sequences -= oldest[1]

    def _forget_open(self, trace: Trace) -> None:
        del self._open[trace.request_id]
        key = (trace.tenant, trace.client_request_id)
        if self._open_by_client_id.get(key) is trace:
            del self._open_by_client_id[key]
