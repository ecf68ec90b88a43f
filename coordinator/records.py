"""The record of one sequence: the one truth about it. Pure; its state table is at the top.

NEW --reserve--> RESERVING --ticket--> PREFILLING or COMPUTING --tokens--> DECODING --end--> ENDING
ENDING --every pool that held something has released it--> GONE. An end may come at any time.

The first token comes from a prefill pool, all others from the decode pool, on two connections: they
may overtake each other. ``accept`` puts them in order by index, and drops what was there before.
"""

import enum
from dataclasses import dataclass, field

from coordinator.router import SessionKey
from protocol.errors import IllegalTransition
from protocol.messages import FirstToken, NewToken
from protocol.request import FinishReason, PrefillPath, SamplingParams, TransferStats
from protocol.timeline import TimeLine


class State(enum.Enum):
    NEW = "new"
    RESERVING = "reserving"  # the decode pool has been asked for blocks
    PREFILLING = "prefilling"  # a prefill pool computes the prompt
    COMPUTING = "computing"  # the decode pool computes the prompt
    DECODING = "decoding"
    ENDING = "ending"  # nothing is expected but that blocks are released
    GONE = "gone"


class Step(enum.Enum):
    RESERVE = "reserve"
    SEND_PREFILL = "send_prefill"
    COMPUTE_HERE = "compute_here"
    COMMIT = "commit"
    TOKEN = "token"
    END = "end"
    ALL_RELEASED = "all_released"


TABLE: dict[tuple[State, Step], State] = {
    (State.NEW, Step.RESERVE): State.RESERVING,
    (State.NEW, Step.END): State.ENDING,
    (State.RESERVING, Step.SEND_PREFILL): State.PREFILLING,
    (State.RESERVING, Step.COMPUTE_HERE): State.COMPUTING,
    (State.RESERVING, Step.END): State.ENDING,
    (State.PREFILLING, Step.TOKEN): State.PREFILLING,  # the first one; the KV is on its way
    (State.PREFILLING, Step.COMMIT): State.DECODING,
    (State.PREFILLING, Step.END): State.ENDING,
    (State.COMPUTING, Step.TOKEN): State.DECODING,
    (State.COMPUTING, Step.END): State.ENDING,
    (State.DECODING, Step.TOKEN): State.DECODING,
    (State.DECODING, Step.END): State.ENDING,
    (State.ENDING, Step.ALL_RELEASED): State.GONE,
}


@dataclass(slots=True)
class Record:
    """Fields in the order of a request's life. Only the service changes one."""

    request_id: str
    attempt: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    tenant: str
    cache_salt: str = ""
    block_hashes: tuple[bytes, ...] = ()
    session: SessionKey | None = None
    timeline: TimeLine = field(default_factory=TimeLine)
    state: State = State.NEW
    decode_pool: str = ""
    num_target_cached_tokens: int | None = None  # told with the ticket
    prefill_pool: str = ""
    num_prefilled_tokens: int = 0
    path: PrefillPath | None = None
    stats: TransferStats | None = None
    output_token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error_code: str = ""
    holders: set[str] = field(default_factory=set)  # pools that may hold blocks of it
    ended_at: float = 0.0
    num_prompt_tokens: int = 0  # stays when the prompt itself is forgotten
    _early: dict[int, NewToken] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.prompt_token_ids)

    def forget_prompt(self) -> None:
        """What is kept of an ended request must be small."""
        self.prompt_token_ids, self.block_hashes = (), ()
        self._early.clear()

    def step(self, step: Step) -> None:
        """Take one step of the table.

        Raises:
            IllegalTransition: the table does not have it; the record is unchanged.
        """
        following = TABLE.get((self.state, step))
        if following is None:
            raise IllegalTransition(f"{self.request_id}: {step.value} while {self.state.value}")
        self.state = following

    @property
    def is_active(self) -> bool:
        return self.state not in (State.ENDING, State.GONE)

    @property
    def num_computed_tokens(self) -> int | None:
        """Prompt tokens that some pool had to compute, or None while that is not known."""
        if self.path is not None:
            return self.path.num_computed_tokens
        if self.prefill_pool or self.num_target_cached_tokens is None:
            return None
        return self.num_prompt_tokens - self.num_target_cached_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that nobody had to compute."""
        computed = self.num_computed_tokens
        return 0 if computed is None else max(0, self.num_prompt_tokens - computed)

    @property
    def pending_prefill_tokens(self) -> int:
        """Prompt tokens still to be computed, by its prefill pool if it has one."""
        if not self.is_active or self.output_token_ids:
            return 0
        done = max(self.num_prefilled_tokens, self.num_target_cached_tokens or 0)
        return max(0, self.num_prompt_tokens - done)

    @property
    def pending_decode_tokens(self) -> int:
        """Tokens that may still be generated."""
        return self.sampling.max_tokens - len(self.output_token_ids) if self.is_active else 0

    def accept(self, token: NewToken) -> list[NewToken]:
        """What ``token`` makes available, in order: nothing, itself, or others that waited for it.

        A duplicate by index is dropped; a gap is held back until it is filled.
        """
        if not self.is_active or token.index < len(self.output_token_ids):
            return []
        self._early.setdefault(token.index, token)
        ready: list[NewToken] = []
        while self.finish_reason is None and (
            following := self._early.pop(len(self.output_token_ids), None)
        ):
            self.output_token_ids.append(following.token_id)
            self.finish_reason = following.finish_reason
            ready.append(following)
        return ready

    def describe_path(self) -> str:
        """Where the request went and what that took, for ``x-baton-path``; what is known so far."""
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
        if self.path is not None:
            if self.path.num_fetched_tokens:
                parts.append(f"fetched={self.path.num_fetched_tokens}")
            parts.append(f"moved={self.path.num_moved_tokens}")
        return "; ".join(parts)


def as_new_token(message: FirstToken) -> NewToken:
    """A prefill pool's token is the one of index 0."""
    return NewToken(
        message.request_id,
        message.attempt,
        0,
        message.token_id,
        message.finish_reason,
        message.logprobs,
    )
