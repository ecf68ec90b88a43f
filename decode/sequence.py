"""One request as the decode scheduler keeps it, and the rule by which it finishes.

``token_ids`` is the prompt followed by what was generated. KV is computed for the first
``num_computed_tokens`` of them; the last generated token's never is until the step that needs it.
"""

from dataclasses import dataclass, field

from decode.states import Change, State, advance
from kvcache.prefix import block_salt
from protocol.kv import BlockRef
from protocol.messages import Reserve
from protocol.request import FinishReason, SamplingParams

Key = tuple[str, int]  # (request_id, attempt)


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's life in this pool, its fields in the order in which they come to matter."""

    key: Key
    arrival: int  # rises with each request; the order of fairness
    arrived_s: float
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    salt: str  # of its block hashes
    state: State = State.QUEUED
    is_local: bool = False  # its prompt is computed here
    block_hashes: list[bytes] = field(default_factory=list)  # of the leading full blocks
    blocks: list[BlockRef] = field(default_factory=list)  # owned, in logical order
    in_transfer: list[BlockRef] = field(default_factory=list)  # a peer may write into these
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache when blocks were granted
    num_computed_tokens: int = 0
    is_served: bool = False  # its cached prefix was fetched by its prefill pool, or is being
    num_hashed_blocks: int = 0  # leading blocks that are offered to the prefix cache
    output_token_ids: list[int] = field(default_factory=list)
    is_known: bool = False  # the runners have its block table
    num_new_blocks: int = 0  # at the end of ``blocks``, not yet told to the runners
    num_swapped_blocks: int = 0  # held in host memory while pre-empted

    @staticmethod
    def of(reserve: Reserve, arrival: int, now: float, model_fingerprint: str) -> "Sequence":
        """A request as it arrives."""
        return Sequence(
            key=(reserve.request_id, reserve.attempt),
            arrival=arrival,
            arrived_s=now,
            prompt_token_ids=reserve.prompt_token_ids,
            sampling=reserve.sampling,
            salt=block_salt(model_fingerprint, reserve.cache_salt),
        )

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens to be computed before the next one can be sampled; 1 when decoding."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def holds_handoff(self) -> bool:
        """Whether its hand-off was opened and has not ended."""
        return self.state in (State.OPENING, State.RESERVED, State.SWITCHING, State.CLOSING)

    def advance(self, change: Change) -> None:
        """Move to the next state.

        Raises:
            IllegalTransition: ``change`` cannot happen now; nothing is changed.
        """
        self.state = advance(self.state, change)

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """``token_ids[start:end]`` without joining prompt and output."""
        num_prompt = len(self.prompt_token_ids)
        if start >= num_prompt:
            return tuple(self.output_token_ids[start - num_prompt : end - num_prompt])
        head = self.prompt_token_ids[start:end]
        return head + tuple(self.output_token_ids[: max(0, end - num_prompt)])

    def finish_reason(self, max_len: int) -> FinishReason | None:
        """Whether the last generated token ends the sequence.

        Args:
            max_len: tokens of prompt and output at which a sequence must end.
        """
        num_output = len(self.output_token_ids)
        sampling = self.sampling
        is_stop = self.output_token_ids[-1] in sampling.stop_token_ids
        if is_stop and num_output > sampling.min_tokens:
            return FinishReason.STOP
        if num_output >= sampling.max_tokens or self.num_tokens >= max_len:
            return FinishReason.LENGTH
        return None
