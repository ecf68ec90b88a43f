"""One request: the one truth about it, from its validation to its last token. Pure.

::

    NEW --reserve--> RESERVING --ticket--> PREFILLING or COMPUTING --tokens--> DECODING
    any of these --the attempt is lost--> WAITING --reserve--> RESERVING
    any of these --end--> ENDING --every pool that held something has released it--> GONE

An *attempt* is one way from RESERVING to the end, on one set of pools. When it is lost, what the
caller has of its tokens becomes the end of the next attempt's prompt, and the next token is sampled
as if nothing had happened: it depends on the seed, its index and the tokens before it alone.

The first token comes from a prefill pool, all others from the decode pool, on two connections: they
may overtake each other. ``accept`` puts them in order by index, and drops what was there before.
"""

import enum
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from protocol.errors import RequestError
from protocol.messages import Abort, FirstToken, NewToken, Prefill, Reserve
from protocol.request import FinishReason, PrefillPath, SamplingParams, TransferStats
from protocol.timeline import TimeLine
from protocol.token_ids import TokenIds
from protocol.transitions import advance

SessionKey = tuple[str, str]  # (tenant, session_id)
NO_TOKENS = TokenIds.of(())


class RequestState(enum.Enum):
    NEW = "new"
    RESERVING = "reserving"  # the decode pool has been asked for blocks
    PREFILLING = "prefilling"  # a prefill pool computes the prompt
    COMPUTING = "computing"  # the decode pool computes the prompt
    DECODING = "decoding"
    WAITING = "waiting"  # an attempt was lost, the next one has not begun
    ENDING = "ending"  # nothing is expected but that blocks are released
    GONE = "gone"


class RequestEvent(enum.Enum):
    RESERVE = "reserve"
    SEND_PREFILL = "send_prefill"
    COMPUTE_HERE = "compute_here"
    COMMIT = "commit"
    TOKEN = "token"
    LOSE = "lose"
    END = "end"
    ALL_RELEASED = "all_released"


TABLE: dict[tuple[RequestState, RequestEvent], RequestState] = {
    (RequestState.NEW, RequestEvent.RESERVE): RequestState.RESERVING,
    (RequestState.NEW, RequestEvent.END): RequestState.ENDING,
    (RequestState.RESERVING, RequestEvent.SEND_PREFILL): RequestState.PREFILLING,
    (RequestState.RESERVING, RequestEvent.COMPUTE_HERE): RequestState.COMPUTING,
    (RequestState.RESERVING, RequestEvent.END): RequestState.ENDING,
    # The first token comes while the KV is on its way.
    (RequestState.PREFILLING, RequestEvent.TOKEN): RequestState.PREFILLING,
    (RequestState.PREFILLING, RequestEvent.COMMIT): RequestState.DECODING,
    (RequestState.PREFILLING, RequestEvent.END): RequestState.ENDING,
    (RequestState.COMPUTING, RequestEvent.TOKEN): RequestState.DECODING,
    (RequestState.COMPUTING, RequestEvent.END): RequestState.ENDING,
    (RequestState.DECODING, RequestEvent.TOKEN): RequestState.DECODING,
    (RequestState.DECODING, RequestEvent.END): RequestState.ENDING,
    (RequestState.RESERVING, RequestEvent.LOSE): RequestState.WAITING,
    (RequestState.PREFILLING, RequestEvent.LOSE): RequestState.WAITING,
    (RequestState.COMPUTING, RequestEvent.LOSE): RequestState.WAITING,
    (RequestState.DECODING, RequestEvent.LOSE): RequestState.WAITING,
    (RequestState.WAITING, RequestEvent.RESERVE): RequestState.RESERVING,
    (RequestState.WAITING, RequestEvent.END): RequestState.ENDING,
    (RequestState.ENDING, RequestEvent.ALL_RELEASED): RequestState.GONE,
}


