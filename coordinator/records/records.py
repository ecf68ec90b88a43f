"""The record of one sequence: the one truth about it. Pure; its state table is at the top.

NEW --reserve--> RESERVING --ticket--> PREFILLING or COMPUTING --tokens--> DECODING --end--> ENDING
ENDING --every pool that held something has released it--> GONE. An end may come at any time.
RESERVING, PREFILLING, COMPUTING, DECODING --the attempt is lost--> WAITING --reserve--> RESERVING

An *attempt* is one way from RESERVING to the end, on one set of pools. When it is lost, what the
caller has of its tokens becomes the end of the next attempt's prompt, and the next token is sampled
as if nothing had happened: it depends on the seed, its index and the tokens before it alone.

The first token comes from a prefill pool, all others from the decode pool, on two connections: they
may overtake each other. ``accept`` puts them in order by index, and drops what was there before.
"""

import enum
from dataclasses import dataclass, field

from coordinator.records.attempts import EndedAttempt, Wait
from coordinator.records.generation import Generation, SessionKey
from coordinator.records.loads import NO_SHARE, Loads, Share
from protocol.messages import Abort, FirstToken, NewToken, Prefill, Reserve
from protocol.request import FinishReason, PrefillPath, SamplingParams, TransferStats
from protocol.timeline import TimeLine
from protocol.token_ids import TokenIds
from protocol.transitions import advance


class RecordState(enum.Enum):
    NEW = "new"
    RESERVING = "reserving"  # the decode pool has been asked for blocks
    PREFILLING = "prefilling"  # a prefill pool computes the prompt
    COMPUTING = "computing"  # the decode pool computes the prompt
    DECODING = "decoding"
    WAITING = "waiting"  # an attempt was lost, the next one has not begun
    ENDING = "ending"  # nothing is expected but that blocks are released
    GONE = "gone"


class RecordEvent(enum.Enum):
    RESERVE = "reserve"
    SEND_PREFILL = "send_prefill"
    COMPUTE_HERE = "compute_here"
    COMMIT = "commit"
    TOKEN = "token"
    LOSE = "lose"
    END = "end"
    ALL_RELEASED = "all_released"


TABLE: dict[tuple[RecordState, RecordEvent], RecordState] = {
    (RecordState.NEW, RecordEvent.RESERVE): RecordState.RESERVING,
    (RecordState.NEW, RecordEvent.END): RecordState.ENDING,
    (RecordState.RESERVING, RecordEvent.SEND_PREFILL): RecordState.PREFILLING,
    (RecordState.RESERVING, RecordEvent.COMPUTE_HERE): RecordState.COMPUTING,
    (RecordState.RESERVING, RecordEvent.END): RecordState.ENDING,
    (
        RecordState.PREFILLING,
        RecordEvent.TOKEN,
    ): RecordState.PREFILLING,  # the first one; the KV is on its way
    (RecordState.PREFILLING, RecordEvent.COMMIT): RecordState.DECODING,
    (RecordState.PREFILLING, RecordEvent.END): RecordState.ENDING,
    (RecordState.COMPUTING, RecordEvent.TOKEN): RecordState.DECODING,
    (RecordState.COMPUTING, RecordEvent.END): RecordState.ENDING,
    (RecordState.DECODING, RecordEvent.TOKEN): RecordState.DECODING,
    (RecordState.DECODING, RecordEvent.END): RecordState.ENDING,
    (RecordState.RESERVING, RecordEvent.LOSE): RecordState.WAITING,
    (RecordState.PREFILLING, RecordEvent.LOSE): RecordState.WAITING,
    (RecordState.COMPUTING, RecordEvent.LOSE): RecordState.WAITING,
    (RecordState.DECODING, RecordEvent.LOSE): RecordState.WAITING,
    (RecordState.WAITING, RecordEvent.RESERVE): RecordState.RESERVING,
    (RecordState.WAITING, RecordEvent.END): RecordState.ENDING,
    (RecordState.ENDING, RecordEvent.ALL_RELEASED): RecordState.GONE,
}


FIRST_ATTEMPT = 1
NOTHING = TokenIds.of(())


