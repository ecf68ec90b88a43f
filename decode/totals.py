"""What a decode pool has counted since its start, for its heartbeats. Pure."""

from dataclasses import dataclass

from decode.batch import Batch
from decode.sequence import Sequence
from kvtransfer.events import Load
from protocol.messages import BlockCounts


@dataclass(slots=True)
class Totals:
    """Counted since the start."""

    num_granted: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0  # sampled here
    num_kept_blocks: int = 0  # of hand-offs that did not complete
    queue_s: float = 0.0
    busy_s: float = 0.0

    def grant(self, sequence: Sequence, now: float) -> None:
        self.num_granted += 1
        self.num_prompt_tokens += sequence.num_prompt_tokens
        self.num_cached_tokens += sequence.num_cached_tokens
        self.queue_s += now - sequence.arrived_s

    def counters(self) -> dict[str, float]:
        return {
            "requests_total": self.num_granted,
            "prompt_tokens_total": self.num_prompt_tokens,
            "cached_tokens_total": self.num_cached_tokens,
            "output_tokens_total": self.num_output_tokens,
            "queue_s_total": self.queue_s,
            "busy_s_total": self.busy_s,
            "kept_blocks_total": self.num_kept_blocks,
        }

    def load(self, batch: Batch, num_queued: int, num_served: int, blocks: BlockCounts) -> Load:
        """Together with what there is now."""
        return Load(
            num_waiting=num_queued + len(batch.preempted),
            num_running=len(batch.running),
            pending_tokens=sum(sequence.num_pending_tokens for sequence in batch.running),
            blocks=(blocks,),
            counters={
                **self.counters(),
                "preemptions_total": batch.num_preemptions,
                "recomputed_tokens_total": batch.num_recomputed_tokens,
                "swapped_blocks": batch.num_swapped_blocks,
                "served_blocks_total": num_served,
            },
        )
