"""The arithmetic model once more, by running sums alone: no blocks, ranks, rings or torch.

The model is modeling/arithmetic.py. Every test that compares tokens with it compares with these.
"""

from collections.abc import Sequence

import numpy as np

from modeling.arithmetic import (
    HEAD,
    KEY,
    KEY_WEIGHT,
    MODULUS,
    PICK,
    QUERY,
    SPECIAL_IDS,
    STATE,
    TOKEN,
    VALUE,
    VALUE_WEIGHT,
    hash_pair,
    mix,
    odd_weight,
)
from modeling.checkpoint.config import ModelConfig


def expected_tokens(
    config: ModelConfig, prompt_token_ids: Sequence[int], num_tokens: int
) -> list[int]:
    """The only right greedy continuation of a prompt, by running sums and nothing else.

    Args:
        config: of an arithmetic model.
        prompt_token_ids: at least one.
        num_tokens: how many to predict.
    """
    reference = _Reference(config)
    tokens: list[int] = []
    new = list(prompt_token_ids)
    while len(tokens) < num_tokens:
        new = [reference.next_token(new)]
        tokens += new
    return tokens


class _Reference:
    """The model again, in numpy's int64, with one running sum for each layer, head and channel."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._num_seen = 0
        self._sums_LKH = np.zeros(
            (config.num_layers, config.num_kv_heads, config.head_dim), dtype=np.int64
        )
        self._channels = np.arange(config.head_dim)
        self._heads, self._kv_heads = np.arange(config.num_heads), np.arange(config.num_kv_heads)
        self._weights_NH = odd_weight(hash_pair(self._heads[:, None] * 16 + HEAD, self._channels))
        self._allowed = [i for i in range(config.vocab_size) if i not in SPECIAL_IDS]

    def next_token(self, new_token_ids: Sequence[int]) -> int:
        """Take in some more tokens and predict the one after them."""
        first = self._num_seen
        self._num_seen += len(new_token_ids)
        position = np.arange(first, self._num_seen, dtype=np.int64)
        key_weight = odd_weight(position * 16 + KEY_WEIGHT)[:, None, None]
        value_weight = odd_weight(position * 16 + VALUE_WEIGHT)[:, None, None]
        group = self._config.num_heads // self._config.num_kv_heads
        state = hash_pair(mix(np.array(new_token_ids, dtype=np.int64) * 16 + TOKEN), position)
        state = state % MODULUS
        for layer in range(self._config.num_layers):
            place = hash_pair(hash_pair(state, position), layer)
            kv_TKH = self._rows(place, KEY, self._kv_heads) * key_weight
            kv_TKH += self._rows(place, VALUE, self._kv_heads) * value_weight
            sums_TKH = (kv_TKH.cumsum(axis=0) + self._sums_LKH[layer]) % MODULUS
            self._sums_LKH[layer] = sums_TKH[-1]
            q_TNH = self._rows(place, QUERY, self._heads)
            out_TNH = q_TNH * sums_TKH.repeat(group, axis=1) % MODULUS
            total = (out_TNH * self._weights_NH).sum(axis=(1, 2))
            state = hash_pair(place + STATE, total % MODULUS) % MODULUS
        return self._allowed[mix(int(state[-1]) * 16 + PICK) % len(self._allowed)]

    def _rows(self, place: np.ndarray, salt: int, heads: np.ndarray) -> np.ndarray:
        of_heads = hash_pair((place + salt)[:, None], heads)
        return np.asarray(hash_pair(of_heads[:, :, None], self._channels) % MODULUS)
