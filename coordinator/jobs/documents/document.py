"""One document as the database keeps it, and as its owner sees it. Pure; no clock, no files."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec

from coordinator.jobs.documents.states import (
    FINAL,
    PENDING,
    TABLE,
    WORKING,
    DocumentState,
)
from coordinator.jobs.engine.job import Job, Notice
from coordinator.jobs.parsing.formats import unprocessable
from protocol.errors import RequestError

CHAT, TEXT = "chat", "text"  # forms: see questions/canonical.py
NO_PIN, SOFT, HARD = "none", "soft", "hard"
ANY_TIER = "any"
_KEEPS_KV = frozenset({DocumentState.PREFILLING, DocumentState.STORING, DocumentState.READY})


class Pin(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is promised about keeping a document's KV."""

    mode: str = NO_PIN
    ttl_s: float = 0.0
    tier: str = ANY_TIER
    is_sliding: bool = False  # each question begins the time anew
    expires_at: float = 0.0  # Unix time; 0 before the document is ready, or without a pin
    has_expired: bool = False  # there was one, and its time was over

    @property
    def is_set(self) -> bool:
        return self.mode != NO_PIN

    def begin(self, now: float) -> "Pin":
        """The same pin, from now on."""
        return msgspec.structs.replace(self, expires_at=now + self.ttl_s) if self.is_set else self

    def describe(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "ttl_s": self.ttl_s or None,
            "expires_at": int(self.expires_at) or None,
            "tier": self.tier,
            "sliding": self.is_sliding,
        }


def new_id() -> str:
    """An id that nobody guesses."""
    return f"doc_{secrets.token_hex(16)}"


class SystemMessage(msgspec.Struct, frozen=True):
    """A message before the document."""

    role: str
    content: str


class Document(Job, frozen=True, omit_defaults=True, kw_only=True):
    """A document, and the job that makes it. Fields are in the order of its life."""

    KIND: ClassVar[str] = "document"
    TABLE: ClassVar[Mapping[Any, Any]] = TABLE
    PENDING: ClassVar[frozenset[Any]] = PENDING
    BEGUN: ClassVar[frozenset[Any]] = WORKING
    CANCELLED: ClassVar[frozenset[Any]] = frozenset({DocumentState.CANCELLED})
    CLEANED: ClassVar[frozenset[Any]] = frozenset()  # only what is deleted leaves nothing

    state: DocumentState = DocumentState.QUEUED
    cache_salt: str
    kind: str  # of its source: "text", "messages", "token_ids" or "file"
    num_bytes: int = 0  # of its source
    media_type: str = "text/plain"
    charset: str = ""  # that came with the file
    file_name: str = ""
    form: str = CHAT
    system: tuple[SystemMessage, ...] = ()
    display_name: str = ""
    metadata: dict[str, Any] = {}  # noqa: RUF012 - msgspec makes a new one
    deadline: float | None = None  # Unix time
    ring_size: int = 0  # asked for; 0 is auto
    pin: Pin = Pin()

    model: str = ""
    fingerprint: str = ""  # of the model whose tokens they are
    attempt: int = 0  # counted before the work begins
    num_parse_crashes: int = 0
    num_tokens: int = 0  # 0 before they are known
    block_size: int = 0
    first_hash: str = ""  # of its first block: documents that share one may share more
    num_resumed_tokens: int = 0  # that were stored when this attempt began
    num_done: int = 0  # tokens that are stored, up to the last whole segment
    num_computed: int = 0  # by all attempts
    num_cached: int = 0
    used_ring_size: int = 0
    compute_s: float = 0.0
    kv_dtype: str = ""  # that its KV was kept in
    tokenizer: str = ""  # digest of what made its tokens; "" of token ids, which nothing has made
    template: str = ""  # the same, of what has shown it
    shown: str = ""  # digest of the template's text up to the document's end; of form chat

    @property
    def num_blocks(self) -> int:
        """Full blocks: what can be cached."""
        return self.num_tokens // self.block_size if self.block_size else 0

    @property
    def due_at(self) -> float | None:
        moments = [self.pin.expires_at] if self.pin.expires_at > 0 else []
        if self.deadline is not None and self.is_pending:
            moments.append(self.deadline)
        return min(moments, default=None)

    def columns(self) -> dict[str, object]:
        return {
            **super().columns(),
            "num_bytes": self.num_bytes,
            "num_tokens": self.num_tokens,
            "kept_tokens": self.num_tokens if self.state in _KEEPS_KV else 0,
            # One that has ended holds nothing.
            "pin_mode": NO_PIN if self.state in FINAL else self.pin.mode,
            "first_hash": self.first_hash,
        }

    def state_notice(self) -> Notice:
        data: dict[str, Any] = {"status": self.state.value, "attempt": self.attempt}
        if self.state is DocumentState.FAILED and self.error is not None:
            data["error"] = self.error.describe()
        if self.state is DocumentState.PREFILLING:
            data["resumed_from_token"] = self.num_resumed_tokens
        return Notice("state", data)


