"""What the toy server does, and when: the truth that a harness is held against."""

from collections.abc import Sequence

import msgspec

Stall = tuple[float, float]  # (from, seconds)


class ToyConfig(msgspec.Struct, frozen=True):
    """What it does. Rates are shares of the requests."""

    base_s: float = 0.02
    prefill_s_per_1k: float = 0.05
    token_s: float = 0.01
    tokens_per_event: int = 1
    num_slots: int = 0
    """0: as many as there are requests. A request holds its slot for its whole planned time."""
    stalls: tuple[Stall, ...] = ()
    """(seconds after the server's start or restart, seconds)."""
    failure_rate: float = 0.0
    """Answered with status 500 at once."""
    error_rate: float = 0.0
    """An error inside the stream, after half of the tokens."""
    disconnect_rate: float = 0.0
    """The connection is closed after half of the tokens."""
    early_role: bool = False
    """Chat: sends the role at once, which some harnesses take for the first token."""
    is_strict: bool = False
    """Refuses fields that are not OpenAI's."""
    seed: int = 0

    def prefill_s(self, num_prompt_tokens: int) -> float:
        return self.base_s + self.prefill_s_per_1k * num_prompt_tokens / 1000

    def service_s(self, num_prompt_tokens: int, num_output_tokens: int) -> float:
        """From a request's turn to its last token."""
        num_gaps = -(-num_output_tokens // self.tokens_per_event) - 1
        return self.prefill_s(num_prompt_tokens) + num_gaps * self.token_s


def advance(start: float, duration_s: float, stalls: Sequence[Stall]) -> float:
    """When ``duration_s`` of work that is taken up at ``start`` are done, given the stalls."""
    now, left_s = start, duration_s
    for begin, length_s in sorted(stalls):
        end = begin + length_s
        if begin <= now < end:
            now = end
        elif now < begin < now + left_s:
            left_s -= begin - now
            now = end
    return now + left_s
