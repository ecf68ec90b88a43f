"""One request of a prefill pool's scheduler, its fields in the order of its life. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvtransfer.events import CommitWhenRead, OpenTargetBlocks
from prefill.manifest import CACHED_CHUNK
from prefill.placement import RingPlacement
from prefill.states import TABLE, RequestEvent, RequestState
from protocol.handoff import Fetch, SegmentKey
from protocol.kv import BlockRef
from protocol.messages import Prefill, Progress
from protocol.plans import HandoffRoute, PlacedBlock
from protocol.request import FinishReason, PrefillPath, RequestKey
from protocol.transitions import advance

Owned = tuple[int, BlockRef]  # a cp rank, and a block of its space


@dataclass(eq=False)
class Request:
    """One attempt at one prompt. Only the scheduler and its parts change it."""

    message: Prefill
    arrived: float
    number: int  # in the order of arrival
    state: RequestState = RequestState.WAITING
    block_hashes: list[bytes] = field(default_factory=list)  # of its full blocks

    # from its admission on
    admitted: float = 0.0
    placement: RingPlacement | None = None
    blocks: tuple[PlacedBlock, ...] = ()  # of the whole prompt, in logical order
    may_fetch: bool = True  # it has not failed before
    num_chunks_done: int = 0
    in_transfer: list[Owned] = field(default_factory=list)
    manifest: list[SegmentKey] = field(default_factory=list)

    @property
    def key(self) -> RequestKey:
        return self.message.key

    @property
    def num_tokens(self) -> int:
        return len(self.message.prompt_token_ids)

    @property
    def placed(self) -> RingPlacement:
        """Its placement, once it is admitted."""
        assert self.placement is not None, f"{self.key} is not admitted"
        return self.placement

    @property
    def num_computed_tokens(self) -> int:
        if self.placement is None:
            return 0
        if self.num_chunks_done == 0:
            return self.placement.chunks[0].start
        return self.placement.chunks[self.num_chunks_done - 1].stop

    @property
    def num_left_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def next_chunk(self) -> int:
        """The number of the chunk to compute next; cached blocks count as a chunk of their own."""
        return CACHED_CHUNK + 1 + self.num_chunks_done

    @property
    def priority(self) -> int:
        """The lower go first."""
        return self.message.priority

    @property
    def needs_history(self) -> bool:
        """Whether its next token depends on the token ids before it by more than their KV."""
        sampling = self.message.sampling
        counts_outputs = (
            sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
            or sampling.grammar != ""
        )
        return sampling.repetition_penalty != 1.0 or (
            counts_outputs and self.message.num_output_tokens > 0
        )

    def progress(self) -> Progress:
        return Progress(*self.key, num_done=self.num_computed_tokens, num_total=self.num_tokens)

    def route(self, block_size: int) -> HandoffRoute:
        """The target of its KV."""
        return HandoffRoute(
            pool_id=self.message.target_pool_id,
            epoch=self.message.target_epoch,
            first_logical=self.message.num_target_tokens // block_size,
        )

    def path(self, pool_id: str, now: float) -> PrefillPath:
        """The statistics of a request whose prompt is computed."""
        placement = self.placed
        start = placement.chunks[0].start
        block_size = placement.geometry.block_size
        return PrefillPath(
            pool_id=pool_id,
            ring_size=len(placement.ring),
            num_chunks=len(placement.chunks),
            num_cached_tokens=placement.num_cached_blocks * block_size,
            num_computed_tokens=self.num_tokens - start,
            num_moved_tokens=max(0, self.num_tokens - self.message.num_target_tokens),
            num_fetched_tokens=placement.num_fetched_blocks * block_size,
            queue_s=self.admitted - self.arrived,
            compute_s=now - self.admitted,
        )

    @property
    def fetched_blocks(self) -> tuple[PlacedBlock, ...]:
        """Of its blocks, those whose KV comes from the decode pool."""
        placement = self.placed
        return self.blocks[placement.num_cached_blocks : placement.num_prefix_blocks]

    def open_fetch(self) -> OpenTargetBlocks:
        """The command that has every rank expect its fetch."""
        blocks = self.fetched_blocks
        refs = tuple(ref_of(block) for block in blocks)
        owners = tuple(block.cp_rank for block in blocks)
        return OpenTargetBlocks(
            *self.key, first_logical=blocks[0].logical, blocks=refs, owners=owners
        )

    def ask_fetch(self) -> Fetch:
        """The command that asks for its fetch, once every rank expects it."""
        blocks = self.fetched_blocks
        return Fetch(
            *self.key,
            source_pool_id=self.message.target_pool_id,
            source_epoch=self.message.target_epoch,
            first_logical=blocks[0].logical,
            owners=tuple(block.cp_rank for block in blocks),
            block_hashes=tuple(self.block_hashes[block.logical] for block in blocks),
        )

    def commit(self, first_token_id: int) -> CommitWhenRead:
        """The command that completes its hand-off when the decode pool has read all of it."""
        return CommitWhenRead(
            *self.key,
            target_pool_id=self.message.target_pool_id,
            target_epoch=self.message.target_epoch,
            manifest=tuple(self.manifest),
            num_tokens=self.num_tokens,
            first_token_id=first_token_id,
        )

    def advance(self, event: RequestEvent) -> None:
        """Move to the next state.

        Raises:
            IllegalTransition: ``event`` cannot happen now; nothing is changed.
        """
        self.state = advance(TABLE, self.state, event, of=self.key[0])

    def finish_reason(self, token_id: int, max_model_len: int) -> FinishReason | None:
        """Why the sequence ends with the token sampled here, if it does."""
        sampling = self.message.sampling
        num_output = self.message.num_output_tokens + 1
        if token_id in sampling.stop_token_ids and num_output > sampling.min_tokens:
            return FinishReason.STOP
        if num_output >= sampling.max_tokens or self.num_tokens + 1 >= max_model_len:
            return FinishReason.LENGTH
        return None


def ref_of(block: PlacedBlock) -> BlockRef:
    """The reference into its own rank's block space."""
    return BlockRef(block.block_id, block.generation)


def placed(first_logical: int, blocks: Sequence[Owned]) -> tuple[PlacedBlock, ...]:
    """Blocks as those of a sequence, the first of them at ``first_logical``."""
    return tuple(
        PlacedBlock(
            logical=first_logical + index,
            cp_rank=cp_rank,
            block_id=ref.block_id,
            generation=ref.generation,
        )
        for index, (cp_rank, ref) in enumerate(blocks)
    )
