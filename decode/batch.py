"""The sequences that a decode pool computes, and the plan of their next step. Pure.

A step computes one token of every decoding sequence, then chunks of prompts, oldest first, with
what is left of the token budget. Before that every decoding sequence gets a slot for its token:

    running, oldest first    A  B  C  D        B needs a block and there is none:
                                      `-- goes to host memory, as many as it takes, newest first

The sequence that needs the block may be the newest itself; then it goes. The oldest comes back
first, and only in a step in which none went, so that no other takes what was freed for one.
"""

import bisect

from decode.facts import DecodeFacts
from decode.memory import SequenceMemory
from decode.sequence import Sequence
from decode.states import SequenceEvent, SequenceState
from protocol.plans import DecodePlan, NewSequence, SequenceStep, SwapBlocks
from protocol.request import RequestKey


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


class Batch:
    """The RUNNING and PREEMPTED sequences.

    Args:
        memory: the pool's blocks.
        facts: of the pool.
    """

    def __init__(self, memory: SequenceMemory, facts: DecodeFacts) -> None:
        self._memory = memory
        self._facts = facts
        self.running: list[Sequence] = []  # both: oldest arrival first
        self.preempted: list[Sequence] = []
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0
        self.num_swapped_blocks = 0  # in host memory now
        self._swaps: list[SwapBlocks] = []  # these two: for the next plan
        self._dropped: list[RequestKey] = []
        self._num_steps = 0

    def join(self, sequence: Sequence) -> None:
        """Take in a sequence that is RUNNING from now on."""
        bisect.insort(self.running, sequence, key=_arrival)

    def leave(self, sequence: Sequence) -> None:
        """Remove a sequence that ends; the runners forget it with the next plan."""
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
        else:
            self.preempted.remove(sequence)
            self.num_swapped_blocks -= sequence.num_swapped_blocks
        if sequence.is_known or sequence.num_swapped_blocks:
            self._dropped.append(sequence.key)

    def make_room(self, num_others: int) -> None:
        """Give every decoding sequence a slot for its next token; then let pre-empted ones return.

        Args:
            num_others: sequences outside the batch that hold blocks.
        """
        if self._grow_all():
            self._resume(num_others)

    def plan(self) -> DecodePlan | None:
        """The next step, or None when no rank has anything to do."""
        new: list[NewSequence] = []
        steps = self._pick(new)
        if not (steps or self._swaps or self._dropped):
            return None
        self._num_steps += 1
        plan = DecodePlan(
            step=self._num_steps,
            sequences=tuple(steps),
            swaps=tuple(self._swaps),
            dropped=tuple(self._dropped),
            new=tuple(new),
        )
        self._swaps.clear()
        self._dropped.clear()
        return plan

    # -- room --------------------------------------------------------------------------------------

    def _grow_all(self) -> bool:
        """Give each sequence, oldest first, a slot for its next token; whether none had to go."""
        num_preemptions = self.num_preemptions
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            if self._memory.grow(sequence):
                index += 1
            else:
                # The newest goes; it may be ``sequence`` itself, and then the loop ends.
                self._preempt(self.running.pop())
        return num_preemptions == self.num_preemptions

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks away; its KV goes to host memory, or is computed again later.

        The blocks may be reused in the same step: every rank swaps before it computes.
        """
        sequence.advance(SequenceEvent.PREEMPT)
        num_blocks = self._memory.num_blocks_for(sequence.num_computed_tokens)
        if self.num_swapped_blocks + num_blocks <= self._facts.max_swapped_blocks:
            sequence.num_swapped_blocks = num_blocks
            self.num_swapped_blocks += num_blocks
        else:
            self.num_recomputed_tokens += sequence.num_computed_tokens
        if sequence.num_swapped_blocks:
            block_ids = tuple(block.block_id for block in sequence.blocks[:num_blocks])
            self._swaps.append(SwapBlocks(*sequence.key, out=True, block_ids=block_ids))
        elif sequence.is_known:
            self._dropped.append(sequence.key)
        sequence.is_known = False
        self._memory.release(sequence)
        bisect.insort(self.preempted, sequence, key=_arrival)
        self.num_preemptions += 1

    def _resume(self, num_others: int) -> None:
        while self.preempted:
            sequence = self.preempted[0]
            num_slots = min(sequence.num_tokens + 1, self._memory.num_slots)
            is_alone = not self.running and not num_others
            if not self._memory.allocate(sequence, num_slots, is_alone=is_alone):
                return
            if sequence.num_swapped_blocks:
                restored = sequence.blocks[: sequence.num_swapped_blocks]
                block_ids = tuple(block.block_id for block in restored)
                self._swaps.append(SwapBlocks(*sequence.key, out=False, block_ids=block_ids))
                self.num_swapped_blocks -= sequence.num_swapped_blocks
                sequence.num_swapped_blocks = 0
            del self.preempted[0]
            sequence.advance(SequenceEvent.RESUME)
            self.join(sequence)

    # -- the step ----------------------------------------------------------------------------------

    def _pick(self, new: list[NewSequence]) -> list[SequenceStep]:
        """The work of a step: the sequences with one token left, then chunks of the others."""
        decoding = [sequence for sequence in self.running if sequence.num_pending_tokens == 1]
        steps = [self._step(sequence, 1, new) for sequence in decoding]
        num_left = self._facts.token_budget - len(steps)
        if len(decoding) == len(self.running):
            return steps
        for sequence in self.running:
            if sequence.num_pending_tokens == 1:
                continue
            if num_left == 0:
                break
            num_tokens = self._chunk(sequence, num_left)
            steps.append(self._step(sequence, num_tokens, new))
            num_left -= num_tokens
        return steps

    def _chunk(self, sequence: Sequence, num_left: int) -> int:
        """How many tokens to compute now. A chunk that does not end the prompt ends a block."""
        if sequence.num_pending_tokens <= num_left:
            return sequence.num_pending_tokens
        past_boundary = (sequence.num_computed_tokens + num_left) % self._memory.block_size
        return num_left - past_boundary if past_boundary < num_left else num_left

    def _step(self, sequence: Sequence, num_tokens: int, new: list[NewSequence]) -> SequenceStep:
        added: tuple[int, ...] = ()
        if not sequence.is_known:
            block_ids = tuple(block.block_id for block in sequence.blocks)
            new.append(NewSequence(*sequence.key, block_ids=block_ids))
            sequence.is_known = True
        elif sequence.num_new_blocks:
            grown = sequence.blocks[-sequence.num_new_blocks :]
            added = tuple(block.block_id for block in grown)
        sequence.num_new_blocks = 0
        start = sequence.num_computed_tokens
        end = start + num_tokens
        return SequenceStep(
            *sequence.key,
            start=start,
            token_ids=sequence.tokens(start, end),
            new_block_ids=added,
            sample=end == sequence.num_tokens,
        )