@dataclass(frozen=True, slots=True)
class Live:
    """How a running document stands right now; what the database has is a segment behind."""

    num_done: int
    tokens_per_s: float


def describe(
    document: Document,
    segment_tokens: int,
    live: Live | None = None,
    residency: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The document as its owner sees it."""
    done = document.num_done if live is None else max(live.num_done, document.num_done)
    rate = live.tokens_per_s if live is not None else _mean_rate(document)
    is_running = document.state is DocumentState.PREFILLING
    ready_at = document.times.get(DocumentState.READY.value)
    return {
        "id": document.id,
        "object": "document",
        "created_at": int(document.created_at),
        "model": document.model,
        "model_fingerprint": document.fingerprint,
        "display_name": document.display_name or None,
        "metadata": document.metadata,
        "form": document.form,
        "source": {"type": document.kind, "media_type": document.media_type},
        "status": document.state.value,
        "priority": document.priority,
        "deadline": document.deadline,
        "tokens": {
            "total": document.num_tokens or None,
            "done": done,
            "cached": document.num_cached,
        },
        "chunks": chunks(document.num_tokens, done, segment_tokens),
        "rate_tok_s": round(rate, 1) if rate else None,
        "eta_s": eta_s(document.num_tokens, done, rate) if is_running else None,
        "ring_size": document.used_ring_size or None,
        "attempt": document.attempt,
        "resumed_from_token": document.num_resumed_tokens,
        "pin": document.pin.describe(),
        "residency": list(residency),
        "usage": {
            "cache_creation_tokens": document.num_computed,
            "cache_read_tokens": document.num_cached,
        },
        "ready_at": None if ready_at is None else int(ready_at),
        "error": None if document.error is None else document.error.describe(),
        "mismatch": None,
    }


def chunks(num_tokens: int, done: int, segment_tokens: int) -> dict[str, int]:
    """Segments: those that are whole, of all."""
    total = -(-num_tokens // segment_tokens)
    is_whole = num_tokens > 0 and done >= num_tokens
    return {"total": total, "done": total if is_whole else done // segment_tokens}


def eta_s(num_tokens: int, done: int, tokens_per_s: float) -> float | None:
    """Seconds until the rest is computed, at this rate."""
    return round((num_tokens - done) / tokens_per_s, 2) if tokens_per_s else None


def check_size(num_tokens: int, max_tokens: int) -> None:
    """Refuse a document that can never be held.

    Raises:
        RequestError: naming both numbers.
    """
    if num_tokens == 0:
        raise unprocessable("the document is empty: it has no tokens")
    if num_tokens > max_tokens:
        raise RequestError(
            f"the document has {num_tokens} tokens and this cluster can hold {max_tokens}: "
            f"split it, or serve with more KV memory or a longer context",
            code="document_too_large",
            param="source",
        )


def _mean_rate(document: Document) -> float:
    return document.num_computed / document.compute_s if document.compute_s else 0.0
