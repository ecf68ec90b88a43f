"""The facts of a prefill pool, which never change while it lives. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from prefill.placement import Geometry, fits_ever
from protocol.messages import Prefill


@dataclass(frozen=True, slots=True)
class PrefillFacts:
    """The sizes and limits of a prefill pool."""

    pool_id: str
    geometry: Geometry
    tp_size: int
    num_blocks: int  # of each cp rank's block space
    layer_groups: tuple[range, ...]
    model_fingerprint: str
    vocab_size: int
    max_model_len: int
    max_num_sequences: int
    step_target_s: float
    fetch_threshold_tokens: int = 1  # fewer are computed again rather than fetched
    fetch_timeout_s: float = 30.0  # after which a fetch is given up

    def num_blocks_to_fetch(self, message: Prefill, num_cached_blocks: int) -> int:
        """The number of blocks to fetch from its decode pool, beyond those that are cached here.

        The last token is always computed, so its block is never fetched.
        """
        block_size = self.geometry.block_size
        num_tokens = min(message.num_target_tokens, len(message.prompt_token_ids) - 1)
        num_missed = max(0, num_tokens // block_size - num_cached_blocks)
        return num_missed if num_missed * block_size >= self.fetch_threshold_tokens else 0

    def refusal(self, message: Prefill, epochs: Mapping[str, int]) -> tuple[str, str] | None:
        """Why a prompt can never be served here, as (code, message).

        Args:
            epochs: of the decode pools that can be reached.
        """
        tokens = message.prompt_token_ids
        if not tokens or not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            return "invalid_prompt", f"token ids must be in [0, {self.vocab_size}), at least one"
        if epochs.get(message.target_pool_id) != message.target_epoch:
            target = f"{message.target_pool_id} at epoch {message.target_epoch}"
            return "stale_target", f"{target} is not a pool that {self.pool_id} can reach"
        if not fits_ever(self.geometry, len(tokens), self.num_blocks):
            capacity = self.num_blocks * self.geometry.cp_size * self.geometry.block_size
            return (
                "kv_capacity_exceeded",
                f"the prompt's {len(tokens)} tokens do not fit into the {capacity} tokens of KV "
                f"memory of {self.pool_id}",
            )
        return None
