"""What became of the latest requests: ``/v1/requests/{id}/timeline``, asked by their own tenant."""

import dataclasses
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import msgspec

from coordinator.paths import describe_path
from coordinator.records import Record
from protocol.timeline import Event

MAX_TRACES = 1024
MAX_SEQUENCES = 8192  # of all traces together: each takes some 3 KB, and 1 when it is gone


@dataclass(slots=True)
class Trace:
    """One HTTP request and the sequences that it became."""

    request_id: str  # the server's
    client_request_id: str  # what was echoed
    tenant: str
    model: str
    created: int
    num_sequences: int = 1  # that it becomes; the records come one by one
    # What is told of a record that is gone takes its place: the objects of thousands of them, made
    # in the middle of a burst, would hold all memory that the burst has taken.
    records: list[Record | msgspec.Raw] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """For JSON. Times are seconds from the arrival, of the coordinator's clock."""
        return {
            "id": self.request_id,
            "object": "request.timeline",
            "client_request_id": self.client_request_id,
            "model": self.model,
            "created": self.created,
            "requests": [
                record if isinstance(record, msgspec.Raw) else _describe(record)
                for record in self.records
            ],
        }

    def close(self, index: int) -> None:
        """Nothing more happens to one of its records."""
        record = self.records[index] if index < len(self.records) else None
        if isinstance(record, Record):
            self.records[index] = msgspec.Raw(msgspec.json.encode(_describe(record)))


def _describe(record: Record) -> dict[str, Any]:
    arrived = record.timeline.times.get(Event.ARRIVED, 0.0)
    return {
        "request_id": record.request_id,
        "attempt": record.attempt,
        "state": record.state.value,
        "finish_reason": record.finish_reason,
        "error_code": record.error_code or None,
        "num_prompt_tokens": record.num_prompt_tokens,
        "num_output_tokens": record.num_output_tokens,
        "lost_attempts": [dataclasses.asdict(ended) for ended in record.lost],
        "num_cached_tokens": record.num_cached_tokens,
        "num_prefilled_tokens": record.num_prefilled_tokens,
        "decode_pool": record.decode_pool or None,
        "prefill_pool": record.prefill_pool or None,
        "events": {
            event.value: round(record.timeline.times[event] - arrived, 6)
            for event in Event
            if event in record.timeline.times
        },
        "prefill": None if record.path is None else _builtins(record.path),
        "transfer": None if record.stats is None else _builtins(record.stats),
        "path": describe_path(record),
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
        self._num_sequences = 0
        self._by_id: OrderedDict[str, Trace] = OrderedDict()
        self._by_client_id: dict[tuple[str, str], str] = {}

    def add(self, trace: Trace) -> None:
        self._by_id[trace.request_id] = trace
        self._num_sequences += trace.num_sequences
        self._by_client_id[trace.tenant, trace.client_request_id] = trace.request_id
        while len(self._by_id) > self._max_traces or (
            self._num_sequences > self._max_sequences and len(self._by_id) > 1
        ):
            _, old = self._by_id.popitem(last=False)
            self._num_sequences -= old.num_sequences
            key = (old.tenant, old.client_request_id)
            if self._by_client_id.get(key) == old.request_id:
                del self._by_client_id[key]

    def close(self, record: Record) -> None:
        """Nothing more happens to a record. Of one that was never added, nothing is kept."""
        request_id, _, index = record.request_id.rpartition("-")
        trace = self._by_id.get(request_id)
        if trace is not None:
            trace.close(int(index))

    def find(self, request_id: str, tenant: str) -> Trace | None:
        """By the id of the answer, the engine's, or ``x-request-id``; None if not this tenant's."""
        known = self._by_client_id.get((tenant, request_id))
        bare = request_id.removeprefix("cmpl-").removeprefix("chatcmpl-").partition("-")[0]
        trace = self._by_id.get(known or bare)
        return trace if trace is not None and trace.tenant == tenant else None