@dataclass(slots=True)
class Record:
    """Fields in the order of a request's life; those of an attempt begin anew with each. Only the
    service changes one, and what counts for ``loads`` by the methods below."""

    request_id: str
    attempt: int
    prompt_token_ids: TokenIds
    sampling: SamplingParams
    tenant: str
    cache_salt: str = ""
    block_hashes: tuple[bytes, ...] = ()
    session: SessionKey | None = None
    fingerprint: bytes = b""  # of what was asked for
    is_offload: bool = False  # for a store, which takes the place of its decode pool
    priority: int = 0
    chunk_tokens: int = 0
    ring_size: int = 0
    timeline: TimeLine = field(default_factory=TimeLine)
    state: RecordState = RecordState.NEW
    decode_pool: str = ""
    num_target_cached_tokens: int | None = None  # told with the ticket
    num_loaded_tokens: int = 0  # of those, brought up from a store
    prefill_pool: str = ""
    is_prefill_begun: bool = False
    num_prefilled_tokens: int = 0
    path: PrefillPath | None = None
    prefilled_at: float = 0.0
    stats: TransferStats | None = None
    output_token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error_code: str = ""
    # (pool, attempt) that may hold blocks of it, of earlier attempts as well
    holders: set[tuple[str, int]] = field(default_factory=set)
    heard_at: float = 0.0  # when something was last said of it
    stalled_since: float | None = None  # what must come for it to go on is overdue
    ended_at: float = 0.0  # it, or its last attempt

    # of all attempts
    num_replayed_tokens: int = 0  # generated by earlier attempts: the end of this one's prompt
    lost: list[EndedAttempt] = field(default_factory=list)
    wait: Wait | None = None
    blamed: set[str] = field(default_factory=set)  # pools with which a hand-off broke
    too_small: set[str] = field(default_factory=set)  # pools that can never hold it
    flawed: list[str] = field(default_factory=list)  # pools whose logits for it were not finite
    is_flaw_proven: bool = False  # another pool has gone on where the first had come to nothing
    suspected_at: int | None = None  # output tokens when a pool died with it on board
    runs_alone: bool = False  # among the suspects

    num_prompt_tokens: int = 0  # these two stay when the tokens themselves are forgotten
    num_output_tokens: int = 0
    loads: Loads = field(default_factory=Loads, repr=False)  # where its share is told
    _share: Share = NO_SHARE
    _early: dict[int, NewToken] = field(default_factory=dict)
    _num_computed_at_first: int | None = None  # by the attempt of which the caller has a token

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.prompt_token_ids)

    @staticmethod
    def of(generation: Generation, fingerprint: bytes, loads: Loads) -> "Record":
        """Of what is to be generated, before its first attempt."""
        return Record(
            request_id=generation.request_id,
            attempt=FIRST_ATTEMPT,
            prompt_token_ids=TokenIds.of(generation.prompt_token_ids),
            sampling=generation.sampling,
            tenant=generation.tenant,
            cache_salt=generation.cache_salt,
            block_hashes=generation.block_hashes,
            session=generation.session,
            fingerprint=fingerprint,
            is_offload=generation.is_offload,
            priority=generation.priority,
            chunk_tokens=generation.chunk_tokens,
            ring_size=generation.ring_size,
            loads=loads,
        )

    def forget_tokens(self) -> None:
        """What is kept of an ended request must be small."""
        self.prompt_token_ids, self.block_hashes, self.output_token_ids = NOTHING, (), []
        self.sampling = SamplingParams(max_tokens=self.sampling.max_tokens)
        self._early.clear()

    def advance(self, event: RecordEvent) -> None:
        """Move to the next state.

        Raises:
            IllegalTransition: ``event`` cannot happen now; the record is unchanged.
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
        self.advance(RecordEvent.RESERVE)
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
        self.advance(RecordEvent.SEND_PREFILL)
        self.prefill_pool = pool_id
        self.holders.add((pool_id, self.attempt))
        self._tell_share()

    def progress(self, num_done: int) -> None:
        """So many tokens of its prompt are done, in its prefill pool."""
        self.num_prefilled_tokens = max(self.num_prefilled_tokens, num_done)
        self._tell_share()

    def _tell_share(self) -> None:
        share = self.share()
        if share != self._share:
            self.loads.replace(self._share, share)
            self._share = share

    def share(self) -> Share:
        """What it adds to the load of the cluster."""
        if self.state in (RecordState.NEW, RecordState.GONE):
            return NO_SHARE
        if not self.is_active:
            return Share(tenant=self.tenant)
        prefill_tokens = self.pending_prefill_tokens
        decode_tokens = self.pending_decode_tokens
        if not self.prefill_pool:
            decode_tokens += prefill_tokens
        return Share(
            self.decode_pool,
            decode_tokens if self.decode_pool else 0,
            self.prefill_pool,
            prefill_tokens if self.prefill_pool else 0,
            self.tenant,
            True,
            self.priority == 0,
        )

    def lose_attempt(self, reason: str) -> None:
        """This attempt is over: what comes of it from now on is late.

        Raises:
            IllegalTransition: no attempt is under way.
        """
        self.advance(RecordEvent.LOSE)
        num_tokens = self.num_output_tokens
        self.lost.append(
            EndedAttempt(self.attempt, self.decode_pool, self.prefill_pool, num_tokens, reason)
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

    @property
    def attempt_token_ids(self) -> TokenIds:
        """The prompt of this attempt."""
        if self.num_replayed_tokens == 0:
            return self.prompt_token_ids
        return self.prompt_token_ids.followed_by(self.output_token_ids[: self.num_replayed_tokens])

    def reserve(self, store: tuple[str, int, int] | None = None) -> Reserve:
        """What its decode pool is asked for; ``store`` has more of the prompt than it."""
        return Reserve(
            self.request_id,
            self.attempt,
            self.attempt_token_ids.as_field(),
            self.sampling,
            self.cache_salt,
            self.num_replayed_tokens,
            *(store or ()),
        )

    def prefill(self, target_epoch: int) -> Prefill:
        """What its prefill pool is asked for, once its decode pool has said what it holds."""
        return Prefill(
            self.request_id,
            self.attempt,
            self.attempt_token_ids.as_field(),
            self.sampling,
            self.decode_pool,
            target_epoch,
            self.num_target_cached_tokens or 0,
            self.cache_salt,
            self.num_replayed_tokens,
            self.priority,
            self.chunk_tokens,
            self.ring_size,
        )

    def doubt(self) -> Abort:
        """This attempt's KV may be wrong, wherever it lies."""
        return Abort(self.request_id, self.attempt, True, self.block_hashes)

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
            self.state is RecordState.PREFILLING and is_released
        )

    @property
    def is_active(self) -> bool:
        return self.state not in (RecordState.ENDING, RecordState.GONE)

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


def as_new_token(message: FirstToken) -> NewToken:
    """A prefill pool's token is the first of an attempt."""
    return NewToken(
        message.request_id,
        message.attempt,
        message.index,
        message.token_id,
        message.finish_reason,
        message.logprobs,
    )
