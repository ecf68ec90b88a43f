"""A model made of exact integers, whose next token depends on every KV row and where it lies.

1. A token's state is a number below 2^20; the first is a hash of token and position.
2. At each layer its K and V rows are hashes of state, position, layer, *model-wide* KV head and
   channel. A pool of another request, layer, rank or generation holds other numbers.
3. "Attention" of a query over some keys is

       out[n, j] = q[n, j] * sum over keys i of (A(p_i) k_i[h, j] + B(p_i) v_i[h, j])   mod 2^20

   where p_i is the position at which the key was *found*, not the one it was made for. The sum does
   not depend on the query, so partials of disjoint keys add up, and prefix sums do a whole chunk.
4. A weighted sum over the heads, added up over the tensor-parallel ranks, gives the next state.
5. The last layer's state names the next token.

So one swapped, missing or stale block gives another token, exactly and on any device:
tests/arithmetic_reference.py says which one is right, by plain sums without blocks, ranks or rings.

All numbers are integers that fp32 holds exactly; sums run in fp64 and stay below 2^53 up to 2^17
keys.
"""

from typing import TypeVar

import numpy as np
import torch

from modeling.checkpoint.config import ModelConfig
from modeling.context import AttentionContext
from modeling.kernels.attention import AttentionKernel, Piece
from modeling.model import Model
from modeling.parallel import TensorParallel

MODULUS = 2**20
MAX_KEYS = 2**17
_MASK = 2**31 - 1
_WEIGHT_MASK = 2**15 - 1
SPECIAL_IDS = range(256, 260)  # never predicted: the beginning, the end, and the chat's marks
TOKEN, KEY, VALUE, QUERY, STATE, HEAD, KEY_WEIGHT, VALUE_WEIGHT, PICK, SCORE = range(1, 11)

Integers = TypeVar("Integers", int, np.ndarray, torch.Tensor)


