"""Prompts whose every following token is known.

The arithmetic model's answer is worked out once per prompt. A request names a salt of its own, so
that the same prompt is computed, handed over and read anew each time, or none to hit the caches.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from modeling.checkpoint.config import load_config
from tests.arithmetic_reference import expected_tokens

MODEL = "arithmetic:layers=2,heads=2,kv_heads=2,vocab=512,max_len=4096"
MAX_TOKENS = 48
_PLAIN_IDS = 250  # below the special ones


@dataclass(frozen=True, slots=True)
class Prompt:
    """``tokens`` are the right ones, MAX_TOKENS of them."""

    token_ids: tuple[int, ...]
    tokens: tuple[int, ...]


class Oracle:
    """A set of prompts, most of them short.

    Args:
        rng: what they are made of.
        lengths: one prompt is made of each.
    """

    def __init__(self, rng: random.Random, lengths: Sequence[int]) -> None:
        config = load_config(MODEL)
        self._prompts = []
        for length in lengths:
            token_ids = tuple(rng.randrange(_PLAIN_IDS) for _ in range(length))
            tokens = tuple(expected_tokens(config, token_ids, MAX_TOKENS))
            self._prompts.append(Prompt(token_ids, tokens))

    def draw(self, rng: random.Random) -> Prompt:
        """Any of them."""
        return rng.choice(self._prompts)


def mixed_lengths(rng: random.Random, count: int) -> list[int]:
    """Mostly a few blocks, now and then several chunks, now and then next to nothing."""
    choices = ((1, 16), (20, 90), (20, 90), (20, 90), (90, 300), (300, 1200))
    return [rng.randint(*choices[index % len(choices)]) for index in range(count)]
