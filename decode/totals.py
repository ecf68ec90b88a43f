"""What a decode pool has counted since its start, for its heartbeats. Pure."""

from dataclasses import dataclass

from decode.sequence import Sequence


@dataclass(slots=True)
class Totals:
    """Counted since the start."""

    num_granted: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0  # sampled here
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
        }
