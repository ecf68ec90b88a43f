"""What the fake server has, and what its cluster looks like."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

MODEL = "fake"
PATH = "decode=decode0; prefill=prefill0; ring=2; cached=3; computed=4; moved=4"
STEPS = (
    ("tokenizing", 0.0),
    ("prefilling", 0.0),
    ("prefilling", 0.5),
    ("storing", 1.0),
    ("ready", 1.0),
)
BATCH_STEPS = ("in_progress", "finalizing", "completed")
PENDING = ("queued", "tokenizing", "prefilling", "storing")


@dataclass(frozen=True)
class Fault:
    """What one request gets: an error, or half an answer and a connection that closes."""

    status: int = 0  # 0 closes
    code: str = "overloaded"
    retry_after: str | None = None


@dataclass
class Seen:
    """A request as it arrived."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any
    file: tuple[str, bytes] | None = None  # its name and contents


@dataclass
class State:
    """What the server has; a test looks at it, and changes it, from its own thread."""

    api_key: str | None = None
    offers_batches: bool = True
    faults: deque[Fault] = field(default_factory=deque)
    cuts: deque[int] = field(default_factory=deque)  # events after which a stream of them breaks
    seen: list[Seen] = field(default_factory=list)
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    events: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    files: dict[str, tuple[dict[str, Any], bytes]] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    is_stuck: bool = False  # nothing moves on
    fails: bool = False  # documents fail where they would be ready
    cluster: dict[str, Any] = field(default_factory=lambda: cluster_state())

    def make_document(self, name: str | None, num_tokens: int, pin: dict[str, Any]) -> str:
        document_id = f"doc_{len(self.documents):032x}"
        self.documents[document_id] = {
            "id": document_id, "object": "document", "created_at": 1_800_000_000, "model": MODEL,
            "model_fingerprint": "blake3:00", "status": "queued", "display_name": name,
            "metadata": {}, "form": "chat", "attempt": 1, "resumed_from_token": 0,
            "tokens": {"total": num_tokens, "done": 0, "cached": 0},
            "chunks": {"total": 2, "done": 0}, "rate_tok_s": None, "eta_s": None,
            "ring_size": None, "residency": [], "error": None, "ready_at": None,
            "pin": {"mode": "none", "ttl_s": None, "expires_at": None, "tier": "any",
                    "sliding": False, **pin},
            "usage": {"cache_creation_tokens": 0, "cache_read_tokens": 0}, "step": 0,
        }  # fmt: skip
        self.events[document_id] = []
        self.tell(document_id, "state", status="queued", attempt=1)
        return document_id

    def tell(self, document_id: str, kind: str, **data: Any) -> None:
        events = self.events[document_id]
        number = len(events) + 1
        events.append(
            {"type": kind, "sequence_number": number, "document_id": document_id,
             "created_at": 1.8e9 + number, **data}
        )  # fmt: skip

    def move_on(self, document_id: str) -> None:
        """One step of a document's life."""
        document = self.documents[document_id]
        if self.is_stuck or document["status"] not in PENDING:
            return
        status, fraction = STEPS[document["step"]]
        document["step"] += 1
        document["tokens"]["done"] = done = int(fraction * document["tokens"]["total"])
        if status == "ready" and self.fails:
            status = "failed"
            document["error"] = {"code": "unprocessable_document", "message": "no text in it",
                                 "param": "source", "status": 422}  # fmt: skip
        if status == document["status"]:
            document.update(rate_tok_s=1000.0, eta_s=0.5, ring_size=2)
            tokens = {"total": document["tokens"]["total"], "done": done, "cached": 0}
            self.tell(document_id, "progress", tokens=tokens, rate_tok_s=1000.0, eta_s=0.5,
                      ring_size=2)  # fmt: skip
        else:
            document["status"] = status
            self.tell(document_id, "state", status=status, attempt=1)


def cluster_state() -> dict[str, Any]:
    """Two pools: a ring of two that is idle, and one decode rank with some blocks in use."""
    rank = {"cp_rank": 0, "tp_rank": 0, "transport": "tcp", "ready": True, "connected_version": 2,
            "silent_s": 0.2, "num_steps": 7, "step_age_s": 0.0, "rss_bytes": 10**9,
            "counters": {}}  # fmt: skip
    blocks = {"total": 100, "free": 60, "owned": 10, "in_flight": 5, "cached": 25}
    pool = {"epoch": 1, "gang_start": 1, "state": "ready", "lost_reason": None, "serving": True,
            "num_waiting": 0, "num_running": 0, "pending_tokens": 0}  # fmt: skip
    return {
        "object": "cluster", "ready": True, "coordinator_epoch": 1, "missing": None,
        "model": MODEL, "model_fingerprint": "blake3:00", "max_model_len": 4096, "block_size": 16,
        "topology_version": 2, "num_active_requests": 3, "num_leaked": 0, "counters": {},
        "pools": [
            {**pool, "pool_id": "prefill0", "role": "prefill", "cp_size": 2, "tp_size": 1,
             "tokens_per_s": 1234.5, "blocks": [], "ranks": [{"rank": 0, **rank},
                                                             {"rank": 1, **rank, "cp_rank": 1}]},
            {**pool, "pool_id": "decode0", "role": "decode", "cp_size": 1, "tp_size": 1,
             "tokens_per_s": 0.0, "num_running": 3, "blocks": [blocks],
             "ranks": [{"rank": 0, **rank}]},
        ],
    }  # fmt: skip


def timeline(request_id: str) -> dict[str, Any]:
    """Of a request that went through both legs."""
    events = {"arrived": 0.0, "tokenized": 0.01, "reserved": 0.02, "prefill_sent": 0.03,
              "first_token": 0.5, "committed": 0.52, "first_decode": 0.55, "finished": 1.0,
              "released": 1.1}  # fmt: skip
    return {
        "id": request_id, "object": "request.timeline", "client_request_id": request_id,
        "model": MODEL, "created": 1_800_000_000,
        "requests": [
            {"request_id": f"{request_id}-0", "attempt": 1, "state": "released",
             "finish_reason": "stop", "error_code": None, "num_prompt_tokens": 7,
             "num_output_tokens": 4, "lost_attempts": [], "num_cached_tokens": 3,
             "num_prefilled_tokens": 4, "decode_pool": "decode0", "prefill_pool": "prefill0",
             "events": events, "prefill": None, "path": PATH,
             "transfer": {"transport": "tcp", "num_bytes": 5_000_000, "num_segments": 2,
                          "num_descriptors": 4, "num_layers_overlapped": 3, "num_layers": 4,
                          "read_s": 0.1, "exposed_s": 0.02}}
        ],
    }  # fmt: skip
