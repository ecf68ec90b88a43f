"""What the server answers with, typed. Fields that a newer server adds are ignored.

A field that an object may lack has a default, so that a client can read an older server too.
"""

from typing import Any, Generic, TypeVar

import msgspec

from coordinator.client.errors import ErrorInfo

ItemT = TypeVar("ItemT")


class Page(msgspec.Struct, Generic[ItemT], frozen=True):
    """Some objects, and whether there are more behind the last one."""

    data: list[ItemT]
    has_more: bool = False


class Deleted(msgspec.Struct, frozen=True):
    """An object that is gone."""

    id: str
    deleted: bool = True


# -- documents -------------------------------------------------------------------------------------


class TokenCounts(msgspec.Struct, frozen=True):
    """Tokens of a document; ``total`` is None before they are known."""

    total: int | None = None
    done: int = 0
    cached: int = 0


class ChunkCounts(msgspec.Struct, frozen=True):
    """Segments of a document."""

    total: int = 0
    done: int = 0


class Pin(msgspec.Struct, frozen=True):
    """What is promised about keeping a document's KV."""

    mode: str = "none"
    ttl_s: float | None = None
    expires_at: int | None = None
    tier: str = "any"
    sliding: bool = False


class Residency(msgspec.Struct, frozen=True):
    """Which part of a document's KV lies where."""

    tier: str
    fraction: float
    worker: str | None = None


class DocumentUsage(msgspec.Struct, frozen=True):
    """What a document has cost."""

    cache_creation_tokens: int = 0
    cache_read_tokens: int = 0


class Mismatch(msgspec.Struct, frozen=True):
    """What is served otherwise than when a document was made."""

    reason: str
    message: str = ""


class Document(msgspec.Struct, frozen=True):
    """A document, and the job that makes it."""

    id: str
    status: str
    created_at: int = 0
    model: str = ""
    model_fingerprint: str = ""
    display_name: str | None = None
    metadata: dict[str, Any] = {}
    form: str = "chat"
    tokens: TokenCounts = TokenCounts()
    chunks: ChunkCounts = ChunkCounts()
    rate_tok_s: float | None = None
    eta_s: float | None = None
    ring_size: int | None = None
    attempt: int = 0
    resumed_from_token: int | None = None
    pin: Pin = Pin()
    residency: list[Residency] = []
    usage: DocumentUsage = DocumentUsage()
    ready_at: int | None = None
    error: ErrorInfo | None = None
    mismatch: Mismatch | None = None  # of status "mismatched"

    @property
    def is_pending(self) -> bool:
        """The server still works on it, or will."""
        return self.status in ("queued", "tokenizing", "prefilling", "storing")

    @property
    def is_usable(self) -> bool:
        """A question may name it; what is missing of it, if it is not ready, is computed anew."""
        return self.status in ("ready", "mismatched", "evicted", "damaged")

    @property
    def fraction_done(self) -> float:
        return self.tokens.done / self.tokens.total if self.tokens.total else 0.0


class DocumentEvent(msgspec.Struct, frozen=True):
    """Something that happened to a document; ``data`` is all that was said of it."""

    type: str  # "state", "progress", "warning" or "expired"
    sequence_number: int
    document_id: str = ""
    created_at: float = 0.0
    status: str | None = None
    tokens: TokenCounts | None = None
    rate_tok_s: float | None = None
    eta_s: float | None = None
    ring_size: int | None = None
    data: dict[str, Any] = {}


# -- answers ---------------------------------------------------------------------------------------


class PromptDetails(msgspec.Struct, frozen=True):
    """Tokens of the prompt that did not have to be computed."""

    cached_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    """Tokens of an answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None

    @property
    def cached_tokens(self) -> int:
        details = self.prompt_tokens_details
        return 0 if details is None else details.cached_tokens

    @property
    def computed_tokens(self) -> int:
        """Tokens of the prompt that were computed for this answer."""
        return self.prompt_tokens - self.cached_tokens


class CacheMiss(msgspec.Struct, frozen=True):
    """Why more had to be computed than a document had promised."""

    reason: str
    missed_tokens: int = 0


class CompletionChoice(msgspec.Struct, frozen=True):
    """One completion, or a piece of it."""

    text: str
    index: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: dict[str, Any] | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(msgspec.Struct, frozen=True):
    """An answer of /v1/completions, and a chunk of one: they have the same shape."""

    id: str
    choices: list[CompletionChoice]
    created: int = 0
    model: str = ""
    usage: Usage | None = None
    cache_miss: CacheMiss | None = None
    path: str = ""  # from the headers
    request_id: str = ""

    @property
    def text(self) -> str:
        """Of the first choice."""
        return next((choice.text for choice in self.choices if choice.index == 0), "")

    @property
    def finish_reason(self) -> str | None:
        return next((choice.finish_reason for choice in self.choices if choice.index == 0), None)


class Message(msgspec.Struct, frozen=True):
    """What the model said, or a piece of it."""

    role: str | None = None
    content: str | None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer."""

    message: Message
    index: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: dict[str, Any] | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class ChatCompletion(msgspec.Struct, frozen=True):
    """An answer of /v1/chat/completions."""

    id: str
    choices: list[ChatChoice]
    created: int = 0
    model: str = ""
    usage: Usage | None = None
    cache_miss: CacheMiss | None = None
    path: str = ""  # from the headers
    request_id: str = ""

    @property
    def text(self) -> str:
        """Of the first choice."""
        first = next((choice for choice in self.choices if choice.index == 0), None)
        return "" if first is None else first.message.content or ""


class ChunkChoice(msgspec.Struct, frozen=True):
    """A piece of one answer."""

    delta: Message = Message()
    index: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: dict[str, Any] | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class ChatChunk(msgspec.Struct, frozen=True):
    """A piece of a streamed chat."""

    id: str
    choices: list[ChunkChoice]
    created: int = 0
    model: str = ""
    usage: Usage | None = None
    cache_miss: CacheMiss | None = None

    @property
    def text(self) -> str:
        """Of the first choice."""
        pieces = (choice.delta.content for choice in self.choices if choice.index == 0)
        return "".join(piece or "" for piece in pieces)

    @property
    def finish_reason(self) -> str | None:
        return next((choice.finish_reason for choice in self.choices if choice.index == 0), None)


# -- files and batches -----------------------------------------------------------------------------


class File(msgspec.Struct, frozen=True):
    """An uploaded file, or a batch's output."""

    id: str
    bytes: int = 0
    created_at: int = 0
    filename: str = ""
    purpose: str = ""
    status: str = ""
    expires_at: int | None = None


class RequestCounts(msgspec.Struct, frozen=True):
    """Lines of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class LineError(msgspec.Struct, frozen=True):
    """What is wrong with a line of a batch's input."""

    message: str = ""
    code: str | None = None
    param: str | None = None
    line: int | None = None


class LineErrors(msgspec.Struct, frozen=True):
    """The first lines that are wrong."""

    data: list[LineError] = []


class Batch(msgspec.Struct, frozen=True):
    """Many requests, given as a file."""

    id: str
    status: str
    endpoint: str = ""
    input_file_id: str = ""
    completion_window: str = ""
    created_at: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    expires_at: int | None = None
    completed_at: int | None = None
    request_counts: RequestCounts | None = None
    errors: LineErrors | None = None
    metadata: dict[str, Any] | None = None

    @property
    def is_pending(self) -> bool:
        """The server still works on it, or will."""
        return self.status in ("validating", "in_progress", "finalizing", "cancelling")
