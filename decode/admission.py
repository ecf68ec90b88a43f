"""The queue in front of a decode pool, whose first sequence gets blocks next. Pure.

Blocks are granted in the order of arrival; none overtakes a sequence that waits for room. They are
for the whole prompt and one token more, so that a sequence that is admitted can be handed its
prompt, or compute it, without waiting for a block.
"""

from collections import OrderedDict

from decode.facts import DecodeFacts
from decode.memory import SequenceMemory
from decode.sequence import Sequence
from protocol.request import RequestKey


class Admission:
    """The sequences that are QUEUED."""

    def __init__(self, memory: SequenceMemory, facts: DecodeFacts) -> None:
        self._memory = memory
        self._facts = facts
        self._queue: OrderedDict[RequestKey, Sequence] = OrderedDict()  # any may leave at any time

    def __len__(self) -> int:
        return len(self._queue)

    def refusal(self, sequence: Sequence) -> str | None:
        """Why a sequence can never be served to its end here, or None if it can.

        Admitted, it would end in the middle of its answer, and the caller would take that for its
        own limit.
        """
        num_left = sequence.sampling.max_tokens - sequence.num_earlier_tokens
        num_asked = sequence.num_prompt_tokens + num_left
        # The last token needs no slot: nothing follows it.
        num_needed = min(num_asked, self._facts.max_model_len) - 1
        if num_needed <= self._memory.num_slots:
            return None
        return (
            f"{sequence.num_prompt_tokens} tokens and {num_left} more that were asked for do not "
            f"fit into the {self._memory.num_slots} that this decode pool can hold"
        )

    def add(self, sequence: Sequence) -> None:
        self._queue[sequence.key] = sequence

    def remove(self, sequence: Sequence) -> None:
        del self._queue[sequence.key]
        self._memory.has_new_room = True  # another may be first in the queue

    def next(self, num_holders: int) -> Sequence | None:
        """Grant blocks to the first in the queue; None when the queue is empty or there is no room.

        Args:
            num_holders: sequences that hold blocks of their own.
        """
        if not self._queue or not self._memory.has_new_room:
            return None
        sequence = next(iter(self._queue.values()))
        num_slots = min(sequence.num_prompt_tokens + 1, self._memory.num_slots)
        if num_holders >= self._facts.max_num_sequences or not self._memory.allocate(
            sequence, num_slots, is_alone=num_holders == 0
        ):
            # Asking again is useless, and costs a look into the prefix cache, until a block is
            # given up.
            self._memory.has_new_room = False
            return None
        sequence.num_cached_tokens = sequence.num_computed_tokens
        del self._queue[sequence.key]
        return sequence