def mix(x: Integers) -> Integers:
    """Spread 31 bits over 31 bits: every product stays below 2^62."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x46CA68B5) & _MASK
    return x ^ (x >> 16)


def hash_pair(x: Integers, y: Integers | int) -> Integers:
    return mix(mix(x) + y * 0x1E3779B1)


def odd_weight(x: Integers) -> Integers:
    """An odd number below 2^15: never 0, whatever is weighted counts."""
    return (mix(x) & _WEIGHT_MASK) | 1


class ArithmeticKernel(AttentionKernel):
    """The sum above; lse has no meaning here and is 0, -inf is understood by ``merge_``."""

    def attend(
        self, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, piece: Piece
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert piece.window is None, "the arithmetic model has no sliding window"
        assert len(k_SKH) == len(piece.k_positions)
        rows_SKH = _weighted(k_SKH, v_SKH, piece.k_positions.to(k_SKH.device))
        if piece.causal:
            assert len(q_TNH) == len(k_SKH) and int(piece.k_positions[0]) == piece.q_start
            sums = rows_SKH.cumsum(0)
        else:
            assert int(piece.k_positions[-1]) < piece.q_start, "a key is not before its queries"
            sums = rows_SKH.sum(0, keepdim=True)
        return _scaled(q_TNH, sums), torch.zeros(q_TNH.shape[:2], device=q_TNH.device)

    def merge_(
        self,
        out_TNH: torch.Tensor,
        lse_TN: torch.Tensor,
        other_out_TNH: torch.Tensor,
        other_lse_TN: torch.Tensor,
    ) -> None:
        out_TNH.masked_fill_(torch.isneginf(lse_TN).unsqueeze(-1), 0.0)
        seen_TN1 = ~torch.isneginf(other_lse_TN).unsqueeze(-1)
        out_TNH.add_(other_out_TNH.where(seen_TN1, torch.zeros_like(other_out_TNH)))
        out_TNH.fmod_(MODULUS)
        torch.maximum(lse_TN, other_lse_TN, out=lse_TN)

    def paged_decode(
        self,
        q_BNH: torch.Tensor,
        pool: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        *,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert window is None, "the arithmetic model has no sliding window"
        block_size = pool.shape[3]
        outs = []
        for q_NH, table, length in zip(q_BNH, block_tables, context_lens.tolist(), strict=True):
            blocks = pool[table[: -(-length // block_size)].long()]  # [n, K, 2, block_size, H]
            kv_2SKH = blocks.permute(2, 0, 3, 1, 4).flatten(1, 2)[:, :length]
            positions_S = torch.arange(length, device=pool.device)
            rows_SKH = _weighted(kv_2SKH[0], kv_2SKH[1], positions_S)
            outs.append(_scaled(q_NH.unsqueeze(0), rows_SKH.sum(0, keepdim=True)))
        return torch.cat(outs), torch.zeros(q_BNH.shape[:2], device=q_BNH.device)


def _weighted(k_SKH: torch.Tensor, v_SKH: torch.Tensor, positions_S: torch.Tensor) -> torch.Tensor:
    """A(p) k + B(p) v of every key, fp64 below 2^36."""
    assert len(positions_S) <= MAX_KEYS
    a_S11 = odd_weight(positions_S * 16 + KEY_WEIGHT).double()[:, None, None]
    b_S11 = odd_weight(positions_S * 16 + VALUE_WEIGHT).double()[:, None, None]
    return k_SKH.double().mul_(a_S11).addcmul_(v_SKH.double(), b_S11)


def _scaled(q_TNH: torch.Tensor, sums_TKH: torch.Tensor) -> torch.Tensor:
    group = q_TNH.shape[1] // sums_TKH.shape[1]
    sums_TNH = sums_TKH.fmod(MODULUS).repeat_interleave(group, dim=1)
    return (q_TNH.double() * sums_TNH).fmod_(MODULUS).to(q_TNH.dtype)


class ArithmeticModel(Model):
    """One tensor-parallel shard of the model; hidden_size is 1, dtype always float32."""

    dtype = torch.float32

    def __init__(
        self, config: ModelConfig, tp: TensorParallel, device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self.kernel = ArithmeticKernel()
        self.device = torch.device(device)
        self.tp = tp
        self._heads = self._local(config.num_heads)
        self._kv_heads = self._local(config.num_kv_heads)
        self._channels = torch.arange(config.head_dim, device=self.device)
        self._ids = torch.arange(config.vocab_size, device=self.device)
        salts_NH = _cross(self._heads * 16 + HEAD, self._channels)
        self._head_weights_NH = odd_weight(salts_NH).double()

    def _local(self, num_heads: int) -> torch.Tensor:
        """The model-wide indices of this rank's heads."""
        count = num_heads // self.tp.size
        first = self.tp.rank * count
        return torch.arange(first, first + count, device=self.device)

    @torch.inference_mode()
    def forward(
        self, input_ids_T: torch.Tensor, positions_T: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        state_T = hash_pair(mix(input_ids_T * 16 + TOKEN), positions_T) % MODULUS
        for layer in range(self.config.num_layers):
            # Position and layer enter every row, so the same token elsewhere has other rows.
            place_T = hash_pair(hash_pair(state_T, positions_T), layer)
            out_TNH = context.attend(
                layer,
                self._rows(place_T, QUERY, self._heads),
                self._rows(place_T, KEY, self._kv_heads),
                self._rows(place_T, VALUE, self._kv_heads),
            )
            total_T = (out_TNH.double() * self._head_weights_NH).sum((1, 2)).fmod_(MODULUS).float()
            self.tp.all_reduce_(total_T)  # exact in fp32 up to tp16
            state_T = hash_pair(place_T + STATE, total_T.long() % MODULUS) % MODULUS
            context.layer_done(layer)
        return state_T.unsqueeze(1).float()

    @torch.inference_mode()
    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        state_B = hidden_BD[:, 0].long()
        scores_BV = _cross(state_B * 16 + SCORE, self._ids) % 1024
        logits_BV = scores_BV.float().div_(-128.0)  # in (-8, 0]: a ranking for logprobs to show
        picks_B = _pick(state_B, self.config.vocab_size)
        return logits_BV.scatter_(1, picks_B.unsqueeze(1), 16.0)

    def _rows(self, place_T: torch.Tensor, salt: int, heads: torch.Tensor) -> torch.Tensor:
        rows_TKH = _cross(_cross(place_T + salt, heads), self._channels)
        return (rows_TKH % MODULUS).float()


def _cross(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Every x hashed with every y: [*x.shape, *y.shape], y of one dimension."""
    return hash_pair(x.unsqueeze(-1), y)


def _pick(state_B: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The next token: any id but the special ones."""
    token_B = mix(state_B * 16 + PICK) % (vocab_size - len(SPECIAL_IDS))
    return token_B + (token_B >= SPECIAL_IDS.start) * len(SPECIAL_IDS)
