"""The facts of a decode pool, which never change while it lives. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeFacts:
    """The limits of a decode pool.

    ``token_budget`` tokens are computed in a step. It is at least ``max_num_sequences``, so that
    every decoding sequence gets its token in each step.
    """

    model_fingerprint: str  # part of every block hash
    max_model_len: int
    token_budget: int
    max_num_sequences: int
    watermark_blocks: int = 1  # kept for running sequences to grow into when one is admitted
    max_swapped_blocks: int = 1 << 30  # in host memory; beyond, KV is dropped and recomputed
    min_tokens_to_load: int = 1  # of a prefix, from a store; fewer are computed
    load_part_blocks: int = 128  # that are asked of a store at a time

    def __post_init__(self) -> None:
        assert self.token_budget >= self.max_num_sequences, "a decoding sequence would starve"
