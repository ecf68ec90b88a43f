"""A request as every process knows it: its key, its sampling parameters, how it can end.

All Structs are frozen: a request's truth changes in one place only, the coordinator's record.
"""

import enum

import msgspec

RequestKey = tuple[str, int]  # (request_id, attempt)


class Keyed(msgspec.Struct, frozen=True):
    """The base of all structs about one attempt at a request.

    Construct one as ``Kind(*key, field=...)``: the key in front, everything else by its name.
    """

    request_id: str
    attempt: int

    @property
    def key(self) -> RequestKey:
        """The attempt's name: (request_id, attempt)."""
        return self.request_id, self.attempt


class FinishReason(enum.StrEnum):
    """Why a sequence ended, in OpenAI's words where they have one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class NoToken(enum.StrEnum):
    """Why a row of logits gives no token; the code of the error that its request ends with."""

    NON_FINITE = "non_finite_logits"  # the model's numbers hold NaN or infinity: a rank's fault
    NOTHING_LEFT = "no_token_left"  # the request's own bans and penalties leave nothing to choose
    OFF_GRAMMAR = "grammar_failed"  # what is generated cannot go on by the request's grammar


def no_token_message(why: NoToken) -> str:
    """The error message for the caller."""
    if why is NoToken.NON_FINITE:
        return "the model's numbers for this request are not finite: there is no next token"
    if why is NoToken.OFF_GRAMMAR:
        return (
            "this request's grammar cannot be followed any further: it is too complex at this "
            "point of the answer, or no token of the model's vocabulary fits"
        )
    return (
        "this request's stop tokens, min_tokens, logit_bias and penalties leave no token to choose"
    )


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is chosen. The coordinator has validated every field.

    ``seed`` is always resolved: drawn by the coordinator when the caller gave none, and mixed with
    the choice's index when ``n > 1``. Token ``i`` of a sequence depends on ``(seed, i)`` and the
    logits alone, so a sequence that moves to another pool continues with the same tokens.
    """

    max_tokens: int
    seed: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()  # the model's end-of-sequence ids are among them
    ignore_eos: bool = False  # then stop_token_ids holds only what the caller named
    num_logprobs: int | None = None  # None: none; 0: the chosen token's only
    grammar: str = ""  # the answer is a text of it (modeling/text/grammar.py); "" is any text


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """The log-probabilities at one position, after the penalties and before the truncations."""

    chosen: float
    top_ids: tuple[int, ...] = ()
    top: tuple[float, ...] = ()


class PrefillPath(msgspec.Struct, frozen=True, omit_defaults=True):
    """The statistics of one request's prefill, sent with its first token."""

    pool_id: str
    ring_size: int  # the largest ring that any of its chunks ran on
    num_chunks: int
    num_cached_tokens: int  # found in the prefill pool's own cache
    num_computed_tokens: int
    num_moved_tokens: int  # read by the decode pool
    num_fetched_tokens: int = 0  # read back from the decode pool
    queue_s: float = 0.0
    compute_s: float = 0.0


class TransferStats(msgspec.Struct, frozen=True, omit_defaults=True):
    """The statistics of one hand-off, summed over the ranks of the decode pool."""

    transport: str = ""
    num_bytes: int = 0
    num_segments: int = 0
    num_descriptors: int = 0
    num_layers_overlapped: int = 0  # layers whose last byte landed before the prefill ended
    num_layers: int = 0
    read_s: float = 0.0  # time with at least one read in flight, of the slowest rank
    exposed_s: float = 0.0  # from the end of the prefill to the commit