class Receiver(Protocol):
    """Who gets the tokens of some requests, each of which has a number there: its choice."""

    def put(self, choice: int, tokens: Sequence[NewToken]) -> None:
        """The next tokens of one of them, in order; none at the end of an offload."""
        ...

    def fail(self, error: RequestError) -> None:
        """One of them has failed: nothing more will come."""
        ...


@dataclass(frozen=True, slots=True)
class EndedAttempt:
    """An attempt that could not go on, for the time line."""

    attempt: int
    decode_pool: str
    prefill_pool: str
    num_output_tokens: int  # that the caller had by then
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Why and how long a request waits for its next attempt."""

    since: float
    until: float
    error: RequestError  # what it ends with if nothing comes
    not_before: float = 0.0
    home: str = ""  # a pool that has something of it
    closing: tuple[str, int] | None = None  # a holder that is to release it first


class Share(NamedTuple):
    """What one request adds to the load of the cluster."""

    decode_pool: str = ""  # "" while it has none
    decode_tokens: int = 0  # that its decode pool has still to compute for it, prompt or answer
    prefill_pool: str = ""
    prefill_tokens: int = 0
    tenant: str = ""  # "" when it is of no concern any more
    is_active: bool = False
    is_interactive: bool = False  # active, and somebody waits for it


NO_SHARE = Share()


class Loads:
    """What all requests together add up to, kept as each of them changes.

    Nobody sums over all requests, of which there may be thousands, for each new one.
    """

    def __init__(self) -> None:
        self.num_active = 0
        self.num_interactive = 0
        self._decode_tokens: Counter[str] = Counter()
        self._prefill_tokens: Counter[str] = Counter()
        self._num_held: Counter[str] = Counter()

    def decode_tokens(self, pool_id: str) -> int:
        """What a decode pool has still to compute."""
        return self._decode_tokens[pool_id]

    def prefill_tokens(self, pool_id: str) -> int:
        """What a prefill pool has still to compute."""
        return self._prefill_tokens[pool_id]

    def num_held(self, tenant: str) -> int:
        """Requests of a tenant for which something is kept, in a pool or here."""
        return self._num_held[tenant]

    def replace(self, before: Share, after: Share) -> None:
        """A request's share has changed."""
        self.num_active += after.is_active - before.is_active
        self.num_interactive += after.is_interactive - before.is_interactive
        _move(self._decode_tokens, before[0], before[1], after[0], after[1])
        _move(self._prefill_tokens, before[2], before[3], after[2], after[3])
        if before.tenant != after.tenant:
            _move(self._num_held, before.tenant, 1, after.tenant, 1)


