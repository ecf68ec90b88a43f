"""Records of requests that nobody has sent."""

from itertools import accumulate
from typing import Any

from bench.load.record import RequestRecord


def record(
    index: int = 0,
    ttft_s: float | None = 0.1,
    *,
    gaps_s: tuple[float, ...] = (),
    at_s: float = 0.0,
    target: str = "t",
    **fields: Any,
) -> RequestRecord:
    """An answered request of one token and one more after each gap; unanswered without a TTFT.

    Args:
        at_s: when it was due, and sent.
    """
    times = () if ttft_s is None else tuple(accumulate(gaps_s, initial=at_s + ttft_s))
    usual = {
        "session": f"s{index}",
        "turn": 0,
        "kind": "short",
        "intended_s": at_s,
        "sent_s": at_s,
        "token_times_s": times,
        "token_counts": (1,) * len(times),
        "finished_s": times[-1] if times else None,
        "num_prompt_tokens": 100,
        "num_output_tokens": len(times),
        "outcome": "ok",
    }
    return RequestRecord(target=target, index=index, **{**usual, **fields})
