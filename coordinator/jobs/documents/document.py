"""One document as the database keeps it: the one truth about it. Pure; no clock, no files.

Fields are in the order of a document's life. A :class:`Change` is a new value and the events that
tell of it: both are written in one transaction, or neither.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from coordinator.jobs.documents.states import TABLE, DocumentEvent, DocumentState
from protocol.errors import RequestError
from protocol.transitions import advance

ID_PREFIX = "doc_"
CHAT, TEXT = "chat", "text"  # forms: see canonical.py
NO_PIN, SOFT, HARD = "none", "soft", "hard"
ANY_TIER = "any"


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


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a document could not be made."""

    code: str
    message: str
    status: int = 500
    param: str | None = None

    @staticmethod
    def of(error: RequestError) -> "Failure":
        return Failure(error.code, error.message, error.status, error.param)


def new_id() -> str:
    """An id that nobody guesses."""
    return f"{ID_PREFIX}{secrets.token_hex(16)}"


class SystemMessage(msgspec.Struct, frozen=True):
    """A message before the document."""

    role: str
    content: str


class Document(msgspec.Struct, frozen=True, omit_defaults=True):
    """A document, and the job that makes it. Only :class:`~documents.Documents` writes one."""

    document_id: str
    tenant: str
    cache_salt: str
    created_at: float
    kind: str  # of its source: "text", "messages", "token_ids" or "file"
    media_type: str = "text/plain"
    charset: str = ""  # that came with the file
    file_name: str = ""
    form: str = CHAT
    system: tuple[SystemMessage, ...] = ()
    display_name: str = ""
    metadata: dict[str, Any] = {}
    priority: int = 0
    deadline: float | None = None  # Unix time
    ring_size: int = 0  # asked for; 0 is auto
    pin: Pin = Pin()

    model: str = ""
    fingerprint: str = ""  # of the model whose tokens they are
    status: str = DocumentState.QUEUED.value
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
    ready_at: float | None = None
    error: Failure | None = None
    kv_dtype: str = ""  # that its KV was kept in
    tokenizer: str = ""  # digest of what made its tokens; "" of token ids, which nothing has made
    template: str = ""  # the same, of what has shown it
    shown: str = ""  # digest of the template's text up to the document's end; of form chat

    @property
    def state(self) -> DocumentState:
        return DocumentState(self.status)

    @property
    def num_blocks(self) -> int:
        """Full blocks: what can be cached."""
        return self.num_tokens // self.block_size if self.block_size else 0

    @property
    def num_promised(self) -> int:
        """Tokens that a question about it need not compute."""
        return self.num_blocks * self.block_size

    def after(self, event: DocumentEvent, **changes: Any) -> "Document":  # noqa: ANN401 - any field
        """The document after an event.

        Raises:
            IllegalTransition: the table does not have it.
        """
        following = advance(TABLE, self.state, event, of=self.document_id)
        return msgspec.structs.replace(self, status=following.value, **changes)


@dataclass(frozen=True, slots=True)
class DocumentNotice:
    """Something to tell about a document; numbered when it is written."""

    kind: str  # "state", "progress", "warning" or "expired"
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """A document's next value, and what is told of it."""

    document: Document
    events: tuple[DocumentNotice, ...] = ()


def state_event(document: Document) -> DocumentNotice:
    """Says where the document is now."""
    data: dict[str, Any] = {"status": document.status, "attempt": document.attempt}
    if document.state is DocumentState.FAILED and document.error is not None:
        data["error"] = describe_failure(document.error)
    if document.state is DocumentState.PREFILLING:
        data["resumed_from_token"] = document.num_resumed_tokens
    return DocumentNotice("state", data)


def stepped(document: Document, event: DocumentEvent, **changes: Any) -> Change:  # noqa: ANN401 - any field
    """The change that an event is.

    Raises:
        IllegalTransition: the table does not have it.
    """
    following = document.after(event, **changes)
    return Change(following, (state_event(following),))


def describe_failure(failure: Failure) -> dict[str, Any]:
    """An error as callers see it."""
    return {
        "code": failure.code,
        "message": failure.message,
        "param": failure.param,
        "status": failure.status,
    }


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
    return {
        "id": document.document_id,
        "object": "document",
        "created_at": int(document.created_at),
        "model": document.model,
        "model_fingerprint": document.fingerprint,
        "display_name": document.display_name or None,
        "metadata": document.metadata,
        "form": document.form,
        "source": {"type": document.kind, "media_type": document.media_type},
        "status": document.status,
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
        "ready_at": None if document.ready_at is None else int(document.ready_at),
        "error": None if document.error is None else describe_failure(document.error),
        "mismatch": None,
    }


def chunks(num_tokens: int, done: int, segment_tokens: int) -> dict[str, int]:
    """Segments: those that are whole, of all."""
    whole = -(-num_tokens // segment_tokens) if num_tokens and done >= num_tokens else None
    return {
        "total": -(-num_tokens // segment_tokens),
        "done": done // segment_tokens if whole is None else whole,
    }


def eta_s(num_tokens: int, done: int, tokens_per_s: float) -> float | None:
    """Seconds until the rest is computed, at this rate."""
    return round((num_tokens - done) / tokens_per_s, 2) if tokens_per_s else None


def _mean_rate(document: Document) -> float:
    return document.num_computed / document.compute_s if document.compute_s else 0.0
