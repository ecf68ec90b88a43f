"""The plans that a pool's leader sends to its followers, one per step, and what they answer.

No rank decides anything in front of a collective: everything that decides whether one is entered is
in the plan, and every rank of the pool executes the same plan in the same order.
"""

import msgspec

from protocol.request import SamplingParams, TokenLogprobs


class _Message(
    msgspec.Struct, frozen=True, tag=True, omit_defaults=True, forbid_unknown_fields=True
):
    pass


# -- prefill ---------------------------------------------------------------------------------------


class PlacedBlock(msgspec.Struct, frozen=True, array_like=True):
    """Logical block ``logical`` of a sequence lies on ``cp_rank`` as ``block_id``."""

    logical: int
    cp_rank: int
    block_id: int
    generation: int


class HandoffRoute(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a request's KV goes: announce what lies at or after ``first_logical`` to that pool."""

    pool_id: str
    epoch: int
    first_logical: int


class ChunkWork(msgspec.Struct, frozen=True, omit_defaults=True):
    """One chunk of one request on one ring.

    Tokens ``[start, start + len(token_ids))``; ``start`` is a multiple of the block size. The ring
    holds every owner of a block. ``blocks`` are all blocks of the sequence up to the chunk's end,
    in logical order; those from ``start // block_size`` on are the chunk's and are computed by
    their owners.
    """

    request_id: str
    attempt: int
    chunk: int
    start: int
    token_ids: tuple[int, ...]
    ring: tuple[int, ...]  # cp ranks, in ring order
    pass_q: bool
    blocks: tuple[PlacedBlock, ...]
    is_last: bool
    route: HandoffRoute | None = None
    announce_cached: tuple[PlacedBlock, ...] = ()  # found in the cache and missed by the target
    sampling: SamplingParams | None = None  # with the last chunk
    prompt_token_ids: tuple[int, ...] = ()  # with the last chunk, and only if penalties need them


class PrefillPlan(_Message, frozen=True):
    """Work in global order: a rank executes, in this order, the items whose ring it is in."""

    step: int
    work: tuple[ChunkWork, ...]


class SampledToken(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    request_id: str
    attempt: int
    token_id: int
    logprobs: TokenLogprobs | None = None


# -- decode ----------------------------------------------------------------------------------------


class NewSequence(msgspec.Struct, frozen=True, omit_defaults=True):
    """A sequence enters the pool: its followers keep its block table from now on."""

    request_id: str
    attempt: int
    block_ids: tuple[int, ...]


class SequenceStep(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """Compute ``token_ids`` at positions from ``start``; sample after the last of them, or not."""

    request_id: str
    attempt: int
    start: int
    token_ids: tuple[int, ...]
    new_block_ids: tuple[int, ...] = ()  # appended to its block table before the step
    sample: bool = True


class SwapBlocks(msgspec.Struct, frozen=True, array_like=True):
    """Copy a sequence's blocks to host memory (``out``) or back into these blocks."""

    request_id: str
    attempt: int
    out: bool
    block_ids: tuple[int, ...]


class DecodePlan(_Message, frozen=True):
    """In order: swap, drop, add, compute. Rank 0 alone samples."""

    step: int
    sequences: tuple[SequenceStep, ...]
    swaps: tuple[SwapBlocks, ...] = ()
    dropped: tuple[tuple[str, int], ...] = ()
    new: tuple[NewSequence, ...] = ()


# -- both ------------------------------------------------------------------------------------------


class Stop(_Message, frozen=True):
    """The gang ends."""


class StepResult(_Message, frozen=True):
    """rank -> leader: the step is done here. ``tokens`` from the rank that sampled."""

    step: int
    rank: int
    tokens: tuple[SampledToken, ...] = ()
    compute_s: float = 0.0


Plan = PrefillPlan | DecodePlan | Stop