def _move(sums: Counter[str], old: str, less: int, new: str, more: int) -> None:
    if old == new:
        if old and more != less:
            sums[old] += more - less
        return
    if old:
        sums[old] -= less
        if not sums[old]:
            del sums[old]  # tenants come and go
    if new and more:
        sums[new] += more


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """Fields in the order of a request's life. Whoever makes one fills in what is asked for; from
    ``Service.submit`` on only the service changes it, and what counts for ``loads`` by the methods
    below. ``request_id`` is the server's own, unique in the cluster."""

    request_id: str
    prompt_token_ids: TokenIds
    block_hashes: tuple[bytes, ...] = ()
    sampling: SamplingParams
    tenant: str
    receiver: Receiver | None = None
    choice: int = 0  # its number among those of its receiver
    cache_salt: str = ""
    session: SessionKey | None = None
    is_offload: bool = False  # computed for a store, in place of its decode pool: no answer
    priority: int = 0  # of its prefill; the lower go first
    chunk_tokens: int = 0  # of its prefill's chunks at most; 0: as configured
    ring_size: int = 0  # of its prefill; 0: the pool's choice

    fingerprint: bytes = b""  # of what was asked for
    timeline: TimeLine = field(default_factory=TimeLine)
    state: RequestState = RequestState.NEW
    output_token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error_code: str = ""
    num_prompt_tokens: int = 0  # these two stay when the tokens themselves are forgotten
    num_output_tokens: int = 0
    # (pool, attempt) that may hold blocks of it, of earlier attempts as well
    holders: set[tuple[str, int]] = field(default_factory=set)
    ended_at: float = 0.0  # it, or its last attempt

    # Of this attempt; they begin anew with each.
    attempt: int = 1
    decode_pool: str = ""
    num_target_cached_tokens: int | None = None  # told with the ticket
    num_loaded_tokens: int = 0  # of those, brought up from a store
    prefill_pool: str = ""
    is_prefill_begun: bool = False
    num_prefilled_tokens: int = 0
    path: PrefillPath | None = None
    prefilled_at: float = 0.0
    stats: TransferStats | None = None
    heard_at: float = 0.0  # when something was last said of it
    stalled_since: float | None = None  # what must come for it to go on is overdue

    # Of the attempts before.
    num_replayed_tokens: int = 0  # generated by them: the end of this one's prompt
    lost: list[EndedAttempt] = field(default_factory=list)
    wait: Wait | None = None
    blamed: set[str] = field(default_factory=set)  # pools with which a hand-off broke
    too_small: set[str] = field(default_factory=set)  # pools that can never hold it
    flawed: list[str] = field(default_factory=list)  # pools whose logits for it were not finite
    is_flaw_settled: bool = False  # the first of these was to blame, or is no more
    suspected_at: int | None = None  # output tokens when a pool died with it on board
    runs_alone: bool = False  # among the suspects

    loads: Loads = field(default_factory=Loads, repr=False)  # where its share is told
    _share: Share = NO_SHARE
    _early: dict[int, NewToken] = field(default_factory=dict)
    _num_computed_at_first: int | None = None  # by the attempt of which the caller has a token

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.prompt_token_ids)

    def forget_tokens(self) -> None:
        """What is kept of an ended request must be small. A pool may still doubt its hashes."""
        self.prompt_token_ids, self.output_token_ids = NO_TOKENS, []
        self.sampling = SamplingParams(max_tokens=self.sampling.max_tokens)
        self.receiver = None
        self._early.clear()

    # -- an attempt --------------------------------------------------------------------------------

    def advance(self, event: RequestEvent) -> None:
        """Move to the next state.

        Raises:
            IllegalTransition: ``event`` cannot happen now; nothing has changed.
        """
        following = advance(TABLE, self.state, event, of=self.request_id)
        if following is not self.state:
            self.state = following
            self._tell_share()

    def reserve_on(self, pool_id: str, now: float) -> None:
        """Begin an attempt on a decode pool.

        Raises:
            IllegalTransition: one is under way, or it has ended.
        """
        self.advance(RequestEvent.RESERVE)
        self.decode_pool, self.heard_at = pool_id, now
        self.holders.add((pool_id, self.attempt))
        self._tell_share()

    def grant(self, num_cached_tokens: int, num_loaded_tokens: int = 0) -> None:
        """Its decode pool has blocks for it, and holds some of its prompt already."""
        self.num_target_cached_tokens = num_cached_tokens
        self.num_loaded_tokens = num_loaded_tokens
        self._tell_share()

    def prefill_on(self, pool_id: str) -> None:
        """A prefill pool computes its prompt.

        Raises:
            IllegalTransition: it is not the moment for it.
        """
        self.advance(RequestEvent.SEND_PREFILL)
        self.prefill_pool = pool_id
        self.holders.add((pool_id, self.attempt))
        self._tell_share()

    def progress(self, num_done: int) -> None:
        """So many tokens of its prompt are done, in its prefill pool."""
        self.num_prefilled_tokens = max(self.num_prefilled_tokens, num_done)
        self._tell_share()

    def accept(self, token: NewToken) -> list[NewToken]:
        """What ``token`` makes available, in order: nothing, itself, or others that waited for it.

        A duplicate by index is dropped; a gap is held back until it is filled.
        """
        if not self.is_active or token.index < self.num_output_tokens:
            return []
        self._early.setdefault(token.index, token)
        ready: list[NewToken] = []
        while self.finish_reason is None and (
            following := self._early.pop(self.num_output_tokens, None)
        ):
            self.output_token_ids.append(following.token_id)
            self.num_output_tokens += 1
            self.finish_reason = following.finish_reason
            ready.append(following)
        if ready:
            self._tell_share()
        return ready

    def lose_attempt(self, reason: str) -> None:
        """This attempt is over: what comes of it from now on is late.

        Raises:
            IllegalTransition: no attempt is under way.
        """
        self.advance(RequestEvent.LOSE)
        num_tokens = self.num_output_tokens
        self.lost.append(
            EndedAttempt(
                attempt=self.attempt,
                decode_pool=self.decode_pool,
                prefill_pool=self.prefill_pool,
                num_output_tokens=num_tokens,
                reason=reason,
            )
        )
        if num_tokens and self._num_computed_at_first is None:
            self._num_computed_at_first = self.num_computed_tokens
        self.attempt += 1
        self.num_replayed_tokens = num_tokens
        self.decode_pool = self.prefill_pool = ""
        self.num_target_cached_tokens, self.num_loaded_tokens = None, 0
        self.is_prefill_begun, self.num_prefilled_tokens = False, 0
        self.path = self.stats = self.stalled_since = None
        self._early.clear()
        self._tell_share()

    # -- what its pools are asked for --------------------------------------------------------------

    @property
    def attempt_token_ids(self) -> TokenIds:
        """The prompt of this attempt."""
        if self.num_replayed_tokens == 0:
            return self.prompt_token_ids
        return self.prompt_token_ids.followed_by(self.output_token_ids[: self.num_replayed_tokens])

    def reserve(self, store: tuple[str, int, int] = ("", 0, 0)) -> Reserve:
        """For its decode pool.

        Args:
            store: (pool, its epoch, leading tokens of the prompt that it holds), if it holds more
                than the decode pool.
        """
        store_pool_id, store_epoch, num_store_tokens = store
        return Reserve(
            request_id=self.request_id,
            attempt=self.attempt,
            prompt_token_ids=self.attempt_token_ids.as_field(),
            sampling=self.sampling,
            cache_salt=self.cache_salt,
            num_output_tokens=self.num_replayed_tokens,
            store_pool_id=store_pool_id,
            store_epoch=store_epoch,
            num_store_tokens=num_store_tokens,
        )

    def prefill(self, target_epoch: int) -> Prefill:
        """For its prefill pool, once its decode pool has said what it holds."""
        return Prefill(
            request_id=self.request_id,
            attempt=self.attempt,
            prompt_token_ids=self.attempt_token_ids.as_field(),
            sampling=self.sampling,
            target_pool_id=self.decode_pool,
            target_epoch=target_epoch,
            num_target_tokens=self.num_target_cached_tokens or 0,
            cache_salt=self.cache_salt,
            num_output_tokens=self.num_replayed_tokens,
            priority=self.priority,
            chunk_tokens=self.chunk_tokens,
            ring_size=self.ring_size,
        )

    def doubt(self, attempt: int) -> Abort:
        """An attempt's KV may be wrong, wherever it lies."""
        return Abort(
            request_id=self.request_id,
            attempt=attempt,
            is_doubtful=True,
            doubtful_hashes=self.block_hashes,
        )

    def pools_of(self, attempt: int) -> set[str]:
        """The decode pool of an attempt and its prefill pool, as far as it has had any."""
        if attempt == self.attempt:
            return {self.decode_pool, self.prefill_pool} - {""}
        ended = (one for one in self.lost if one.attempt == attempt)
        return {pool for one in ended for pool in (one.decode_pool, one.prefill_pool)} - {""}

    # -- how far it is -----------------------------------------------------------------------------

    @property
    def is_active(self) -> bool:
        return self.state not in (RequestState.ENDING, RequestState.GONE)

    @property
    def num_attempt_tokens(self) -> int:
        """Of the prompt of this attempt."""
        return self.num_prompt_tokens + self.num_replayed_tokens

    @property
    def has_gap(self) -> bool:
        """Whether tokens wait for one before them."""
        return bool(self._early)

    @property
    def lacks_a_message(self) -> bool:
        """Whether what it waits for should have come already: messages are lost with connections.

        Tokens have overtaken one, or a pool is done with it and has not said the last word.
        """
        if self.has_gap or (self.decode_pool, self.attempt) not in self.holders:
            return True
        if not self.prefill_pool:
            return False
        is_computed = self.num_prefilled_tokens >= self.num_attempt_tokens
        is_released = (self.prefill_pool, self.attempt) not in self.holders
        return (self.path is None and (is_computed or is_released)) or (
            self.state is RequestState.PREFILLING and is_released
        )

    @property
    def num_computed_tokens(self) -> int | None:
        """Prompt tokens that some pool had to compute, or None while that is not known.

        What is computed again when an attempt is lost is not what the caller asked for.
        """
        if self._num_computed_at_first is not None:
            return self._num_computed_at_first
        if self.path is not None:
            return self.path.num_computed_tokens
        if self.prefill_pool or self.num_target_cached_tokens is None:
            return None
        return self.num_attempt_tokens - self.num_target_cached_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that nobody had to compute."""
        computed = self.num_computed_tokens
        return 0 if computed is None else max(0, self.num_prompt_tokens - computed)

    @property
    def pending_prefill_tokens(self) -> int:
        """Prompt tokens still to be computed, by its prefill pool if it has one."""
        if not self.is_active or self.num_output_tokens > self.num_replayed_tokens:
            return 0
        done = max(self.num_prefilled_tokens, self.num_target_cached_tokens or 0)
        return max(0, self.num_attempt_tokens - done)

    @property
    def pending_decode_tokens(self) -> int:
        """Tokens that may still be generated."""
        return self.sampling.max_tokens - self.num_output_tokens if self.is_active else 0

    def _tell_share(self) -> None:
        share = self.share()
        if share != self._share:
            self.loads.replace(self._share, share)
            self._share = share

    def share(self) -> Share:
        """What it adds to the load of the cluster."""
        if self.state in (RequestState.NEW, RequestState.GONE):
            return NO_SHARE
        if not self.is_active:
            return Share(tenant=self.tenant)
        prefill_tokens = self.pending_prefill_tokens
        decode_tokens = self.pending_decode_tokens
        if not self.prefill_pool:
            decode_tokens += prefill_tokens
        return Share(
            decode_pool=self.decode_pool,
            decode_tokens=decode_tokens if self.decode_pool else 0,
            prefill_pool=self.prefill_pool,
            prefill_tokens=prefill_tokens if self.prefill_pool else 0,
            tenant=self.tenant,
            is_active=True,
            is_interactive=self.priority == 0,
        )

    def describe_path(self) -> str:
        """Which pools it went through and what that took, as far as is known: ``x-baton-path``."""
        parts = [f"decode={self.decode_pool}"] if self.decode_pool else []
        if self.prefill_pool:
            parts.append(f"prefill={self.prefill_pool}")
            if self.path is not None:
                parts.append(f"ring={self.path.ring_size}")
        elif self.num_target_cached_tokens is not None:
            parts.append("local")
        if self.num_computed_tokens is not None:
            parts.append(f"cached={self.num_cached_tokens}")
            parts.append(f"computed={self.num_computed_tokens}")
        if self.num_loaded_tokens:
            parts.append(f"loaded={self.num_loaded_tokens}")
        if self.path is not None:
            if self.path.num_fetched_tokens:
                parts.append(f"fetched={self.path.num_fetched_tokens}")
            parts.append(f"moved={self.path.num_moved_tokens}")
        if self.lost:
            parts.append(f"attempts={self.attempt}")
            parts.append(f"lost={'+'.join(ended.reason for ended in self.lost)}")
        return "; ".join(parts)


def as_new_token(message: FirstToken) -> NewToken:
    """A prefill pool's token is the first of an attempt."""
    return NewToken(
        request_id=message.request_id,
        attempt=message.attempt,
        index=message.index,
        token_id=message.token_id,
        finish_reason=message.finish_reason,
        logprobs=message.logprobs,
    )
