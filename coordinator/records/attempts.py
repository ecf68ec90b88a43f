"""What a record keeps of attempts that were lost, and of waiting for the next one. Pure."""

from dataclasses import dataclass

from protocol.errors import RequestError


@dataclass(frozen=True, slots=True)
class EndedAttempt:
    """An attempt that could not go on, for the time line."""

    attempt: int
    decode_pool: str
    prefill_pool: str
    num_output_tokens: int  # that the caller had by then
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Why and how long a request waits for its next attempt."""

    since: float
    until: float
    error: RequestError  # what it ends with if nothing comes
    not_before: float = 0.0
    home: str = ""  # a pool that has something of it
    closing: tuple[str, int] | None = None  # a holder that is to release it first
