"""The decoder-only transformer of Llama, Mistral, Qwen2 and Qwen3, for inference only.

A forward pass goes through the layers once; whatever is about KV is asked of the AttentionContext.
A tensor-parallel rank holds every ``size``-th part: heads of q, k and v and the columns of gate and
up before, the matching rows of o and down after, each followed by one all-reduce; vocabulary rows
of the embedding and the output head. Norms are whole on every rank.

Numerics follow transformers: RMSNorm statistics in fp32 and rounded before the weight, RoPE in fp32
(transformers rounds cosine and sine to bf16 first; here they stay exact).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from modeling.checkpoint.config import ModelConfig
from modeling.context import AttentionContext
from modeling.kernels.attention import AttentionKernel
from modeling.kernels.linear import Linear
from modeling.model import Model
from modeling.parallel import TensorParallel
from modeling.rope import Rope, rotate


@dataclass(frozen=True, slots=True)
class Layer:
    """One rank's shard of a layer; q and k rows in the channel order of rope.py."""

    input_norm_D: torch.Tensor
    qkv: Linear  # [(N + 2K) * H, D]
    qk_norm: torch.Tensor | None  # [N + K, H], the weights of q_norm and k_norm for each head
    output: Linear  # [D, N * H]; its bias is on rank 0 only
    mlp_norm_D: torch.Tensor
    gate_up: Linear  # [2 * ffn, D]
    down: Linear  # [D, ffn]; its bias is on rank 0 only


@dataclass(frozen=True, slots=True)
class TransformerWeights:
    """One rank's shard of everything."""

    embedding: torch.Tensor  # [V / tp rounded up, D], zero rows past the vocabulary's end
    layers: tuple[Layer, ...]
    final_norm_D: torch.Tensor
    head: Linear  # rows of the vocabulary like the embedding's


class Transformer(Model):
    """One tensor-parallel shard of the model."""

    def __init__(
        self,
        config: ModelConfig,
        weights: TransformerWeights,
        tp: TensorParallel,
        kernel: AttentionKernel,
    ) -> None:
        self.config = config
        self.kernel = kernel
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self._weights = weights
        self.tp = tp
        self._rope = Rope(config.rope, config.head_dim, self.device)
        self._num_heads = config.num_heads // tp.size
        self._num_kv_heads = config.num_kv_heads // tp.size

    @torch.inference_mode()
    def forward(
        self, input_ids_T: torch.Tensor, positions_T: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        x_TD = self._embed(input_ids_T)
        rotation = self._rope.at(positions_T)
        for index, layer in enumerate(self._weights.layers):
            x_TD += self._attention(
                index, layer, self._norm(x_TD, layer.input_norm_D), rotation, context
            )
            x_TD += self._mlp(layer, self._norm(x_TD, layer.mlp_norm_D))
            context.layer_done(index)
        return self._norm(x_TD, self._weights.final_norm_D)

    @torch.inference_mode()
    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        shard = self._weights.head(hidden_BD)
        if self.tp.size == 1:
            return shard.float()
        return self.tp.all_gather(shard, dim=-1)[:, : self.config.vocab_size].float()

    def _embed(self, input_ids_T: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return F.embedding(input_ids_T, self._weights.embedding)
        rows = self._weights.embedding.shape[0]
        local_T = input_ids_T - self.tp.rank * rows
        elsewhere_T = (local_T < 0) | (local_T >= rows)
        x_TD = F.embedding(local_T.masked_fill_(elsewhere_T, 0), self._weights.embedding)
        x_TD.masked_fill_(elsewhere_T[:, None], 0)
        self.tp.all_reduce_(x_TD)
        return x_TD

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm over the last dimension (Zhang and Sennrich, arXiv 1910.07467)."""
        return F.rms_norm(x, x.shape[-1:], None, self.config.rms_norm_eps).mul_(weight)

    def _attention(
        self,
        index: int,
        layer: Layer,
        x_TD: torch.Tensor,
        rotation: torch.Tensor,
        context: AttentionContext,
    ) -> torch.Tensor:
        num_rotated = self._num_heads + self._num_kv_heads
        qkv = layer.qkv(x_TD).view(x_TD.shape[0], -1, self.config.head_dim)
        qk, v_TKH = qkv[:, :num_rotated], qkv[:, num_rotated:]
        if layer.qk_norm is not None:
            qk = self._norm(qk, layer.qk_norm)
        qk = rotate(qk, rotation)
        q_TNH, k_TKH = qk[:, : self._num_heads], qk[:, self._num_heads :]
        out = layer.output(context.attend(index, q_TNH, k_TKH, v_TKH).flatten(1))
        self.tp.all_reduce_(out)
        return out

    def _mlp(self, layer: Layer, x_TD: torch.Tensor) -> torch.Tensor:
        gate, up = layer.gate_up(x_TD).chunk(2, dim=-1)
        out = layer.down(F.silu(gate).mul_(up))
        self.tp.all_reduce_(out)
        return out
