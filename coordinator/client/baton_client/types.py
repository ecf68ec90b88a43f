"""What the server answers with, typed. Fields that a newer server adds are ignored.

A field that an object may lack has a default, so that a client can read an older server too, and
the answers of other servers that speak OpenAI's protocol.
"""

from typing import Any, Generic, TypeVar

import msgspec

from baton_client.errors import ErrorInfo

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
    def problem(self) -> str:
        """What went wrong, if that is known."""
        return "" if self.error is None else self.error.message

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
    """Tokens of the prompt that did not have to be computed, if the server counts them."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """Tokens of an answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None

    @property
    def cached_tokens(self) -> int:
        details = self.prompt_tokens_details
        return 0 if details is None else details.cached_tokens or 0

    @property
    def computed_tokens(self) -> int:
        """Tokens of the prompt that were computed for this answer."""
        return self.prompt_tokens - self.cached_tokens


class CacheMiss(msgspec.Struct, frozen=True):
    """Why more had to be computed than a document had promised."""

    reason: str
    missed_tokens: int = 0


class Message(msgspec.Struct, frozen=True):
    """What the model said in a chat, or a piece of it."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class Choice(msgspec.Struct, frozen=True):
    """One answer. Its text is ``text`` in a completion, ``message`` in a chat, ``delta`` in a
    streamed chat."""

    index: int = 0
    text: str | None = None
    message: Message = Message()
    delta: Message = Message()
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: dict[str, Any] | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None

    @property
    def content(self) -> str:
        """The text, wherever it stands."""
        return self.text or self.delta.content or self.message.content or ""


class Completion(msgspec.Struct, frozen=True):
    """An answer of /v1/completions or /v1/chat/completions, or a chunk of one that is streamed."""

    id: str = ""
    choices: list[Choice] = []
    created: int = 0
    model: str = ""
    usage: Usage | None = None
    cache_miss: CacheMiss | None = None
    error: ErrorInfo | str | None = None  # of a chunk: the answer has failed on its way
    path: str = ""  # from the headers, as is the next one; not in a chunk
    request_id: str = ""

    @property
    def text(self) -> str:
        """Of the first choice."""
        return "".join(choice.content for choice in self.choices if choice.index == 0)

    @property
    def token_ids(self) -> list[int]:
        """Of the first choice, if they were asked for."""
        return [i for choice in self.choices if choice.index == 0 for i in choice.token_ids or ()]

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

    @property
    def is_usable(self) -> bool:
        """Every line is answered; one that has ended otherwise has in its files what was done."""
        return self.status == "completed"

    @property
    def problem(self) -> str:
        """What went wrong first, if that is known."""
        return self.errors.data[0].message if self.errors and self.errors.data else ""


# -- the cluster, and where one request's time went: both as their paths answer -------------------


class BlockCounts(msgspec.Struct, frozen=True):
    """Blocks of one cache, by what they are used for."""

    total: int = 0
    free: int = 0
    owned: int = 0
    in_flight: int = 0
    cached: int = 0


class RankState(msgspec.Struct, frozen=True):
    """One process of a pool."""

    rank: int
    cp_rank: int = 0
    tp_rank: int = 0
    transport: str = ""
    ready: bool = False
    silent_s: float = 0.0
    num_steps: int = 0
    step_age_s: float = 0.0
    rss_bytes: int = 0
    counters: dict[str, Any] = {}


class PoolState(msgspec.Struct, frozen=True):
    """A gang of ranks that computes together."""

    pool_id: str
    role: str = ""
    cp_size: int = 1
    tp_size: int = 1
    epoch: int = 0
    state: str = ""
    lost_reason: str | None = None
    serving: bool = False
    tokens_per_s: float = 0.0
    num_waiting: int = 0
    num_running: int = 0
    pending_tokens: int = 0
    blocks: list[BlockCounts] = []
    ranks: list[RankState] = []


class LoopState(msgspec.Struct, frozen=True):
    """How late the coordinator's event loop was of late, and its longest step."""

    lag_s: float = 0.0
    step_s: float = 0.0
    num_stalls: int = 0


class ClusterState(msgspec.Struct, frozen=True):
    """Pools, ranks and what they hold."""

    ready: bool
    model: str = ""
    unready_reason: str | None = None
    missing: str | None = None
    coordinator_epoch: int = 0
    max_model_len: int = 0
    block_size: int = 0
    num_active_requests: int = 0
    num_leaked: int = 0
    loop: LoopState = LoopState()
    counters: dict[str, Any] = {}
    pools: list[PoolState] = []


class Transfer(msgspec.Struct, frozen=True):
    """How a request's KV moved."""

    transport: str = ""
    num_bytes: int = 0
    num_segments: int = 0
    num_layers_overlapped: int = 0
    num_layers: int = 0
    read_s: float = 0.0
    exposed_s: float = 0.0


class SequenceTimeline(msgspec.Struct, frozen=True):
    """One sequence's life; ``events`` are seconds after the arrival."""

    request_id: str = ""
    attempt: int = 1
    state: str = ""
    finish_reason: str | None = None
    error_code: str | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    decode_pool: str | None = None
    prefill_pool: str | None = None
    lost_attempts: list[dict[str, Any]] = []
    events: dict[str, float] = {}
    transfer: Transfer | None = None
    path: str = ""


class RequestTimeline(msgspec.Struct, frozen=True):
    """One HTTP request, and the sequences that it became."""

    id: str
    requests: list[SequenceTimeline]
    client_request_id: str = ""
    model: str = ""
    created: int = 0
